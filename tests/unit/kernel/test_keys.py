"""Keys are what `wg pubkey` makes of the same bytes, and nothing shows a private one unasked."""

import base64
import copy
import pickle
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm.errors import InvalidError
from nsm.kernel.keys import Key, check_public

pytestmark = pytest.mark.unit

SECRET = bytes(range(32))
PUBLIC = "j0DFrbaPJWJK5bIU6nZ6bslNgp09e14a0bpvPiE4KF8="  # said wg pubkey


def test_the_public_key_is_the_one_wg_says() -> None:
    assert Key(SECRET).public == PUBLIC
    assert check_public(PUBLIC, "somebody's key") == PUBLIC


@given(st.binary(min_size=32, max_size=32).filter(any))
def test_what_is_stored_and_read_back_is_the_same_key(raw: bytes) -> None:
    key = Key(raw)
    assert Key(key.secret) == key
    assert Key(key.secret).secret == key.secret
    assert hash(Key(key.secret)) == hash(key)
    assert Key(key.secret).public == key.public


def test_what_is_stored_is_clamped_so_that_it_is_read_back_as_it_was() -> None:
    stored = bytes([0xF8]) + b"\xff" * 30 + bytes([0x7F])  # says wg show private-key
    assert Key(b"\xff" * 32).secret == stored
    assert Key(bytes([1, *bytes(31)])) == Key(bytes([0, *bytes(30), 0x40]))


def test_no_two_are_drawn_alike() -> None:
    drawn = {Key.generate() for _ in range(50)}
    assert len({key.public for key in drawn}) == 50


def test_a_private_key_is_shown_by_nothing_and_not_copied_out() -> None:
    key = Key(SECRET)
    said = "".join(traceback.format_exception(ValueError(key))) + f"{key} {key!r} {[key]}"
    for form in (key.secret.hex(), base64.b64encode(key.secret).decode(), repr(key.secret)[2:-1]):
        assert form not in said
    for write in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="not written down"):
            write(key)


@pytest.mark.parametrize("raw", [b"", b"\1" * 31, b"\1" * 33, bytes(32)])
def test_what_is_no_private_key_is_refused_and_not_shown(raw: bytes) -> None:
    with pytest.raises(InvalidError, match="a WireGuard private key is 32 bytes") as refused:
        Key(raw)
    assert "01" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        PUBLIC[:-1],
        PUBLIC + "A",
        PUBLIC + "\n",
        " " + PUBLIC,
        PUBLIC.replace("j", "é"),
        base64.b64encode(bytes(32)).decode(),
        base64.b64encode(b"\1" * 31).decode(),
        "A" * 10_000,
    ],
)
def test_what_is_no_public_key_is_refused_with_whose_it_is(text: str) -> None:
    with pytest.raises(InvalidError, match=r"the far end's key .* is not a WireGuard") as refused:
        check_public(text, "the far end's key")
    assert len(str(refused.value)) < 300


def test_a_public_key_is_always_written_alike() -> None:
    loose = PUBLIC[:-2] + "9="  # the last two bits say nothing
    assert base64.b64decode(loose) == base64.b64decode(PUBLIC)
    assert check_public(loose, "x") == PUBLIC
