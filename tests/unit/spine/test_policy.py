"""Who may request and close, where upstream's five rules would let somebody else in."""

import time
from dataclasses import replace

import pytest

from nsm import policy
from nsm.caller import Caller
from nsm.connections import Held
from nsm.errors import DeniedError
from nsm.identity import tokens
from nsm.identity.source import Handshake, Svid
from nsm.identity.spiffe import SpiffeId
from nsm.model import SECOND, Connection, Path, Segment
from tests.support.certs import Authority

LIFETIME = 600 * SECOND
TOKENS = policy.Tokens(LIFETIME)
VICTIM = SpiffeId("td", "/victim")


def minted(of: Svid, to: SpiffeId) -> tokens.Token:
    return tokens.issue(of, to, LIFETIME, peer_not_after=None, now=time.time_ns())


def call(peer: Svid, own: Svid, says: SpiffeId | None = None) -> Caller:
    """A call over peer's certificate, with a token of peer's key for the id it says it is."""
    token = minted(replace(peer, id=says or peer.id), own.id)
    shown = Handshake(own, peer.id, peer.leaf, peer.not_after)
    return Caller(shown, token=token.text, token_expires=token.expires)


def entered(*before: Segment) -> Connection:
    """A connection as it has just stepped onto us, with these segments to our left."""
    segments = (*before, Segment("us", "us-0"))
    return Connection("us-0", "vpn", path=Path(segments, len(before)))


def judged(conn: Connection, caller: Caller, held: Held[None] | None = None) -> None:
    """Raise if conn is refused, as a Close if held is given."""
    conn = TOKENS.vouch(conn, caller)
    if held is None:
        TOKENS.admit(conn, caller)
    else:
        TOKENS.admit_close(conn, caller, held)


def test_nobody_requests_or_closes_in_anothers_name(mesh):
    own, evil = mesh.svid("us"), mesh.svid("evil")
    conn = entered(Segment("nsc", "c0"))
    held = Held("us-0", made=conn, previous=evil.id)
    judged(conn, call(evil, own))
    judged(conn, call(evil, own), held)
    for closing in (None, held):
        with pytest.raises(DeniedError) as refused:
            judged(conn, call(evil, own, says=VICTIM), closing)
        assert "its token says it is spiffe://td/victim, and its certificate" in str(refused.value)
        assert str(refused.value).endswith("no sufficient privileges")


def test_a_manager_of_another_trust_domain_speaks_for_no_workload_of_ours(mesh):
    own, far = mesh.svid("us"), Authority("far")
    manager = far.svid("/nsmgr")

    def through(workload: Svid) -> Connection:
        token = minted(workload, manager.id)
        return entered(Segment("nsc", "c0", token.text, token.expires), Segment("mgr", "m0"))

    judged(through(far.svid("/nsc")), call(manager, own))
    with pytest.raises(DeniedError, match="its token is of spiffe://td/nsc, for whom nobody"):
        judged(through(mesh.svid("nsc")), call(manager, own))


def test_what_a_replaced_manager_takes_over_is_what_its_client_calls_by_the_same_id(mesh):
    nsc, old, new = mesh.svid("nsc"), mesh.svid("old"), mesh.svid("new")

    def through(manager: Svid, client_id: str) -> Connection:
        token = minted(nsc, manager.id)
        first = Segment("nsc", client_id, token.text, token.expires)
        return entered(first, Segment("mgr", "m0"))

    held = Held("us-0", made=through(old, "c0"), previous=old.id, origin=str(nsc.id))
    caller = call(new, mesh.svid("us"))
    policy.same_owner(held, through(new, "c0"), caller)
    with pytest.raises(DeniedError, match="was asked for by spiffe://td/old"):
        policy.same_owner(held, through(new, "c1"), caller)


def test_at_a_managers_door_a_workload_asks_for_itself_whatever_path_it_brings(mesh):
    liar, own = mesh.svid("liar"), mesh.svid("us")
    invented = minted(mesh.svid("nobody"), liar.id)
    conn = entered(Segment("x", "x0", invented.text, invented.expires), Segment("liar", "l0"))
    judged(conn, call(liar, own))  # nothing is wrong with such a path
    me = str(liar.id)
    by_unix, by_tcp = replace(call(liar, own), unix=True), call(liar, own)
    assert policy.whose(conn, by_unix, door=True) == (me, me)
    behind = (me, "spiffe://td/nobody")
    assert policy.whose(conn, by_unix) == behind, "a manager asks a forwarder for its workloads"
    assert policy.whose(conn, by_tcp, door=True) == behind, "and a forwarder a far manager"
    assert policy.whose(entered(Segment("liar", "l0")), by_tcp, door=True) == (me, me)


def test_a_caller_vouches_no_longer_than_its_token_and_its_certificate_hold(mesh):
    nsc, own = mesh.svid("nsc"), mesh.svid("us")
    honest = call(nsc, own)

    def ends(caller: Caller) -> int:
        return TOKENS.vouch(entered(Segment("nsc", "c0")), caller).segments[0].expires

    assert ends(honest) == honest.token_expires
    year_9999 = 253402300799 * SECOND
    claim = tokens.claims(honest.token).exp
    assert ends(replace(honest, token_expires=year_9999)) == claim + SECOND
    forever = tokens.issue(
        replace(nsc, chain=own.chain), own.id, year_9999, peer_not_after=None, now=time.time_ns()
    )
    short = replace(honest.handshake, peer_not_after=claim - 60 * SECOND)
    lasting = Caller(short, token=forever.text, token_expires=year_9999)
    assert ends(lasting) == claim - 60 * SECOND


def test_a_token_that_cannot_be_read_is_refused_in_upstreams_words(mesh):
    caller = replace(call(mesh.svid("nsc"), mesh.svid("us")), token="x.y.z")
    with pytest.raises(DeniedError, match=r"base64url: no sufficient privileges$"):
        judged(entered(Segment("nsc", "c0")), caller)


def test_whoever_met_us_under_an_older_certificate_is_answered_under_that_one(mesh):
    older, newer = mesh.svid("us"), mesh.authority.svid("/us")
    client, further = mesh.svid("nsc"), mesh.svid("next")
    onward = minted(newer, further.id)  # what the next hop was shown, and put on our segment
    segments = (
        Segment("nsc", "c0", minted(client, older.id).text),
        Segment("us", "us-0", onward.text, onward.expires),
        Segment("next", "n0", minted(further, newer.id).text),
    )
    conn = Connection("c0", "vpn", path=Path(segments, 0))
    shown = Handshake(client, older.id, older.leaf, older.not_after)
    with pytest.raises(DeniedError, match="not signed"):
        policy.admit_reply(conn, shown)
    answered = TOKENS.answered(conn, call(client, older), "us")
    assert answered.segments[1].expires <= onward.expires
    with pytest.raises(DeniedError, match=r"td/other"):  # as far as it is chained
        policy.admit_reply(
            TOKENS.answered(
                _with(conn, minted(newer, mesh.svid("other").id).text), call(client, older), "us"
            ),
            shown,
        )
    policy.admit_reply(answered, shown)
    assert TOKENS.answered(conn, call(client, newer), "us") == conn
    assert TOKENS.answered(conn, call(client, older), "nobody") == conn
    assert (
        TOKENS.answered(_with(conn, "garbage"), call(client, older), "us").segments[1].token
        == "garbage"
    )
    stranger = _with(conn, minted(further, further.id).text)
    assert TOKENS.answered(stranger, call(client, older), "us") == stranger


def _with(conn: Connection, token: str) -> Connection:
    first, own, after = conn.segments
    return replace(conn, path=Path((first, replace(own, token=token), after), 0))
