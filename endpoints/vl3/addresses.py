"""What a router tells of addresses and routes, member by member (`wire.md` §10.3). Pure.

A router is lent a prefix of each family. The prefix's first address is its own; each member
gets one of the others, as a single address, and routes to the whole domain by the router's.
Another router, at either end of a wire, keeps its own address, and gets the way to this
router's prefix only: it knows the others' itself. What it says of this one's is not believed.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nsm.errors import ExhaustedError, UnavailableError
from nsm.ipam import Free, check_sizes, excluded_spans
from nsm.model import IPContext, Route

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(slots=True)
class _Lent:
    """A prefix of ours, and what of it is free."""

    network: Network
    free: Free

    @property
    def own(self) -> Address:
        return self.network.network_address


class RouterAddresses:
    """The router's and its members' addresses. Prefixes come, and may change, while it runs."""

    def __init__(self, families: Sequence[int]) -> None:
        self._families = tuple(families)
        self._lent: dict[int, _Lent] = {}
        self._domain: tuple[Network, ...] = ()
        self._former: set[Network] = set()  # what was the domain's: members may still say it
        self._held: dict[str, dict[int, Address]] = {}
        self._reserved: dict[int, set[int]] = {4: set(), 6: set()}

    # -- what is ours -----------------------------------------------------------------------

    def lend(self, prefix: str, domain: Sequence[str] = ()) -> bool:
        """A prefix is ours from now on, instead of another of its family; whether it is new.

        domain is every prefix of the domain where the address plan tells them. What members
        had of another prefix they lose with their next request.
        """
        network = ipaddress.ip_network(prefix)
        before = self.domain
        told = tuple(map(ipaddress.ip_network, domain))
        families = {one.version for one in told}  # of another plan are the others
        self._domain = (*(one for one in self._domain if one.version not in families), *told)
        known = self._lent.get(network.version)
        if known and known.network == network:
            self._former |= set(before) - set(self.domain)
            return False
        free = Free(int(network.network_address), int(network.broadcast_address))
        free.take(int(network.network_address))
        for number in self._reserved[network.version]:
            if number in free:
                free.take(number)
        self._lent[network.version] = _Lent(network, free)
        for mine in self._held.values():
            mine.pop(network.version, None)
        self._former |= set(before) - set(self.domain)
        return True

    def without(self, family: int) -> None:
        """The domain has none of this family, so nobody waits for it."""
        self._families = tuple(one for one in self._families if one != family)

    @property
    def ready(self) -> bool:
        """Whether there is a prefix of each family."""
        return bool(self._families) and all(one in self._lent for one in self._families)

    @property
    def own(self) -> tuple[str, ...]:
        """The router's own addresses, `a/32` and `a/128`."""
        return tuple(_host(one.own) for one in self._in_order())

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What is lent to it."""
        return tuple(str(one.network) for one in self._in_order())

    @property
    def domain(self) -> tuple[Network, ...]:
        """Every prefix of the domain: as told, else by upstream's half-length rule."""
        told = {one.version for one in self._domain}
        return (
            *self._domain,
            *(_half(one).network for one in self._in_order() if one.network.version not in told),
        )

    @property
    def known(self) -> tuple[Network, ...]:
        """Every prefix of the domain, and what was one before."""
        return (*self.domain, *self._former)

    def reserve(self, addresses: Iterable[str]) -> int:
        """Give these only to members that carry them, until `unreserve`; how many there are.

        For those of an earlier life: their wires stand, and they ask again later.
        """
        for text in addresses:
            address = ipaddress.ip_address(text)
            self._reserved[address.version].add(int(address))
            lent = self._lent.get(address.version)
            if lent and int(address) in lent.free:
                lent.free.take(int(address))
        return sum(map(len, self._reserved.values()))

    @property
    def expected(self) -> bool:
        """Whether somebody has not come back yet for whom an address is reserved."""
        return any(
            int(lent.own) < number <= int(lent.network.broadcast_address)
            for version, lent in self._lent.items()
            for number in self._reserved[version]
        )

    def unreserve(self) -> None:
        """Whoever had one and did not come back in time has lost it."""
        for version, numbers in self._reserved.items():
            lent = self._lent.get(version)
            held = {int(mine[version]) for mine in self._held.values() if version in mine}
            for number in numbers:
                inside = lent and int(lent.own) < number <= int(lent.network.broadcast_address)
                if lent and inside and number not in held and number not in lent.free:
                    lent.free.give(number)
            numbers.clear()

    # -- what a member gets -----------------------------------------------------------------

    def assign(self, id_: str, asked: IPContext, *, router: bool = False) -> IPContext:
        """The context of a connection that ends here; router says who asks is one.

        Raises UnavailableError before there is a prefix, ExhaustedError, InvalidError.
        """
        check_sizes(id_, asked)
        if not self.ready:
            raise UnavailableError(
                "prefix pool is initializing: the address plan has not lent this router a"
                " prefix yet",
                hint="ask again; if it stays so, see the router's log for NSM_PREFIX_SERVER_URL",
            )
        if not router:
            self._member(id_, asked)
        held = self._held.get(id_, {})
        ours = [_host(one) for one in held.values()]
        own = set(self.own)
        # A member has the addresses that we say, another router the domain's but for ours. All
        # else would be in our namespace too: a way past it to whatever else we need to reach.
        src = [
            text for text in asked.src_ip_addrs if text in ours or (router and self._theirs(text))
        ]
        dst = [text for text in asked.dst_ip_addrs if text in own]
        src = list(dict.fromkeys((*src, *ours)))
        return replace(
            asked,
            src_ip_addrs=tuple(src),
            dst_ip_addrs=tuple(dict.fromkeys((*dst, *self.own))),
            src_routes=self._ways(asked.src_routes, whole=not router),
            dst_routes=self._back(asked.dst_routes, src, router=router),
        )

    def ask(self, asked: IPContext) -> IPContext:
        """The context of a connection to another router, which we ask for: our own address,
        and the way to what is behind us.
        """
        if not self.ready:
            raise UnavailableError("prefix pool is initializing: this router has none yet")
        return replace(
            asked,
            src_ip_addrs=self.own,
            dst_routes=self._ways(asked.dst_routes, whole=False),
        )

    def leads_on(self, asked: IPContext) -> bool:
        """Whether who asks says that more of the domain than itself is behind it: as routers do."""
        return any(
            ipaddress.ip_network(one.prefix, strict=False).num_addresses > 1
            for one in asked.dst_routes
            if self._of_domain(one.prefix)
        )

    def release(self, id_: str) -> None:
        """Take back what the member has; nothing for an unknown one."""
        for version, address in self._held.pop(id_, {}).items():
            lent = self._lent.get(version)
            if lent and address in lent.network and int(address) not in lent.free:
                lent.free.give(int(address))

    def members(self) -> dict[str, tuple[str, ...]]:
        """Connections and the addresses they have, without lengths."""
        return {id_: tuple(map(str, mine.values())) for id_, mine in self._held.items()}

    def _member(self, id_: str, asked: IPContext) -> None:
        excluded = excluded_spans(asked.excluded_prefixes)
        mine = dict(self._held.get(id_, {}))
        new: list[tuple[_Lent, int]] = []
        for lent in self._in_order():
            version = lent.network.version
            spans = excluded[version]
            if version in mine and not _inside(spans, int(mine[version])):
                continue
            number = self._carried(lent, asked, spans)
            if number is None:
                number = next(iter(lent.free.lowest(spans, 1)), None)
            if number is None:
                for other, taken in new:
                    other.free.give(taken)
                raise ExhaustedError(
                    f"no free address for connection {id_} in {lent.network}, of which"
                    f" {len(self._held)} members have one",
                    hint="end members nobody needs, start another router of the domain, or"
                    " have the address plan lend larger prefixes",
                )
            if number in lent.free:
                lent.free.take(number)
            self._reserved[version].discard(number)
            new.append((lent, number))
        before = self._held.get(id_, {})
        for lent, number in new:
            version = lent.network.version
            if version in before:  # what is excluded now is another's from here on
                lent.free.give(int(before[version]))
            mine[version] = type(lent.own)(number)
        self._held[id_] = mine

    def _carried(
        self, lent: _Lent, asked: IPContext, spans: Sequence[tuple[int, int]]
    ) -> int | None:
        """The address of ours that a request carries, as after a restart of either end."""
        for text in asked.src_ip_addrs:
            address = ipaddress.ip_interface(text).ip if _readable(text) else None
            if address is None or address.version != lent.network.version:
                continue
            number = int(address)
            free = number in lent.free or number in self._reserved[address.version]
            member = address in lent.network and address != lent.own
            if member and free and not _inside(spans, number):
                return number
        return None

    def _ways(self, asked: Sequence[Route], *, whole: bool) -> tuple[Route, ...]:
        """Routes to us: our address, our prefix and, for members, the whole domain."""
        found: dict[str, Route] = {
            one.prefix: one for one in asked if not self._of_domain(one.prefix)
        }
        for lent in self._in_order():
            by = str(lent.own)
            wanted = [_host(lent.own), str(lent.network)]
            if whole:
                wanted += [
                    str(one) for one in self._whole(lent) if one.version == lent.network.version
                ]
            found |= {prefix: Route(prefix, by) for prefix in wanted}
        return tuple(found.values())

    def _back(
        self, asked: Sequence[Route], src: Sequence[str], *, router: bool
    ) -> tuple[Route, ...]:
        """Routes to who asks: each of its addresses; a router's ways in the domain as it says."""
        found = {one.prefix: one for one in asked if router and self._theirs(one.prefix)}
        for text in src:
            if _readable(text):
                prefix = _host(ipaddress.ip_interface(text).ip)
                found.setdefault(prefix, Route(prefix))
        return tuple(found.values())

    def _whole(self, lent: _Lent) -> list[ipaddress.IPv4Interface | ipaddress.IPv6Interface]:
        """The domain as a member's route says it; where nobody told, as upstream writes it."""
        told = [one for one in self._domain if one.version == lent.network.version]
        if told:
            return [ipaddress.ip_interface(str(one)) for one in told]
        return [_half(lent)]

    def _of_domain(self, text: str) -> bool:
        if not _readable(text):
            return False
        one = ipaddress.ip_interface(text).network
        return any(one.version == two.version and one.overlaps(two) for two in self.known)

    def _theirs(self, text: str) -> bool:
        """Whether another router can have it: of the domain, and not of what is lent to us, as
        the address plan lends nothing twice."""
        if not _readable(text):
            return False
        one = ipaddress.ip_interface(text).network
        ours = [lent.network for lent in self._lent.values()]
        return _within(one, self.known) and not _within(one, ours)

    def _in_order(self) -> list[_Lent]:
        return [self._lent[one] for one in self._families if one in self._lent]


def _half(lent: _Lent) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface:
    """Upstream's idea of the domain: our address with a mask of half an address's length."""
    return ipaddress.ip_interface(f"{lent.own}/{lent.network.max_prefixlen // 2}")


def _host(address: Address) -> str:
    return f"{address}/{address.max_prefixlen}"


def _within(one: Network, networks: Iterable[Network]) -> bool:
    return any(one.version == two.version and one.subnet_of(two) for two in networks)  # type: ignore[arg-type]


def _readable(text: str) -> bool:
    try:
        ipaddress.ip_interface(text)
    except ValueError:
        return False
    return True


def _inside(spans: Sequence[tuple[int, int]], number: int) -> bool:
    return any(first <= number <= last for first, last in spans)
