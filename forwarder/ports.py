"""UDP ports of this node's tunnels: the lowest that nobody has, one for each wire."""

from collections.abc import Awaitable, Callable

from nsm.errors import ExhaustedError

MOST = 4096  # ports to look at for one wire; beside as many wires of before, every one is taken


class Ports:
    """Gives out ports from `first` upwards. free asks the kernel, whose word counts.

    What is given is remembered, so that two wires that are made at the same time do not get
    one port, and nobody asks about ports that are known to be taken.
    """

    def __init__(self, first: int, free: Callable[[int], Awaitable[bool]]) -> None:
        self._first = first
        self._free = free
        self._given: dict[str, int] = {}
        self._holders: dict[int, str] = {}

    async def draw(self, connection: str, *, above: int = 0) -> int:
        """A free port, from now on this connection's. Raises ExhaustedError."""
        self.give_back(connection)
        first = max(self._first, above + 1)
        end = min(first + MOST, 1 << 16)
        for port in range(first, end):
            if port in self._holders:
                continue
            self.keep(connection, port)  # before asking: meanwhile others draw too
            if await self._free(port):
                return port
            self.give_back(connection)
        raise ExhaustedError(
            f"no UDP port from {first} to {end - 1} is free for a tunnel",
            hint="see `ss -lun` for who holds them, or set NSM_WIREGUARD_PORT to another first one",
        )

    def keep(self, connection: str, port: int) -> None:
        """The connection has that port already."""
        if self._given.get(connection) != port:
            self.give_back(connection)
        self._given[connection] = port
        self._holders[port] = connection

    def give_back(self, connection: str) -> None:
        """The connection's tunnel is gone, or never came to be."""
        port = self._given.pop(connection, 0)
        if self._holders.get(port) == connection:  # else it turned out to be another's
            del self._holders[port]
