"""Who may request and close: tokens put in place, then judged (`wire.md` §4.3, §4.4).

Upstream's five token rules live in `nsm.identity.rules`; here they are applied
where upstream applies them, to a connection that has just been entered. One
rule more is here: a connection belongs to the hop that asked for it first, so
that a guessed id opens nobody's wire.
"""

import time
from typing import Any

from nsm.caller import Caller
from nsm.connections import Held
from nsm.errors import REFUSED, DeniedError, InvalidError
from nsm.identity import rules, tokens
from nsm.identity.source import Handshake
from nsm.identity.spiffe import SpiffeId
from nsm.model import SECOND, Connection
from nsm.path import stamp


class Tokens:
    """Issues this hop's tokens and judges those that come; lifetime in nanoseconds."""

    def __init__(self, lifetime: int) -> None:
        self.lifetime = lifetime

    def vouch(self, conn: Connection, caller: Caller) -> Connection:
        """Put the caller's token on its segment and one of our own on ours.

        Both belong to the TLS connection the call came on. A caller without a
        token keeps what the body says; `admit` will say what that is worth. Raises
        DeniedError for a token that cannot be read.
        """
        if conn.index > 0 and caller.token and caller.token_expires is not None:
            conn = stamp(conn, conn.index - 1, caller.token, _ends(conn, caller))
        shown = caller.handshake
        own = tokens.issue(
            shown.own,
            shown.peer_id,
            self.lifetime,
            peer_not_after=shown.peer_not_after,
            now=time.time_ns(),
        )
        return stamp(conn, conn.index, own.text, own.expires)

    def answered(self, conn: Connection, caller: Caller, name: str) -> Connection:
        """The answer as the caller can prove it: conn at the caller's segment, ours (name) after.

        The next hop has put on our segment what we showed it, by our newest certificate. The
        caller may have met us under the one before: until its connection ends, what it
        gets is signed by that one, or it would refuse every answer.
        """
        here = conn.index + 1
        if here >= len(conn.segments) or conn.segments[here].name != name:
            return conn
        own, shown = conn.segments[here], caller.handshake.own
        if tokens.signed_by(own.token, shown.leaf):
            return conn
        try:
            said = tokens.claims(own.token)
            audience = SpiffeId.parse(said.aud[0])
        except (DeniedError, InvalidError, IndexError):
            return conn  # nothing of ours
        if said.sub != str(shown.id):
            return conn
        anew = tokens.issue(
            shown, audience, self.lifetime, peer_not_after=own.expires, now=time.time_ns()
        )
        return stamp(conn, here, anew.text, anew.expires)

    def admit(self, conn: Connection, caller: Caller) -> None:
        """Refuse a request whose left part does not prove itself.

        Raises DeniedError: its text ends in upstream's words.
        """
        left = [segment.token for segment in conn.segments[: conn.index + 1]]
        reason = (
            rules.tokens_valid(left)
            or rules.tokens_expired(left, time.time_ns())
            or rules.tokens_chained(left)
            or rules.proven_by_caller(left, conn.index, caller.handshake)
            or rules.inside_border(left, conn.index, caller.handshake)
        )
        if reason:
            raise _denied(conn, caller, reason)

    def admit_close(self, conn: Connection, caller: Caller, held: Held[Any] | None) -> None:
        """Like admit, but the recorded previous hop needs only a fresh token of its own.

        Tokens further left may be stale by the time something is closed, and a
        wire that cannot be closed is worse than one closed by its own neighbour.
        """
        if held is None or held.previous != caller.handshake.peer_id:
            self.admit(conn, caller)
            return
        last = [segment.token for segment in conn.segments[: conn.index + 1]]
        reason = rules.tokens_expired(last[-2:], time.time_ns()) or rules.proven_by_caller(
            last, conn.index, caller.handshake
        )
        if reason:
            raise _denied(conn, caller, reason)


def origin(conn: Connection) -> str:
    """The SPIFFE id the first segment's token names; empty if it names none."""
    try:
        return tokens.claims(conn.segments[0].token).sub
    except (DeniedError, IndexError):
        return ""


def whose(conn: Connection, caller: Caller, *, door: bool = False) -> tuple[str, str]:
    """Who asks, and for whom: whose place a request takes among others (`nsm.limits`).

    Where the path begins is the caller's word: of its segments only its own is proven. At a
    door (door) who comes over the unix socket is a workload of this node, and asks for itself
    whatever path it brings.
    """
    peer = str(caller.handshake.peer_id)
    return peer, peer if conn.index < 2 or (door and caller.unix) else origin(conn)


def same_owner(held: Held[Any], conn: Connection, caller: Caller) -> None:
    """Refuse somebody else's connection id.

    A manager that was replaced comes under another name (its id has its pod's), and
    nobody is left to say so: it may take over what begins at the same workload, with
    that workload's own id of the connection, and stays in its own trust domain. Who
    begins it is known by that manager's word only, as in every Request: inside a
    domain each identity is believed about those to its left (`nsm.identity.rules`).
    What keeps others out is the id drawn here, which only those on the wire see.
    The workload itself, at the first hop, must be the same.
    """
    if held.previous is None:
        return
    if held.previous == caller.handshake.peer_id:
        # Many workloads share a manager: what one of them says is behind it is held against this.
        if conn.index >= 2 and held.origin not in ("", origin(conn)):
            raise DeniedError(
                f"connection {conn.id} of {conn.service!r} begins at {held.origin}, not at"
                f" {origin(conn) or 'nobody'}; use a connection id of your own: {REFUSED}"
            )
        return
    replaced = (
        conn.index >= 2
        and held.origin != ""
        and held.origin == origin(conn)
        and held.made is not None
        and held.made.segments[0].id == conn.segments[0].id
        and held.previous.trust_domain == caller.handshake.peer_id.trust_domain
    )
    if not replaced:
        raise DeniedError(
            f"connection {conn.id} of {conn.service!r} was asked for by {held.previous}, not by"
            f" {caller.handshake.peer_id}; use a connection id of your own: {REFUSED}"
        )


def admit_reply(conn: Connection, handshake: Handshake) -> None:
    """Refuse a reply whose path does not prove itself: the client's side of §4.4.

    conn is as returned, at the caller's own index.
    """
    path = [segment.token for segment in conn.segments]
    reason = (
        rules.tokens_valid(path)
        or rules.tokens_expired(path, time.time_ns())
        or rules.tokens_chained(path)
        or rules.next_token_signed(path, conn.index, handshake.peer_leaf)
    )
    if reason:
        raise DeniedError(
            f"the answer of {handshake.peer_id} for connection {conn.id}: {reason}: {REFUSED}"
        )


def _ends(conn: Connection, caller: Caller) -> int:
    """Until when the caller's token vouches: no longer than token and certificate hold.

    What the metadata says beside the token is signed by nobody, and a lease hangs on it.
    """
    assert caller.token_expires is not None
    try:
        said = tokens.claims(caller.token).exp
    except DeniedError as broken:
        raise _denied(conn, caller, broken.message) from None  # the cause may quote it
    # The claim is in whole seconds, cut off.
    return min(caller.token_expires, said + SECOND, caller.handshake.peer_not_after)


def _denied(conn: Connection, caller: Caller, reason: str) -> DeniedError:
    return DeniedError(
        f"connection {conn.id} of {conn.service!r}, asked for by {caller.handshake.peer_id}:"
        f" {reason}: {REFUSED}"
    )
