"""The authority: what it signs, and that its key stays its own."""

import os
import stat
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from nsm.errors import InvalidError, PreconditionError
from nsm.identity import authority as module
from nsm.identity.authority import DAY, HOUR, Authority, dns_names, open_authority
from nsm.identity.spiffe import SpiffeId
from nsm.identity.verify import peer_id

ME = SpiffeId.parse("spiffe://td.example/ns/a/pod/Nsc_1")


def test_a_certificate_says_what_it_must() -> None:
    authority = Authority.create("td.example")
    leaf = authority.issue(ME, dns=["client.example"]).leaf
    value = leaf.extensions.get_extension_for_class
    names = value(x509.SubjectAlternativeName).value
    usage = value(x509.KeyUsage)
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [str(ME)]
    assert names.get_values_for_type(x509.DNSName) == ["nsc-1", "client.example"]
    assert not value(x509.BasicConstraints).value.ca
    assert usage.critical
    assert usage.value.digital_signature
    assert not any((usage.value.key_cert_sign, usage.value.crl_sign, usage.value.key_agreement))
    assert set(value(x509.ExtendedKeyUsage).value) == {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert leaf.serial_number != authority.issue(ME).leaf.serial_number
    assert peer_id([leaf], {"td.example": authority.certificates}) == ME


def test_a_certificate_lives_an_hour_unless_told_otherwise() -> None:
    authority = Authority.create("td.example")
    now = time.time_ns()
    assert abs(authority.issue(ME).not_after - now - HOUR) < 5 * 10**9
    assert abs(authority.issue(ME, ttl=2 * HOUR).not_after - now - 2 * HOUR) < 5 * 10**9


def test_no_certificate_outlives_its_authority() -> None:
    authority = Authority.create("td.example", life=HOUR)
    end = authority.certificates[0].not_valid_after_utc
    assert authority.issue(ME, ttl=DAY).leaf.not_valid_after_utc == end


@pytest.mark.parametrize("text", ["spiffe://other.example/a", "spiffe://td.example"])
def test_it_speaks_for_the_workloads_of_its_own_domain_only(text: str) -> None:
    with pytest.raises(InvalidError, match="cannot speak for"):
        Authority.create("td.example").issue(SpiffeId.parse(text))


@pytest.mark.parametrize(
    ("path", "names"),
    [("/ns/a/pod/nsc-7F", ("nsc-7f",)), ("/a_b", ("a-b",)), ("/...", ()), ("/" + "a" * 300, ())],
)
def test_the_dns_name_is_the_last_path_element(path: str, names: tuple[str, ...]) -> None:
    assert dns_names(SpiffeId("td.example", path)) == names


def test_its_key_is_for_its_user_alone(tmp_path: Path) -> None:
    directory = tmp_path / "issuer"
    before = os.umask(0)
    try:
        open_authority(directory, "td.example")
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "authority.pem").stat().st_mode) == 0o600
    assert os.listdir(directory) == ["authority.pem"]


def test_it_is_the_same_after_a_restart(tmp_path: Path) -> None:
    first = open_authority(tmp_path / "i", "td.example")
    again = open_authority(tmp_path / "i", "td.example")
    assert again.certificates == first.certificates
    assert peer_id(again.issue(ME).chain, {"td.example": first.certificates}) == ME


def test_two_that_start_at_once_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "authority.pem"
    first, second = Authority.create("td.example"), Authority.create("td.example")
    module._first(path, first)
    module._first(path, second)
    assert open_authority(tmp_path, "td.example").certificates == first.certificates
    assert os.listdir(tmp_path) == ["authority.pem"]


def test_a_key_that_others_could_read_is_refused(tmp_path: Path) -> None:
    open_authority(tmp_path / "i", "td.example")
    (tmp_path / "i" / "authority.pem").chmod(0o640)
    with pytest.raises(PreconditionError, match="chmod 600"):
        open_authority(tmp_path / "i", "td.example")


def test_a_directory_that_others_could_change_is_refused(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "i").chmod(0o777)
    with pytest.raises(PreconditionError, match="chmod 700"):
        open_authority(tmp_path / "i", "td.example")


def test_a_place_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "i").write_text("")
    with pytest.raises(PreconditionError, match="cannot be used"):
        open_authority(tmp_path / "i", "td.example")


def test_another_domains_authority_is_refused(tmp_path: Path) -> None:
    open_authority(tmp_path / "i", "td.example")
    with pytest.raises(InvalidError, match="not of"):
        open_authority(tmp_path / "i", "other.example")


def test_a_damaged_file_is_refused_without_its_content(tmp_path: Path) -> None:
    open_authority(tmp_path / "i", "td.example")
    path = tmp_path / "i" / "authority.pem"
    pem = path.read_bytes()
    for damaged in (pem[:100], pem[200:], pem.replace(b"PRIVATE", b"PRIVATF"), b""):
        path.write_bytes(damaged)
        with pytest.raises(InvalidError) as refused:
            open_authority(tmp_path / "i", "td.example")
        assert pem.splitlines()[1].decode() not in str(refused.value)


def test_an_expired_one_says_so(tmp_path: Path) -> None:
    past = time.time_ns() - 2 * HOUR
    Authority.create("td.example", life=HOUR, now=past).save(tmp_path / "authority.pem")
    with pytest.raises(PreconditionError, match="expired"):
        open_authority(tmp_path, "td.example")


def test_before_its_end_a_new_one_signs_and_both_are_believed(tmp_path: Path) -> None:
    old = Authority.create("td.example", life=30 * DAY)
    before = old.issue(ME)
    old.save(tmp_path / "authority.pem")
    renewed = open_authority(tmp_path, "td.example")
    assert renewed.certificates[1:] == old.certificates
    assert renewed.certificates[0].not_valid_after_utc.year > datetime.now(UTC).year + 5
    for svid in (before, renewed.issue(ME)):
        assert peer_id(svid.chain, {"td.example": renewed.certificates}) == ME
    assert open_authority(tmp_path, "td.example").certificates == renewed.certificates


def test_its_key_is_in_no_repr() -> None:
    assert repr(Authority.create("td.example")) == "Authority('td.example', 1 keys)"


def test_a_bundle_for_others_can_be_read_by_others(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        module.write_atomically(tmp_path / "bundle.pem", b"", mode=0o644)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "bundle.pem").stat().st_mode) == 0o644


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(TypeError):
        module.write_atomically(path, "no bytes", mode=0o600)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]
