"""A namespace that passes one domain's packets between its wires, and no others. Blocks.

Forwarding is a switch of the whole namespace, so a table of nf_tables stands before it: a
packet passes if it comes from the domain and goes to the domain, and if the way back to its
source is the interface it came by. So no member speaks for another, and whatever else the
namespace is joined to is not reached. What is set up here stays when the process ends.
"""

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from ipaddress import IPv4Network, IPv6Network, ip_interface
from typing import TypeVar

from nsm.errors import PreconditionError, UnsupportedError
from nsm.kernel import messages, netlink, nftables
from nsm.kernel.namespaces import Home, cookie_here
from nsm.kernel.netlink import Refusal, Socket
from nsm.kernel.nftables import DROP, FORWARD, PREROUTING
from nsm.kernel.state import OWN, Address, Namespace

TABLE = "vwire"
_PASSED, _ONWARD, _ARRIVED = "passed", "onward", "arrived"
_LOOPBACK = "lo"
_MACHINE = 1  # the cookie of the namespace a kernel begins with
SETTINGS = (
    # before forwarding is on: nobody is told of a way past us, nor tells us
    *((f"net/ipv4/conf/{who}/send_redirects", "0") for who in ("all", "default")),
    *((f"net/ipv4/conf/{who}/accept_redirects", "0") for who in ("all", "default")),
    *((f"net/ipv6/conf/{who}/accept_redirects", "0") for who in ("all", "default")),
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
)
Network = IPv4Network | IPv6Network
T = TypeVar("T")


class Routing:
    """The namespace at a path, entered anew each time: nothing here keeps it alive."""

    def __init__(self, path: str) -> None:
        self.path = path

    def prepare(self) -> None:
        """Pass packets on from now on: none, unless an earlier life has said which.

        Raises NotFoundError, PreconditionError, RightsError, UnsupportedError.
        """
        self.inside(self._prepare)

    def admit(self, domain: Iterable[Network]) -> None:
        """Let packets of the domain pass, of those prefixes and no others."""
        listed = tuple(domain)
        self.inside(lambda: self._filter(listed, replace=True))

    def own(self, addresses: Sequence[str], domain: Iterable[Network]) -> None:
        """Have these addresses, and none else of the domain, whatever wires there are."""
        listed = tuple(domain)
        self.inside(lambda: self._own(addresses, listed))

    def forget(self, prefixes: Iterable[Network], links: Iterable[str]) -> None:
        """Send nothing for these prefixes over those devices, where they do: their wires' far
        ends are no more, though the wires may stand until their leases end."""
        wanted, names = frozenset(prefixes), tuple(links)
        self.inside(lambda: self._forget(wanted, names))

    def inside(self, function: Callable[[], T]) -> T:
        """Run function in the namespace, in the calling thread."""
        with Home() as home:
            fd = home.opened_path(self.path, self.path)
            try:
                # who is there already needs no right to enter namespaces, which no pod gives it
                here = os.path.sameopenfile(fd, home.fd)
                with nullcontext() if here else home.inside(fd):
                    return function()
            finally:
                os.close(fd)

    def _prepare(self) -> None:
        if cookie_here() == _MACHINE:
            raise PreconditionError(
                f"{self.path} is this machine's own network namespace, whose other packets a"
                " router would no longer pass on",
                hint="make it one of its own, `ip netns add NAME`, and give /run/netns/NAME",
            )
        self._filter((), replace=False)
        for key, value in SETTINGS:
            self._set(key, value)

    def _set(self, key: str, value: str) -> None:
        try:
            with open(f"/proc/sys/{key}") as file:
                if file.read().strip() == value:
                    return
            with open(f"/proc/sys/{key}", "w") as file:
                file.write(value)
        except FileNotFoundError:
            if "ipv6" not in key:  # a kernel without IPv6 passes no such packets either
                raise UnsupportedError(f"this kernel has no setting {key}") from None
        except OSError as failure:
            command = f"sysctl -w {key.replace('/', '.')}={value}"
            raise netlink.explain(failure, command, self.path) from failure

    def _filter(self, domain: Sequence[Network], *, replace: bool) -> None:
        refusal = nftables.transact(_table(domain, replace=replace))
        if refusal is None or (refusal.errno == errno.EEXIST and not replace):
            return
        if refusal.errno in (errno.ENOENT, errno.EOPNOTSUPP):
            raise UnsupportedError(
                f"this kernel's nf_tables lacks what keeps a domain's packets apart: {refusal}",
                hint="it needs CONFIG_NFT_FIB_INET",
            )
        raise netlink.explain(refusal, f"nft add table inet {TABLE}", self.path)

    def _own(self, addresses: Sequence[str], domain: Sequence[Network]) -> None:
        wanted = {ip_interface(one) for one in addresses}
        with Socket.here() as sock:
            try:
                index = messages.device(sock.ask(messages.get_link(name=_LOOPBACK))).index
                there = Namespace(0, OWN, 0, self.path)
                dumped = sock.dump(messages.dump_addresses(index))
            except Refusal as refusal:
                raise netlink.explain(refusal, f"ip addr show {_LOOPBACK}", self.path) from refusal
            seen = {one.cidr for one in messages.seen_addresses(dumped, there, _LOOPBACK, index)}
            stale = [one for one in seen - wanted if any(one.ip in network for network in domain)]
            changes = [("del", one) for one in stale] + [("add", one) for one in wanted - seen]
            batch = [messages.set_up(index)]
            batch += [
                messages.address(verb, Address(there, _LOOPBACK, cidr), index)  # type: ignore[arg-type]
                for verb, cidr in changes
            ]
            for refused, what in zip(sock.do(batch), [("up", _LOOPBACK), *changes], strict=True):
                if refused and refused.errno not in (errno.EEXIST, errno.EADDRNOTAVAIL):
                    command = f"ip addr {what[0]} {what[1]} dev {_LOOPBACK}"
                    raise netlink.explain(refused, command, self.path)

    def _forget(self, prefixes: frozenset[Network], links: Sequence[str]) -> None:
        there = Namespace(0, OWN, 0, self.path)
        with Socket.here() as sock:
            for name in links:
                try:
                    index = messages.device(sock.ask(messages.get_link(name=name))).index
                    dumped = sock.dump(messages.dump_routes(index))
                except Refusal as refusal:
                    if refusal.errno == errno.ENODEV:
                        continue
                    raise netlink.explain(refusal, f"ip route show dev {name}", self.path) from None
                seen = messages.seen_routes(dumped, there, name, index)
                stale = [one for one in seen if one.to in prefixes]
                refusals = sock.do([messages.route("del", one, index) for one in stale])
                for one, refused in zip(stale, refusals, strict=True):
                    if refused and refused.errno != errno.ESRCH:
                        raise netlink.explain(refused, f"ip route del {one}", self.path)


def _table(domain: Sequence[Network], *, replace: bool) -> list[bytearray]:
    """The changes that make the table, instead of the one there is; without replace only anew."""
    made = [nftables.new_table(TABLE, exclusive=not replace)]
    if replace:  # deleting what is not there would be refused
        made += [nftables.delete_table(TABLE), nftables.new_table(TABLE)]
    made += [
        nftables.new_chain(TABLE, _ONWARD),
        nftables.new_chain(TABLE, _PASSED, FORWARD, DROP),
        # before the way on is looked for: what cannot go on is answered to its source
        nftables.new_chain(TABLE, _ARRIVED, PREROUTING),
    ]
    misfit, fit = nftables.fits_interface(fits=False), nftables.fits_interface(fits=True)
    accept, drop = nftables.verdict(nftables.ACCEPT), nftables.verdict(DROP)
    for network in domain:
        source, destination = nftables.comes_from(network), nftables.goes_to(network)
        made += [
            nftables.new_rule(TABLE, _ARRIVED, source, misfit, drop),
            nftables.new_rule(TABLE, _PASSED, source, fit, nftables.jump(_ONWARD)),
            nftables.new_rule(TABLE, _ONWARD, destination, accept),
        ]
    return made
