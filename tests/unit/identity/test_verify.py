"""Whose certificate it is, and every rule that can refuse it."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from nsm.errors import UnauthenticatedError
from nsm.identity import verify
from nsm.identity.authority import Authority
from nsm.identity.spiffe import SpiffeId
from nsm.identity.verify import peer_id
from tests.unit.identity.forge import Made, forge, root

ROOT = root()
OTHER = root("other.example")
ID = "spiffe://td.example/client"
DAY = 86400 * 10**9


def bundles(*made: Made) -> dict[str, tuple[x509.Certificate, ...]]:
    return {"td.example": tuple(m.cert for m in made)}


def refusal(chain: Sequence[x509.Certificate], *known: Made, now: int | None = None) -> str:
    with pytest.raises(UnauthenticatedError) as refused:
        peer_id(chain, bundles(*(known or (ROOT,))), now=now)
    return str(refused.value)


def test_a_leaf_of_its_own_domain_is_believed() -> None:
    assert peer_id([forge(ID, by=ROOT).cert], bundles(ROOT)) == SpiffeId.parse(ID)


def test_dns_names_decide_nothing() -> None:
    assert str(peer_id([forge(ID, by=ROOT, dns=["evil.example", "x"]).cert], bundles(ROOT))) == ID


@pytest.mark.parametrize("usage", [None, "1.3.6.1.5.5.7.3.4"])
def test_any_extended_usage_will_do(usage: str | None) -> None:
    more = [x509.ExtendedKeyUsage([x509.ObjectIdentifier(usage)])] if usage else []
    assert str(peer_id([forge(ID, by=ROOT, more=more).cert], bundles(ROOT))) == ID


def test_a_leaf_without_any_usage_or_constraint_is_believed() -> None:
    assert str(peer_id([forge(ID, by=ROOT, ca=None, sign=None).cert], bundles(ROOT))) == ID


def test_an_intermediate_authority_is_followed() -> None:
    middle = forge("spiffe://td.example", by=ROOT, ca=True, sign=(True, True), name="middle")
    leaf = forge(ID, by=middle)
    assert str(peer_id([leaf.cert, middle.cert], bundles(ROOT))) == ID
    assert "does not chain" in refusal([leaf.cert])


@pytest.mark.parametrize("key", ["p384", "rsa"])
def test_authorities_with_other_keys_are_believed(key: str) -> None:
    made = (
        ec.generate_private_key(ec.SECP384R1())
        if key == "p384"
        else rsa.generate_private_key(65537, 2048)
    )
    authority = root(key=made)
    assert str(peer_id([forge(ID, by=authority).cert], bundles(authority))) == ID


def test_one_of_several_authorities_of_a_bundle_is_enough() -> None:
    new = root()  # the same name, another key: as when an authority is renewed
    leaf = forge(ID, by=ROOT).cert
    assert str(peer_id([leaf], bundles(new, ROOT))) == ID


def test_no_certificate_is_refused() -> None:
    assert "showed no certificate" in refusal([])


def test_a_chain_without_end_is_refused() -> None:
    leaf = forge(ID, by=ROOT).cert
    assert "chain of 9 certificates; at most 8" in refusal([leaf] * 9)


def test_a_leaf_without_a_uri_name_is_refused() -> None:
    assert "has no URI names" in refusal([forge(by=ROOT, dns=["a.example"]).cert])
    assert "has no URI names" in refusal([forge(by=ROOT).cert])


def test_a_leaf_with_two_uri_names_is_refused() -> None:
    assert "has 2 URI names" in refusal([forge(ID, "spiffe://td.example/b", by=ROOT).cert])
    assert "has 2 URI names" in refusal([forge(ID, "https://x", by=ROOT).cert])


@pytest.mark.parametrize("uri", ["https://td.example/a", "spiffe://td.example/a/../b", "spiffe://"])
def test_a_uri_name_that_is_no_id_is_refused(uri: str) -> None:
    assert "no SPIFFE id" in refusal([forge(uri, by=ROOT).cert])


def test_the_trust_domains_own_id_is_no_peers() -> None:
    assert "names the trust domain" in refusal([forge("spiffe://td.example", by=ROOT).cert])


def test_an_authority_is_no_peer() -> None:
    assert "is an authority's (CA)" in refusal([forge(ID, by=ROOT, ca=True).cert])


def test_a_leaf_that_may_sign_certificates_is_refused() -> None:
    assert "keyCertSign" in refusal([forge(ID, by=ROOT, sign=(True, False)).cert])


def test_a_leaf_that_may_sign_revocation_lists_is_refused() -> None:
    assert "cRLSign" in refusal([forge(ID, by=ROOT, sign=(False, True)).cert])


def test_an_expired_leaf_is_refused() -> None:
    why = refusal([forge(ID, by=ROOT, days=(-0.9, -0.1)).cert])
    assert "expired at" in why
    assert ID in why


def test_a_leaf_from_the_future_is_refused() -> None:
    assert "does not hold before" in refusal([forge(ID, by=ROOT, days=(0.1, 0.5)).cert])


def test_an_expired_intermediate_is_refused_by_its_own_sentence() -> None:
    middle = forge(
        "spiffe://td.example", by=ROOT, ca=True, sign=(True, True), name="m", days=(-0.9, -0.1)
    )
    why = refusal([forge(ID, by=middle).cert, middle.cert])
    assert "the intermediate certificate" in why
    assert "expired at" in why


def test_an_expired_bundle_is_refused_by_its_own_sentence() -> None:
    old = root(days=(-2, -1))
    assert "is expired or not yet valid" in refusal([forge(ID, by=old).cert], old)


def test_an_unknown_trust_domain_is_refused_with_those_that_are_known() -> None:
    why = refusal([forge("spiffe://other.example/a", by=OTHER).cert])
    assert "no bundle of the trust domain 'other.example'" in why
    assert "bundles here: td.example" in why


def test_one_domains_authority_cannot_speak_for_another() -> None:
    known = {"td.example": (ROOT.cert,), "other.example": (OTHER.cert,)}
    forged = forge("spiffe://other.example/a", by=ROOT).cert
    with pytest.raises(UnauthenticatedError, match="does not chain to the bundle of its own"):
        peer_id([forged], known)
    assert str(peer_id([forge("spiffe://other.example/a", by=OTHER).cert], known))


def test_an_intermediate_of_another_domain_does_not_help() -> None:
    known = {"td.example": (ROOT.cert,), "other.example": (OTHER.cert,)}
    middle = forge("spiffe://other.example", by=OTHER, ca=True, sign=(True, True), name="m")
    with pytest.raises(UnauthenticatedError, match="does not chain"):
        peer_id([forge(ID, by=middle).cert, middle.cert], known)


def test_a_workload_cannot_be_anothers_authority() -> None:
    workload = forge(ID, by=ROOT, name="workload")
    assert "does not chain" in refusal([forge(ID, by=workload).cert, workload.cert])


def test_an_intermediate_that_may_not_sign_is_refused() -> None:
    middle = forge("spiffe://td.example", by=ROOT, ca=True, sign=(False, False), name="middle")
    assert "does not chain" in refusal([forge(ID, by=middle).cert, middle.cert])


def test_a_workload_in_a_bundle_is_no_authority() -> None:
    workload = forge(ID, by=ROOT, name="workload")
    assert "does not chain" in refusal([forge(ID, by=workload).cert], workload)


def test_a_signature_of_another_key_is_refused() -> None:
    liar = Made(ROOT.cert, ec.generate_private_key(ec.SECP256R1()))
    assert "does not chain" in refusal([forge(ID, by=liar).cert])


def test_a_self_made_leaf_is_refused() -> None:
    assert "does not chain" in refusal([forge(ID).cert])


def test_a_key_that_no_authority_may_have_is_refused() -> None:
    authority = root(key=rsa.generate_private_key(65537, 1024))
    assert "does not chain" in refusal([forge(ID, by=authority).cert], authority)


def test_a_verified_chain_is_only_compared_until_it_expires(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaf = forge(ID, by=ROOT).cert
    known = bundles(ROOT)
    peer_id([leaf], known)
    with monkeypatch.context() as patched:
        patched.setattr(verify, "_built", lambda *_: pytest.fail("verified again"))
        peer_id([leaf], known)
    assert "expired at" in refusal([leaf], now=time.time_ns() + 2 * DAY)
    assert "does not hold before" in refusal([leaf], now=time.time_ns() - 2 * DAY)


def test_a_verified_chain_is_verified_again_under_another_bundle() -> None:
    leaf = forge(ID, by=ROOT).cert
    peer_id([leaf], bundles(ROOT))
    assert "does not chain" in refusal([leaf], root())


def test_what_is_remembered_is_bounded() -> None:
    remembered = verify._Verified()
    for number in range(verify._REMEMBERED + 10):
        remembered.put(number, (0, 1))
    assert remembered.get(0) is None
    assert remembered.get(verify._REMEMBERED) == (0, 1)


def test_openssl_believes_what_our_authority_makes(tmp_path: Path) -> None:
    authority = Authority.create("td.example")
    svid = authority.issue(SpiffeId.parse(ID))
    (tmp_path / "ca.pem").write_bytes(authority.bundle_pem())
    (tmp_path / "leaf.pem").write_bytes(svid.chain_pem())
    for purpose in ("sslclient", "sslserver"):
        files = ("-CAfile", str(tmp_path / "ca.pem"), str(tmp_path / "leaf.pem"))
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, *files]
        subprocess.run(command, check=True, capture_output=True)


def openssl_says(chain: Sequence[x509.Certificate], known: Made, tmp_path: Path) -> bool:
    pem = [c.public_bytes(serialization.Encoding.PEM) for c in (known.cert, *chain)]
    for name, content in (("ca", pem[0]), ("leaf", pem[1]), ("rest", b"".join(pem[2:]))):
        (tmp_path / name).write_bytes(content)
    rest = ["-untrusted", str(tmp_path / "rest")] if pem[2:] else []
    command = ["openssl", "verify", "-CAfile", str(tmp_path / "ca"), *rest, str(tmp_path / "leaf")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_openssl_agrees_about_chains(tmp_path: Path) -> None:
    middle = forge("spiffe://td.example", by=ROOT, ca=True, sign=(True, True), name="middle")
    no_ca = forge("spiffe://td.example", by=ROOT, name="no ca")
    liar = Made(ROOT.cert, ec.generate_private_key(ec.SECP256R1()))
    for good, chain in (
        (True, [forge(ID, by=ROOT).cert]),
        (True, [forge(ID, by=middle).cert, middle.cert]),
        (False, [forge(ID, by=middle).cert]),
        (False, [forge(ID, by=no_ca).cert, no_ca.cert]),
        (False, [forge(ID, by=liar).cert]),
        (False, [forge(ID, by=OTHER).cert]),
        (False, [forge(ID, by=ROOT, days=(-0.9, -0.1)).cert]),
    ):
        assert openssl_says(chain, ROOT, tmp_path) is good
        if good:
            peer_id(chain, bundles(ROOT))
        else:
            refusal(chain)


def test_a_leaf_with_another_kind_of_key_is_believed_too() -> None:
    leaf = forge(ID, by=ROOT, key=ed25519.Ed25519PrivateKey.generate()).cert
    assert str(peer_id([leaf], bundles(ROOT))) == ID
