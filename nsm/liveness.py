"""Whether packets still flow through a wire: pings from its own end (`wire.md` §8.2).

Sent from unprivileged ICMP sockets, which whoever made the wire has allowed in
our namespace (`net.ipv4.ping_group_range`).
"""

import asyncio
import ipaddress
import socket
import struct
from collections.abc import Sequence

PACKETS = 4  # to each address, spread over the time
Address = ipaddress.IPv4Interface | ipaddress.IPv6Interface


async def alive(own: Sequence[Address], others: Sequence[Address], within: float) -> bool | None:
    """Whether each of the others answers each of own of its family, within so many seconds.

    None where that cannot be told: there are no addresses, or we may not ping.
    """
    pairs = [(one.ip, other.ip) for one in own for other in others if one.version == other.version]
    if not pairs:
        return None
    verdicts = await asyncio.gather(*(_answers(str(a), str(b), within) for a, b in pairs))
    if None in verdicts:
        return None
    return all(verdicts)


async def _answers(own: str, other: str, within: float) -> bool | None:
    v6 = ":" in own
    family, protocol = (
        (socket.AF_INET6, socket.IPPROTO_ICMPV6) if v6 else (socket.AF_INET, socket.IPPROTO_ICMP)
    )
    try:
        pinger = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, protocol)
    except PermissionError:
        return None
    with pinger:
        loop = asyncio.get_running_loop()
        for number in range(PACKETS):
            echo = struct.pack("!BBHHH", 128 if v6 else 8, 0, 0, 0, number)
            try:
                async with asyncio.timeout(within / PACKETS):
                    if not number:
                        pinger.bind((own, 0))
                    pinger.connect((other, 0))
                    await loop.sock_sendall(pinger, echo)
                    await loop.sock_recv(pinger, 256)  # the kernel passes on only our own answers
            except TimeoutError:
                continue
            except OSError:  # the address or the way there is gone, or somebody said so
                return False
            return True
    return False
