"""This node's end of tunnels: its address, what fits through, and where they stand."""

import asyncio
from ipaddress import ip_address
from urllib.parse import urlsplit

from nsm import mechanisms
from nsm.errors import InvalidError, UnavailableError
from nsm.kernel.node import Kernel
from nsm.kernel.state import IPAddress, Namespace


class Tunnels:
    """Knows where tunnels of this node begin. tunnel_ip "": by the route to the far end."""

    def __init__(self, kernel: Kernel, tunnel_ip: str, isolation: str = "auto") -> None:
        try:
            self._tunnel_ip = ip_address(tunnel_ip) if tunnel_ip else None
        except ValueError:
            raise InvalidError(f"NSM_TUNNEL_IP is {tunnel_ip!r}, which is no IP address") from None
        self._isolation = isolation
        self._kernel = kernel

    async def local(self, towards: IPAddress, type_: str) -> tuple[IPAddress, int]:
        """Our address for a tunnel of that type towards a node, and the MTU inside it."""
        way = await self._kernel.way_to(towards)
        own = self._tunnel_ip or way.source
        return own, mechanisms.tunnel_mtu(type_, str(own), way.mtu)

    async def hop(self, namespace: Namespace, fd: int | None, standing: bool | None) -> bool:
        """Whether a tunnel for that namespace is to stand here, and not in there.

        standing is how this wire's tunnel stands now, None if it does not. It stays so, whatever
        the setting is by now: to move it loses packets, on the other node too, and who is in
        there now is not who the wire was made for.
        """
        if standing is not None:
            return standing
        if self._isolation != "auto":
            return self._isolation == "hop"
        return await self._kernel.misusable(namespace, fd=fd)


async def node_of(url: str) -> IPAddress:
    """The address of the node behind a manager's URL: where a tunnel will lead to."""
    host = urlsplit(url if "//" in url else f"tcp://{url}").hostname or ""
    try:
        return ip_address(host)
    except ValueError:
        pass
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
    except OSError as failure:
        raise UnavailableError(
            f"{url}: the name {host!r} has no address: {failure.strerror}",
            hint="have the far manager listen on an address: NSM_LISTEN_ON=tcp://<ip>:5001",
        ) from failure
    return ip_address(found[0][4][0])
