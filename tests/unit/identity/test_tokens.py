"""Tokens: the exact form, who signed them, and that nobody else ever sees one."""

import base64
import json
import time
import traceback
from datetime import UTC, datetime
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from nsm.errors import DeniedError, InvalidError
from nsm.identity import tokens
from nsm.identity.authority import Authority
from nsm.identity.source import Svid
from nsm.identity.spiffe import SpiffeId
from nsm.identity.tokens import claims, format_instant, issue, parse_instant, signed_by
from tests.unit.identity.forge import forge, root

SECOND = 10**9
MINUTES = 60 * SECOND
DOMAIN = Authority.create("td.example")
A = DOMAIN.issue(SpiffeId.parse("spiffe://td.example/a"))
B = DOMAIN.issue(SpiffeId.parse("spiffe://td.example/b"))
NOW = time.time_ns()


def part(text: str, which: int) -> Any:
    raw = text.split(".")[which]
    return json.loads(base64.urlsafe_b64decode(raw + "=" * (-len(raw) % 4)))


def token(header: Any, payload: Any, key: Any = A.key, signature: bytes | None = None) -> str:
    """A JWT of any content, signed as PyJWT does."""
    pieces = [
        base64.urlsafe_b64encode(p if isinstance(p, bytes) else json.dumps(p).encode())
        .rstrip(b"=")
        .decode()
        for p in (header, payload)
    ]
    if signature is None:
        signature = jwt.get_algorithm_by_name("ES256").sign(".".join(pieces).encode(), key)
    return ".".join([*pieces, base64.urlsafe_b64encode(signature).rstrip(b"=").decode()])


HEADER = {"alg": "ES256", "typ": "JWT"}
GOOD = {"sub": str(A.id), "aud": [str(B.id)], "exp": NOW // SECOND + 600}


def test_a_token_says_exactly_what_the_protocol_says() -> None:
    made = issue(A, B.id, 10 * MINUTES, peer_not_after=None, now=NOW)
    raw = made.text.split(".")[0]
    assert base64.urlsafe_b64decode(raw + "==") == b'{"alg":"ES256","typ":"JWT"}'
    assert part(made.text, 1) == GOOD
    assert list(part(made.text, 1)) == ["sub", "aud", "exp"]
    assert isinstance(part(made.text, 1)["exp"], int)
    assert len(base64.urlsafe_b64decode(made.text.split(".")[2] + "==")) == 64
    assert made.expires == NOW + 10 * MINUTES


def test_without_a_peer_certificate_there_is_no_audience() -> None:
    made = issue(A, None, MINUTES, peer_not_after=None, now=NOW)
    assert set(part(made.text, 1)) == {"sub", "exp"}


def test_a_token_ends_with_our_own_certificate() -> None:
    made = issue(A, B.id, 24 * 60 * MINUTES, peer_not_after=None, now=NOW)
    assert part(made.text, 1)["exp"] == A.not_after // SECOND
    assert made.expires == A.not_after


def test_only_the_expiry_beside_the_token_ends_with_the_peers_certificate() -> None:
    made = issue(A, B.id, 10 * MINUTES, peer_not_after=NOW + MINUTES, now=NOW)
    assert part(made.text, 1)["exp"] == NOW // SECOND + 600
    assert made.expires == NOW + MINUTES


def test_a_key_that_is_not_p256_makes_no_token() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    leaf = forge("spiffe://td.example/a", by=root(), key=key).cert
    with pytest.raises(InvalidError, match="P-256"):
        issue(Svid(A.id, (leaf,), key), None, MINUTES, peer_not_after=None, now=NOW)


def test_pyjwt_verifies_ours() -> None:
    now = time.time_ns()  # PyJWT asks the clock
    made = issue(A, B.id, 10 * MINUTES, peer_not_after=None, now=now)
    said = jwt.decode(made.text, A.key.public_key(), ["ES256"], audience=str(B.id))
    assert said == {**GOOD, "exp": now // SECOND + 600}
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(made.text, B.key.public_key(), ["ES256"], audience=str(B.id))


def test_we_verify_pyjwts() -> None:
    made = jwt.encode(GOOD, A.key, "ES256")
    assert signed_by(made, A.leaf)
    assert not signed_by(made, B.leaf)
    assert claims(made) == tokens.Claims(str(A.id), (str(B.id),), GOOD["exp"] * SECOND)
    assert signed_by(jwt.encode(GOOD, A.key, "ES256", headers={"kid": "x"}), A.leaf)


def test_a_verified_token_is_remembered_for_its_own_leaf_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = issue(A, B.id, MINUTES, peer_not_after=None, now=NOW).text
    assert signed_by(made, A.leaf)
    with monkeypatch.context() as patched:
        patched.setattr(tokens, "_parts", lambda _: pytest.fail("verified again"))
        assert signed_by(made, A.leaf)
    assert not signed_by(made, B.leaf)
    renewed = DOMAIN.issue(A.id)
    assert not signed_by(made, renewed.leaf)


def test_of_verified_tokens_only_the_latest_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = issue(A, B.id, MINUTES, peer_not_after=None, now=NOW).text
    assert signed_by(first, A.leaf)
    for n in range(128):
        assert signed_by(issue(A, B.id, MINUTES + n, peer_not_after=None, now=NOW).text, A.leaf)
    again: list[str] = []
    parts = tokens._parts
    monkeypatch.setattr(tokens, "_parts", lambda text: again.append(text) or parts(text))
    assert signed_by(first, A.leaf)
    assert again == [first]


def test_no_other_algorithm_is_taken() -> None:
    public = A.leaf.public_key()
    good = jwt.encode(GOOD, A.key, "ES256").split(".")
    assert not signed_by(jwt.encode(GOOD, None, "none"), A.leaf)
    assert not signed_by(token({"alg": "none"}, GOOD), A.leaf)
    assert not signed_by(token({"alg": "HS256"}, GOOD), A.leaf)
    assert not signed_by(token({"alg": "ES384"}, GOOD), A.leaf)
    assert not signed_by(token({"alg": ["ES256"]}, GOOD), A.leaf)
    assert not signed_by(token({"typ": "JWT"}, GOOD), A.leaf)
    assert not signed_by(token({"alg": "ES256", "crit": ["b64"]}, GOOD), A.leaf)
    hmac = jwt.encode(GOOD, str(public.public_numbers()).encode() * 2, "HS256")
    assert not signed_by(hmac, A.leaf)
    assert not signed_by(f"{good[0]}.{good[1]}.", A.leaf)


def test_a_changed_token_is_signed_by_nobody() -> None:
    made = issue(A, B.id, MINUTES, peer_not_after=None, now=NOW).text
    head, body, signature = made.split(".")
    other = jwt.encode({**GOOD, "sub": str(B.id)}, A.key, "ES256").split(".")[1]
    for changed in (
        f"{head}.{other}.{signature}",
        f"{head}.{body}.{signature[:-4]}",
        f"{head}.{body}.{signature}AAAA",
        f"{head}.{body}.{signature}.",
        f"{head}.{body}",
        f"{head}.{body}.{'A' * 86}",
        f" {made}",
        f"{made}\n",
        f"{made}é",
        made.replace(".", "..", 1),
    ):
        assert not signed_by(changed, A.leaf), changed


def test_a_leaf_whose_key_is_no_p256_key_signed_nothing() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    leaf = forge("spiffe://td.example/a", by=root(), key=key).cert
    assert not signed_by(jwt.encode(GOOD, A.key, "ES256"), leaf)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "a.b",
        "...",
        "a.b.c.d",
        "é.é.é",
        "e30.W10.AA",  # the payload is a list
        "W10.e30.AA",  # the header is a list
        "e30.e30=.AA",  # padded
        "e30.e3 0.AA",
        "e30." + base64.urlsafe_b64encode(b'{"exp": NaN}').decode().rstrip("=") + ".AA",
        "e30." + base64.urlsafe_b64encode(b'{"sub":"a","exp":1,"x":NaN}').decode() + ".AA",
        "e30." + base64.urlsafe_b64encode(b"[" * 5000).decode().rstrip("=") + ".AA",
        "e30." + base64.urlsafe_b64encode(b'{"exp":' + b"9" * 5000 + b"}").decode() + ".AA",
        "e30." + base64.urlsafe_b64encode(b'{"a":"\xff"}').decode().rstrip("=") + ".AA",
        "e30.e30." + "A" * tokens.MAX_TOKEN,
    ],
)
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(DeniedError):
        claims(text)
    assert not signed_by(text, A.leaf)


@pytest.mark.parametrize("exp", [None, "soon", True, -1, 1e300, 10**30, [1], {}])
def test_an_end_that_is_no_instant_is_refused(exp: Any) -> None:
    with pytest.raises(DeniedError, match="exp"):
        claims(token(HEADER, {**GOOD, "exp": exp}))


def test_a_subject_that_is_no_text_is_refused() -> None:
    with pytest.raises(DeniedError, match="sub"):
        claims(token(HEADER, {**GOOD, "sub": 7}))


@pytest.mark.parametrize("aud", ["spiffe://td.example/b", {"a": "b"}, 7, None, [7, {}]])
def test_an_audience_that_is_no_array_of_texts_is_nobody(aud: Any) -> None:
    assert claims(token(HEADER, {**GOOD, "aud": aud})).aud == ()


def test_a_token_of_the_longest_ids_can_be_read() -> None:
    longest = "spiffe://td.example/" + "a" * (2048 - 20)
    svid = DOMAIN.issue(SpiffeId.parse(longest))
    made = issue(svid, SpiffeId.parse(longest), MINUTES, peer_not_after=None, now=NOW)
    assert claims(made.text).sub == longest
    assert signed_by(made.text, svid.leaf)


def test_a_token_is_in_no_repr_and_no_error() -> None:
    made = issue(A, B.id, MINUTES, peer_not_after=None, now=NOW)
    secret = made.text.split(".")[1]
    assert secret not in f"{made!r} {made}"
    assert "PRIVATE" not in f"{A!r} {A}"
    for broken in (secret, f"x.{secret}.{secret}", f"e30.{secret[:-3]}!.AA", made.text * 40):
        with pytest.raises(DeniedError) as refused:
            claims(broken)
        assert secret[:20] not in "".join(traceback.format_exception(refused.value))


@given(st.integers(min_value=-62135596800 * SECOND, max_value=253402300799 * SECOND + 999999999))
def test_an_instant_reads_and_writes_the_same(instant: int) -> None:
    assert parse_instant(format_instant(instant)) == instant


@given(
    st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)),  # noqa: DTZ001 - zoned below
    st.integers(-23 * 60, 23 * 60),
)
def test_instants_mean_what_the_standard_library_says(day: datetime, zone: int) -> None:
    sign, hours, minutes = "-" if zone < 0 else "+", *divmod(abs(zone), 60)
    text = f"{day.isoformat(timespec='microseconds')}{sign}{hours:02d}:{minutes:02d}"
    expected = datetime.fromisoformat(text) - datetime(1970, 1, 1, tzinfo=UTC)
    micros = (expected.days * 86400 + expected.seconds) * 10**6 + expected.microseconds
    assert parse_instant(text) == micros * 1000


def test_nine_digits_and_a_zone_are_read() -> None:
    assert parse_instant("2026-04-07T10:14:14.123456789+02:00") == 1775549654123456789
    assert parse_instant("2026-04-07T08:14:14Z") == 1775549654 * SECOND
    assert parse_instant("2026-04-07t08:14:14.5z") == 1775549654 * SECOND + SECOND // 2
    assert format_instant(1790000000123456789) == "2026-09-21T14:13:20.123456789Z"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "2026-04-07",
        "2026-04-07T10:14:14",
        "2026-04-07 10:14:14Z",
        "2026-04-07T10:14:14.Z",
        "2026-04-07T10:14:14.1234567890Z",
        "2026-13-07T10:14:14Z",
        "2026-02-30T10:14:14Z",
        "2026-04-07T24:14:14Z",
        "2026-04-07T10:14:60Z",
        "2026-04-07T10:14:14+24:00",
        "2026-04-07T10:14:14+02:60",
        "2026-04-07T10:14:14+0200",
        "0000-04-07T10:14:14Z",
        "٢026-04-07T10:14:14Z",
        "2026-04-07T10:14:14Z" + " " * 100,
        "9" * 10000,
    ],
)
def test_what_is_no_instant_is_refused(text: str) -> None:
    with pytest.raises(InvalidError):
        parse_instant(text)


def test_an_instant_beyond_the_calendar_is_refused() -> None:
    with pytest.raises(InvalidError):
        format_instant(10**30)
