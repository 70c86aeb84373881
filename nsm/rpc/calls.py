"""Calling the next hop: Request, Close and MonitorConnections as values (`wire.md` §1.1).

Each call carries a token made for the TLS connection it travels on (§4.3), and
sends again every file its mechanisms name (§5), because the peer may have been
restarted since.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from nsm.descriptors import INODE_URL, Descriptors
from nsm.identity.source import Handshake
from nsm.model import Connection, Event, Mechanism, Request, Selector
from nsm.proto.connection_grpc import MonitorConnectionStub
from nsm.proto.networkservice_grpc import NetworkServiceStub
from nsm.race import unless
from nsm.rpc import wire
from nsm.rpc.peers import Peers

CLOSE_TIMEOUT = 15.0  # seconds; a Close that takes longer is given up and left to the lease
FD_PATIENCE = 2.0  # seconds a reply's descriptor may come after the reply


@dataclass(frozen=True, slots=True)
class Answer:
    """What a next hop replied: the connection at our own segment, and the handshake it came on."""

    connection: Connection
    handshake: Handshake


class Calls:
    """Calls to next hops, over pooled channels. lifetime of tokens in nanoseconds."""

    def __init__(self, peers: Peers, lifetime: int) -> None:
        self.peers = peers
        self._lifetime = lifetime

    async def request(
        self,
        url: str,
        asked: Request,
        *,
        fds: Descriptors,
        within: float,
        dial_timeout: float | None = None,
        whose: str = "",
    ) -> Answer:
        """Ask the hop at url for a connection; within is in seconds.

        asked.connection is at our own segment. The file the reply's mechanism
        names is in fds afterwards, if it came over a unix socket.
        """
        conn = asked.connection
        private = conn.id if len(fds) else ""
        async with self.peers.link(
            url, private=private, dial_timeout=dial_timeout, whose=whose
        ) as link:
            fds.send_all(link.fds, (*asked.preferences, *_own(conn)))
            with link.errors():
                message = await NetworkServiceStub(link.channel).Request(
                    wire.to_pb(asked), timeout=within, metadata=link.metadata(self._lifetime)
                )
            made = wire.connection(message)
            if made.mechanism:
                # A hop that passes a namespace on sends it back with its answer (`wire.md` §5.6).
                await fds.claim_rest(link.fds, made.mechanism.get(INODE_URL), FD_PATIENCE)
            return Answer(made, link.handshake)

    async def close(
        self, url: str, conn: Connection, *, fds: Descriptors, within: float = CLOSE_TIMEOUT
    ) -> None:
        """Tell the hop at url that the connection is over. conn is at our own segment."""
        private = conn.id if len(fds) else ""
        try:
            async with self.peers.link(url, private=private) as link:
                fds.send_all(link.fds, _own(conn))
                with link.errors():
                    await NetworkServiceStub(link.channel).Close(
                        wire.to_pb(conn), timeout=within, metadata=link.metadata(self._lifetime)
                    )
        finally:
            await self.peers.release(conn.id)

    async def monitor(self, url: str, selector: Selector) -> AsyncGenerator[Event, None]:
        """What the hop at url says of the connections selector names, until it ends.

        When our certificate is renewed the stream moves to a new channel, and
        begins there with an initial transfer again.
        """
        moved = True
        while moved:
            moved = False
            async with self.peers.link(url) as link:
                stub = MonitorConnectionStub(link.channel)
                metadata = link.metadata(self._lifetime)
                with link.errors():
                    async with stub.MonitorConnections.open(metadata=metadata) as stream:
                        await stream.send_message(wire.to_pb(selector), end=True)
                        while True:
                            message = await unless(stream.recv_message(), link.outdating())
                            if message is None:
                                moved = link.outdated
                                break
                            yield wire.event(message)
                        if moved:
                            await stream.cancel()


def _own(conn: Connection) -> tuple[Mechanism, ...]:
    return (conn.mechanism,) if conn.mechanism else ()
