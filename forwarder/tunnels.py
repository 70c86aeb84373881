"""This node's end of tunnels: its address, its port, and what fits through."""

import asyncio
from ipaddress import ip_address
from urllib.parse import urlsplit

from nsm import mechanisms
from nsm.errors import ExhaustedError, InvalidError, UnavailableError
from nsm.kernel.node import Kernel
from nsm.kernel.state import VXLAN_PORT, IPAddress, Namespace
from nsm.model import Mechanism

TRIES = 16  # network identifiers to ask the kernel about; one in 16 million is taken a wire


class Tunnels:
    """Knows where tunnels of this node begin. tunnel_ip "": by the route to the far end."""

    def __init__(
        self, kernel: Kernel, tunnel_ip: str, vxlan_port: int, isolation: str = "auto"
    ) -> None:
        try:
            self._tunnel_ip = ip_address(tunnel_ip) if tunnel_ip else None
        except ValueError:
            raise InvalidError(f"NSM_TUNNEL_IP is {tunnel_ip!r}, which is no IP address") from None
        self.vxlan_port = vxlan_port or VXLAN_PORT
        self._isolation = isolation
        self._kernel = kernel

    async def local(self, towards: IPAddress, type_: str) -> tuple[IPAddress, int]:
        """Our address for a tunnel of that type towards a node, and the MTU inside it."""
        way = await self._kernel.way_to(towards)
        own = self._tunnel_ip or way.source
        return own, mechanisms.tunnel_mtu(type_, str(own), way.mtu)

    async def hop(self, namespace: Namespace, fd: int | None, standing: bool | None) -> bool:
        """Whether a tunnel for that namespace is to stand here, and not in there.

        standing is how this wire's tunnel stands now, None if it does not. It stays so: to
        move it loses packets, and who is in there now is not who the wire was made for.
        """
        if self._isolation != "auto":
            return self._isolation == "hop"
        if standing is not None:
            return standing
        return await self._kernel.misusable(namespace, fd=fd)

    async def free_vni(self, agreed: Mechanism, local: IPAddress, remote: IPAddress) -> int:
        """A network identifier of the right parity that the kernel has no tunnel for."""
        for _ in range(TRIES):
            drawn = mechanisms.draw_vni(agreed, ())
            if await self.is_free(drawn, local, remote):
                return drawn
        raise ExhaustedError(
            f"{TRIES} network identifiers in a row are taken on UDP port {self.vxlan_port}",
            hint="see `ip -d link show type vxlan` for who holds them",
        )

    async def is_free(self, vni: int, local: IPAddress, remote: IPAddress) -> bool:
        """Whether the kernel could make a tunnel with vni now."""
        return await self._kernel.vni_free(vni, local, remote, port=self.vxlan_port)


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
