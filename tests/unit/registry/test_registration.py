"""The path a registration comes over: its JSON, its steps, and what it proves."""

import json
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from nsm import registration
from nsm.caller import Caller
from nsm.errors import DeniedError, ExhaustedError, InvalidError
from nsm.identity import tokens
from nsm.identity.authority import Authority
from nsm.identity.source import Handshake, Svid
from nsm.identity.spiffe import SpiffeId
from nsm.limits import Bounds, Places
from nsm.model import SECOND
from nsm.registration import SERVER_POLICIES, RegistrationPath
from nsm.rpc.registry_services import Gate

TD = Authority.create("td")
MINUTE = 60 * SECOND


def svid(name: str) -> Svid:
    return TD.issue(SpiffeId("td", f"/{name}"))


E, M, R, X = (svid(name) for name in ("nse", "nsmgr", "registry", "stranger"))


def token(of: Svid, for_: Svid, *, lifetime: int = MINUTE) -> str:
    now = time.time_ns()
    return tokens.issue(of, for_.id, lifetime, peer_not_after=None, now=now).text


def met(own: Svid, peer: Svid) -> Handshake:
    return Handshake(own, peer.id, peer.leaf, peer.not_after)


def refusal(path: RegistrationPath, own: Svid, peer: Svid) -> str | None:
    return registration.refusal(path, met(own, peer), time.time_ns(), SERVER_POLICIES)


def test_the_empty_path_reads_and_writes_as_upstream_writes_it() -> None:
    text = '{"Index":0,"PathSegments":null}'
    assert registration.parse(text) == RegistrationPath()
    assert registration.write(RegistrationPath()) == text


def test_a_path_reads_and_writes_as_upstream_writes_it() -> None:
    text = '{"Index":1,"PathSegments":[{"token":"a.b.c"},{"token":""}]}'
    assert registration.parse(text) == RegistrationPath(("a.b.c", ""), 1)
    assert registration.write(registration.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        '{"Index":-1}',
        '{"Index":true}',
        '{"Index":"0"}',
        '{"Index":1.0}',
        f'{{"Index":{2**32}}}',
        '{"PathSegments":{}}',
        '{"PathSegments":[7]}',
        '{"PathSegments":[{"token":7}]}',
        '{"PathSegments":[' + ",".join(["{}"] * 33) + "]}",
        '{"x":' * 20_000,
        '"' + "x" * 100_000 + '"',
    ],
)
def test_anything_else_is_refused_without_quoting_it(text: str) -> None:
    with pytest.raises(InvalidError) as refused:
        registration.parse(text)
    assert "path metadata" in str(refused.value)
    assert len(str(refused.value)) < 300


def test_no_token_stands_in_a_paths_repr() -> None:
    assert "secret" not in repr(RegistrationPath(("secret",), 0))


def test_a_registration_walks_from_endpoint_to_registry_and_back() -> None:
    at_m = registration.enter(RegistrationPath(), "E>M", "M>E")
    assert at_m == RegistrationPath(("E>M", "M>E"), 1)
    at_r = registration.enter(at_m, "M>R", "R>M")
    assert at_r == RegistrationPath(("E>M", "M>R", "R>M"), 2)
    back_at_m = registration.leave(registration.trim(at_r))
    assert back_at_m == RegistrationPath(("E>M", "M>R", "R>M"), 1)
    back_at_e = registration.leave(back_at_m)
    assert back_at_e == RegistrationPath(("E>M", "M>R", "R>M"), 0)
    # The refresh replaces what each hop is answerable for, and leaves the rest.
    at_m = registration.enter(back_at_e, "E>M 2", "M>E 2")
    assert at_m == RegistrationPath(("E>M 2", "M>E 2", "R>M"), 1)
    at_r = registration.enter(at_m, "M>R 2", "R>M 2")
    assert at_r == RegistrationPath(("E>M 2", "M>R 2", "R>M 2"), 2)


def test_where_a_path_ends_nothing_stale_hangs_on() -> None:
    entered = registration.enter(RegistrationPath(("a", "b", "c", "d"), 0), "a2", "b2")
    assert registration.trim(entered) == RegistrationPath(("a2", "b2"), 1)


def test_an_index_past_the_end_is_refused_in_upstreams_words() -> None:
    with pytest.raises(InvalidError) as refused:
        registration.enter(RegistrationPath(("a",), 1), "x", "y")
    assert "Path.Index+1==2 should be less or equal len(Path.PathSegments)==1" in str(refused.value)


def test_path_ids_are_proven_up_to_here_and_given_beyond() -> None:
    assert registration.path_ids((), ("E", "M")) == ("E", "M")
    assert registration.path_ids(("x", "y", "R"), ("E", "M")) == ("E", "M", "R")


def honest() -> RegistrationPath:
    """As it stands in the registry: E registered through M."""
    return RegistrationPath((token(E, M), token(M, R), token(R, M)), 2)


def test_an_honest_path_passes_and_names_everybody_on_it() -> None:
    assert refusal(honest(), R, M) is None
    assert registration.left_ids(honest(), met(R, M)) == (str(E.id), str(M.id), str(R.id))


def test_stale_tokens_to_the_right_do_not_matter() -> None:
    path = honest()
    assert refusal(replace(path, tokens=(*path.tokens, "stale")), R, M) is None


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (lambda: "", "it has no token"),
        (lambda: "garbage", "no JWT"),
        (lambda: token(M, R, lifetime=-MINUTE), "expired"),
        (lambda: token(M, X), "meant for"),
        (lambda: token(X, R), "not signed"),
    ],
    ids=["missing", "garbage", "expired", "for somebody else", "replayed"],
)
def test_a_path_that_proves_nothing_is_refused(first: Callable[[], str], why: str) -> None:
    assert why in (refusal(RegistrationPath((first(), token(R, M)), 1), R, M) or "")


def test_a_token_signed_with_the_right_key_for_anothers_name_is_refused() -> None:
    forged = Svid(E.id, X.chain, X.key)  # X says it is E, and signs with its own key
    reason = refusal(RegistrationPath((token(forged, R), token(R, X)), 1), R, X)
    assert reason == f"its token says it is {E.id}, and its certificate {X.id}"


def test_nobody_registers_in_the_name_of_somebody_of_another_trust_domain() -> None:
    far = Authority.create("far")
    manager, workload = (far.issue(SpiffeId("far", path)) for path in ("/nsmgr", "/nse"))
    theirs = RegistrationPath((token(workload, manager), token(manager, R), token(R, manager)), 2)
    assert refusal(theirs, R, manager) is None
    ours = RegistrationPath((token(E, manager), token(manager, R), token(R, manager)), 2)
    assert refusal(ours, R, manager) == (
        "path segment 0 of 3: its token is of spiffe://td/nse, for whom nobody of the"
        " trust domain far may speak"
    )


def test_a_policy_that_is_off_is_not_asked() -> None:
    path = RegistrationPath((token(M, R, lifetime=-MINUTE), token(R, M)), 1)
    some = SERVER_POLICIES - {registration.TOKENS_EXPIRED}
    assert registration.refusal(path, met(R, M), time.time_ns(), some) is None


def test_a_client_takes_an_answer_that_proves_itself() -> None:
    now = time.time_ns()
    back = RegistrationPath((token(E, M), token(M, R), token(R, M)), 0)
    # M's own token was replaced by the one it sent on, which its certificate signed as well
    registration.admit_reply(back, met(E, M), now, "endpoint 'nse'")
    with pytest.raises(DeniedError) as refused:
        registration.admit_reply(back, met(E, X), now, "endpoint 'nse'")
    assert str(refused.value).endswith("no sufficient privileges")
    with pytest.raises(DeniedError) as refused:
        registration.admit_reply(RegistrationPath(), met(E, M), now, "endpoint 'nse'")
    assert "endpoint 'nse'" in str(refused.value)


def test_whoever_met_us_under_an_older_certificate_is_answered_under_that_one() -> None:
    newer = TD.issue(M.id)
    back = RegistrationPath((token(E, M), token(newer, R), token(R, newer)), 1)
    with pytest.raises(DeniedError, match="not signed"):
        registration.admit_reply(registration.leave(back), met(E, M), time.time_ns(), "nse")
    answer = registration.answered(back, met(M, E), MINUTE, time.time_ns())
    registration.admit_reply(registration.leave(answer), met(E, M), time.time_ns(), "nse")
    assert tokens.claims(answer.tokens[1]).exp <= tokens.claims(back.tokens[1]).exp
    assert registration.answered(back, met(newer, E), MINUTE, time.time_ns()) == back
    for other in ("garbage", token(X, R)):
        path = replace(back, tokens=(back.tokens[0], other, back.tokens[2]))
        assert registration.answered(path, met(M, E), MINUTE, time.time_ns()) == path
    assert registration.answered(RegistrationPath(), met(M, E), MINUTE, 0) == RegistrationPath()


async def test_a_gate_answers_whoever_met_it_under_an_older_certificate() -> None:
    newer = TD.issue(M.id)
    gate = Gate(MINUTE, SERVER_POLICIES, 1 << 16, Places("m"), door=False)
    empty = {registration.PATH: registration.write(RegistrationPath())}
    by = gate.enter(Caller(met(M, E), token(E, M), metadata=empty), "nse")
    back = replace(by.path, tokens=(by.path.tokens[0], token(newer, R), token(R, newer)))
    answer = gate.answered(back, by)
    registration.admit_reply(registration.leave(answer), met(E, M), time.time_ns(), "nse")


def test_the_json_is_compact_because_headers_are_bounded() -> None:
    path = RegistrationPath(tuple("x" * 700 for _ in range(8)), 3)
    text = registration.write(path)
    assert len(text) < 8 * 720
    assert json.loads(text)["Index"] == 3


async def test_at_a_managers_door_who_registers_takes_its_own_place_whatever_owner_it_names():
    def by(owner: str, *, unix: bool) -> registration.Registration:
        caller = Caller(met(M, X), unix=unix)
        return registration.Registration(caller, RegistrationPath(), (owner, str(X.id)), 0)

    def gate(*, door: bool) -> Gate:
        return Gate(MINUTE, SERVER_POLICIES, 1024, Places("nsmgr", Bounds(8, 1)), door=door)

    named = [f"spiffe://td/invented-{n}" for n in range(2)]
    for door, unix in ((True, False), (False, True)):
        one = gate(door=door)
        async with one.place(by(named[0], unix=unix)), one.place(by(named[1], unix=unix)):
            pass
    one = gate(door=True)
    async with one.place(by(named[0], unix=True)):
        with pytest.raises(ExhaustedError, match="spiffe://td/stranger has 1 requests under way"):
            async with one.place(by(named[1], unix=True)):
                pass
