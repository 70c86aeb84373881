"""UDP ports of this node's tunnels: the lowest that nobody has, one for each wire."""

from collections.abc import Awaitable, Callable

from nsm.errors import ExhaustedError

MOST = 4096  # ports to look at for one wire; beside as many wires of before, every one is taken


class Ports:
    """Gives out ports from `first` upwards. free asks the kernel, whose word counts.

    What is given is remembered by connection, so that two wires that are made at the same
    time do not get one port, and nobody asks about ports that are known to be taken.
    """

    def __init__(self, first: int, free: Callable[[int], Awaitable[bool]]) -> None:
        self._first = first
        self._free = free
        self._given: dict[str, int] = {}

    async def draw(self, connection: str, *, above: int = 0) -> int:
        """A free port, from now on this connection's. Raises ExhaustedError."""
        self.give_back(connection)
        start = max(self._first, above + 1)
        for port in range(start, min(start + MOST, 1 << 16)):
            if port in self._given.values():
                continue
            self._given[connection] = port  # before asking: meanwhile others draw too
            if await self._free(port):
                return port
            del self._given[connection]
        raise ExhaustedError(
            f"no UDP port from {start} to {min(start + MOST, 1 << 16) - 1} is free for a tunnel",
            hint="see `ss -lun` for who holds them, or set NSM_WIREGUARD_PORT to another first one",
        )

    def keep(self, connection: str, port: int) -> None:
        """The connection has that port already."""
        self._given[connection] = port

    def give_back(self, connection: str) -> None:
        """The connection's tunnel is gone, or never came to be."""
        self._given.pop(connection, None)
