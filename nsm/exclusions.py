"""Keeping one workload's wires from having the same addresses (`wire.md` §3.5).

Endpoints know nothing of one another, and many hand out the same private
prefix. So a client that asks for another wire excludes the addresses it
already has. Endpoints of one awareness group know of each other: their wires
may overlap, as two ways to one place.
"""

import ipaddress
from collections.abc import Iterable, Sequence

from nsm.errors import PreconditionError
from nsm.model import IPContext
from nsm.nsurl import NSURL


def excluded_for(
    url: NSURL, others: Iterable[tuple[NSURL, IPContext]], groups: Sequence[Sequence[NSURL]] = ()
) -> tuple[str, ...]:
    """What a request for url must exclude, given the wires there are; each prefix once."""
    aware = {id(group): group for group in groups if url in group}
    found: dict[str, None] = {}
    for other, ip in others:
        if not any(other in group for group in aware.values()):
            found.update(dict.fromkeys(hosts(ip)))
    return tuple(found)


def hosts(ip: IPContext) -> tuple[str, ...]:
    """Every single address of a wire, both ends' and those routed to, as `a/32` or `a/128`."""
    texts = (
        *ip.src_ip_addrs,
        *ip.dst_ip_addrs,
        *(route.prefix for route in (*ip.src_routes, *ip.dst_routes) if _is_host(route.prefix)),
    )
    return tuple(dict.fromkeys(host for text in texts if (host := _host(text))))


def check(ip: IPContext, excluded: Sequence[str], *, whose: str) -> None:
    """Refuse an answer that uses an address we said is in use.

    Raises PreconditionError, with upstream's words in it.
    """
    forbidden = {host for text in excluded if _is_host(text) and (host := _host(text))}
    for text in (*ip.src_ip_addrs, *ip.dst_ip_addrs):
        if _host(text) in forbidden:
            raise PreconditionError(
                f"IP {text} is excluded, but it was found in response IPs of {whose}",
                hint="its endpoint ignores excluded prefixes: give it another prefix",
            )


def _host(text: str) -> str:
    try:
        address = ipaddress.ip_interface(text).ip
    except ValueError:
        return ""
    return f"{address}/{address.max_prefixlen}"


def _is_host(prefix: str) -> bool:
    try:
        return ipaddress.ip_network(prefix, strict=False).num_addresses == 1
    except ValueError:
        return False
