"""The five token rules, in sentences of their own and against upstream's verdicts."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from nsm.identity import rules
from nsm.identity.authority import Authority
from nsm.identity.source import Handshake, Svid
from nsm.identity.spiffe import SpiffeId
from nsm.identity.tokens import issue

SECOND = 10**9
NOW = time.time_ns()
DATA = json.loads((Path(__file__).parents[2] / "data" / "token-rules.json").read_text())
DOMAIN = Authority.create("td.example")
SVIDS = {name: DOMAIN.issue(SpiffeId.parse(f"spiffe://td.example/{name}")) for name in "amfe"}


def token(pair: str, *, ago: int = 0) -> str:
    """What the first letter says to the second."""
    own, peer = (SVIDS[name] for name in pair)
    return issue(own, peer.id, 600 * SECOND, peer_not_after=None, now=NOW - ago * SECOND).text


def path(*pairs: str) -> list[str]:
    return [token(pair) for pair in pairs]


def leaf(name: str) -> x509.Certificate:
    return SVIDS[name].leaf


WHOLE = path("am", "mf", "fe", "ef")  # as a local request's reply comes back


def test_a_path_as_the_protocol_makes_it_passes() -> None:
    assert rules.tokens_valid(WHOLE) is None
    assert rules.tokens_expired(WHOLE, NOW) is None
    assert rules.tokens_chained(WHOLE) is None
    assert rules.prev_token_signed(WHOLE, 1, leaf("a")) is None
    assert rules.next_token_signed(WHOLE, 0, leaf("m")) is None
    assert rules.next_token_signed(WHOLE, 2, leaf("e")) is None


def test_no_segments_are_valid_and_prove_nothing() -> None:
    assert rules.tokens_valid([]) is None
    assert rules.tokens_expired([], NOW) is None
    assert rules.tokens_chained([]) is None
    assert "no segment before" in str(rules.prev_token_signed([], 0, leaf("a")))
    assert "no segment 1" in str(rules.next_token_signed([], 0, leaf("a")))


def test_one_segment_is_chained_to_nothing_whatever_it_says() -> None:
    assert rules.tokens_chained(["nonsense"]) is None
    assert rules.tokens_chained([""]) is None


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (rules.tokens_valid, "path segment 1 of 3: it has no token"),
        (lambda t: rules.tokens_expired(t, NOW), "path segment 1 of 3: it has no token"),
        (rules.tokens_chained, "path segment 1 of 3: it has no token"),
    ],
)
def test_a_missing_token_is_named(rule: Callable[[Sequence[str]], str | None], words: str) -> None:
    assert rule([WHOLE[0], "", WHOLE[2]]) == words


def test_an_expired_token_is_named_with_both_times() -> None:
    why = rules.tokens_expired([WHOLE[0], token("mf", ago=700)], NOW)
    assert why is not None
    assert why.startswith("path segment 1 of 2: its token expired at 20")
    assert "here it is 20" in why


def test_a_token_is_expired_at_the_very_instant_of_its_end() -> None:
    end = (NOW // SECOND + 600) * SECOND
    assert rules.tokens_expired(WHOLE, end - 1) is None
    assert rules.tokens_expired(WHOLE, end) is not None


def test_a_broken_chain_names_both_sides() -> None:
    assert rules.tokens_chained(path("am", "fe")) == (
        "path segment 0 of 2: its token is meant for spiffe://td.example/m, "
        "and the next segment's is of spiffe://td.example/f"
    )


@pytest.mark.parametrize(("index", "who"), [(1, "m"), (2, "a"), (3, "e"), (1, None)])
def test_the_previous_token_must_be_the_tls_peers(index: int, who: str | None) -> None:
    assert rules.prev_token_signed(WHOLE, index, leaf(who) if who else None)


@pytest.mark.parametrize(("index", "who"), [(0, "a"), (1, "m"), (3, "e"), (-1, "e"), (0, None)])
def test_the_next_token_must_be_the_tls_peers(index: int, who: str | None) -> None:
    assert rules.next_token_signed(WHOLE, index, leaf(who) if who else None)


@pytest.mark.parametrize("index", [0, -1, 5, 2**31])
def test_an_index_outside_the_path_proves_nothing(index: int) -> None:
    assert rules.prev_token_signed(WHOLE, index, leaf("a"))


def test_no_refusal_shows_a_token() -> None:
    bad = [*path("am", "fe"), token("mf", ago=700), "x.y.z"]
    said = [
        rules.tokens_valid(bad),
        rules.tokens_expired(bad, NOW),
        rules.tokens_chained(bad),
        rules.prev_token_signed(bad, 1, leaf("e")),
        rules.next_token_signed(bad, 0, leaf("e")),
    ]
    assert all(said)
    for text in bad:
        for piece in text.split("."):
            assert len(piece) < 5 or not any(piece in str(why) for why in said)


def met(own: str, peer: str) -> Handshake:
    return Handshake(SVIDS[own], SVIDS[peer].id, SVIDS[peer].leaf, SVIDS[peer].not_after)


def test_the_previous_token_says_what_the_callers_certificate_says() -> None:
    assert rules.proven_by_caller(WHOLE[:2], 1, met("m", "a")) is None
    assert "not signed" in str(rules.proven_by_caller(WHOLE[:2], 1, met("m", "f")))
    liar = Svid(SVIDS["a"].id, SVIDS["e"].chain, SVIDS["e"].key)  # e says it is a
    lie = issue(liar, SVIDS["m"].id, 600 * SECOND, peer_not_after=None, now=NOW).text
    assert rules.prev_token_signed([lie, WHOLE[1]], 1, leaf("e")) is None
    assert rules.proven_by_caller([lie, WHOLE[1]], 1, met("m", "e")) == (
        "its token says it is spiffe://td.example/a, and its certificate spiffe://td.example/e"
    )


def test_over_a_border_nobody_speaks_for_another_trust_domain() -> None:
    here = Authority.create("here.example").issue(SpiffeId.parse("spiffe://here.example/m"))
    shown = Handshake(here, SVIDS["f"].id, leaf("f"), SVIDS["f"].not_after)
    assert rules.inside_border(path("am", "mf"), 2, shown) is None
    ours = issue(here, SVIDS["m"].id, 600 * SECOND, peer_not_after=None, now=NOW).text
    assert rules.inside_border([ours, *path("mf")], 2, shown) == (
        "path segment 0 of 2: its token is of spiffe://here.example/m, for whom nobody of"
        " the trust domain td.example may speak"
    )
    for forged in ("", "x.y.z", "spiffe://td.example.evil/x"):
        assert rules.inside_border([forged, *path("mf")], 2, shown)
    # What lies at or behind us is ours to say, and in one domain each vouches for its left.
    assert rules.inside_border([*path("am"), ours], 1, shown) is None
    assert rules.inside_border([ours, ours], 2, met("m", "a")) is None


# Upstream's policies compare whatever JSON holds; the protocol says strings, and an object.
STRICTER = {"payload a list", "sub a number"}


def verdict(rule: str, tokens: list[str], index: int, peer: x509.Certificate | None) -> bool:
    check: Any = getattr(rules, rule)
    arguments: tuple[Any, ...] = (tokens,)
    if rule == "tokens_expired":
        arguments += (DATA["now"],)
    elif rule.endswith("signed"):
        arguments += (index, peer)
    return check(*arguments) is None


def test_every_verdict_is_upstreams() -> None:
    leaves = {n: x509.load_pem_x509_certificate(pem.encode()) for n, pem in DATA["leaves"].items()}
    yes = dict.fromkeys(DATA["rules"], 0)
    for case in DATA["cases"]:
        numbers, index, peer, upstream = case.split("|")
        named = [DATA["tokens"][int(number)] for number in numbers.split()]
        for rule, digit in zip(DATA["rules"], upstream, strict=True):
            ours = verdict(rule, [text for _, text in named], int(index), leaves.get(peer))
            names = [name for name, _ in named]
            if STRICTER.intersection(names) and not ours:
                continue
            assert ours is (digit == "1"), (rule, names, index, peer)
            yes[rule] += ours
    assert min(yes.values()) >= 50, f"the table says too little: {yes}"
    assert len(DATA["cases"]) > 2000
