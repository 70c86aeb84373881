"""SPIFFE ids are parsed strictly: one spelling, no second meaning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm.errors import InvalidError
from nsm.identity.spiffe import SpiffeId


@pytest.mark.parametrize(
    "text",
    [
        "spiffe://td/a",
        "spiffe://td",
        "spiffe://td.example-1_x/ns/a/pod/nsc-7f.9_Z",
        "spiffe://1.2.3.4/...",
        "spiffe://" + "a" * 255 + "/b",
        "spiffe://td/" + "a" * (2048 - 12),
    ],
)
def test_an_id_reads_and_writes_the_same(text: str) -> None:
    assert str(SpiffeId.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "td/a",
        "http://td/a",
        "Spiffe://td/a",
        "spiffe:/td/a",
        "spiffe://",
        "spiffe:///a",
        "spiffe://TD/a",
        "spiffe://td:443/a",
        "spiffe://user@td/a",
        "spiffe://td%41/a",
        "spiffe://tdé/a",
        "spiffe://td/",
        "spiffe://td/a/",
        "spiffe://td//a",
        "spiffe://td/./a",
        "spiffe://td/../a",
        "spiffe://td/a/..",
        "spiffe://td/a%2Fb",
        "spiffe://td/a?q=1",
        "spiffe://td/a#f",
        "spiffe://td/a b",
        "spiffe://td/a\n",
        "spiffe://td\n",
        "spiffe://td/é",
        "spiffe://td/a\0",
        "spiffe://" + "a" * 256 + "/b",
        "spiffe://td/" + "a" * (2049 - 12),
        " spiffe://td/a",
    ],
)
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidError):
        SpiffeId.parse(text)


@given(st.text(alphabet="spiffe:/td.-_%?#@ \n\0é", max_size=40))
def test_whatever_parses_is_written_back_exactly(text: str) -> None:
    for candidate in (text, f"spiffe://{text}", f"spiffe://td/{text}"):
        try:
            parsed = SpiffeId.parse(candidate)
        except InvalidError:
            continue
        assert str(parsed) == candidate


def test_an_id_cannot_be_made_past_the_parser() -> None:
    with pytest.raises(InvalidError):
        SpiffeId("td", "/a?b")
    with pytest.raises(InvalidError):
        SpiffeId("td", "a")
