"""What a router tells of addresses and routes, member by member (`wire.md` §10.3). Pure.

A router is lent a prefix of each family. The prefix's first address is its own; each member
gets one of the others, as a single address, and routes to the whole domain by the router's.
Another router, at either end of a wire, keeps its own address, and gets the way to this
router's prefix only: it knows the others' itself. What it says of this one's is not believed.

A member whose router died keeps its address at another, if the address plan says that it is
its own (`endpoints.vl3.holdings`): such a *foreign* address is told to the other routers, one
by one. Of our own prefix, what is *elsewhere* so is given to nobody until its member is gone.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from nsm.errors import ExhaustedError, UnavailableError
from nsm.ipam import Free, check_sizes, excluded_spans
from nsm.model import IPContext, Route

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
MOST_FOREIGN = 512  # addresses: each is a route at every other router, which reads 1024 at most
MOST_RESTING = 4096  # addresses that were somebody's, of a prefix


@dataclass(frozen=True, slots=True)
class Taken:
    """A member's address, to be told to the address plan; left: it has it no longer."""

    address: str
    holder: str
    left: bool = False


@dataclass(slots=True)
class _Lent:
    """A prefix of ours, and what of it is free."""

    network: Network
    free: Free
    resting: dict[int, None] = field(default_factory=dict)
    """Free, too, and given last, the oldest first: who had it may still come for it elsewhere."""

    @property
    def own(self) -> Address:
        return self.network.network_address

    def can_give(self, number: int) -> bool:
        return number in self.free or number in self.resting

    def lowest(self, spans: Sequence[tuple[int, int]]) -> int | None:
        found = self.free.lowest(spans, 1) or [
            one for one in self.resting if not _inside(spans, one)
        ]
        return next(iter(found), None)

    def take(self, number: int) -> None:
        if number in self.resting:
            del self.resting[number]
        elif number in self.free:
            self.free.take(number)

    def give(self, number: int) -> None:
        if self.can_give(number) or not self.may_give(number):
            return
        self.resting[number] = None
        if len(self.resting) > MOST_RESTING:
            self.free.give(oldest := next(iter(self.resting)))
            del self.resting[oldest]

    def may_give(self, number: int) -> bool:
        return int(self.own) < number <= int(self.network.broadcast_address)


class RouterAddresses:
    """The router's and its members' addresses. Prefixes come, and may change, while it runs."""

    def __init__(self, families: Sequence[int]) -> None:
        self._families = tuple(families)
        self._lent: dict[int, _Lent] = {}
        self._domain: tuple[Network, ...] = ()
        self._former: set[Network] = set()  # what was the domain's: members may still say it
        self._held: dict[str, dict[int, Address]] = {}
        self._holders: dict[str, str] = {}  # whose each connection is, as the address plan has it
        self._granted: dict[str, dict[int, Address]] = {}  # by the address plan, not given yet
        self._reserved: dict[int, set[int]] = {4: set(), 6: set()}
        self._kept: dict[Address, str] = {}  # for its holder of an earlier life of ours
        self._elsewhere: set[Address] = set()  # of our prefixes, with members of other routers
        self._taken: list[Taken] = []

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
        self._former |= set(before) - set(self.domain)
        here = [one for one in self.domain if one.version == network.version]
        for id_, mine in self._held.items():
            address = mine.get(network.version)
            if address and (known is None or address in known.network or not _of(address, here)):
                del mine[network.version]
                self._taken.append(Taken(str(address), self._holders.get(id_, ""), left=True))
        self._kept = {one: who for one, who in self._kept.items() if _of(one, self.domain)}
        self._elsewhere = {
            one for one in self._elsewhere if one in network or one.version != network.version
        }
        numbers = {int(one) for one in (*self._kept, *self._elsewhere) if one in network}
        for number in numbers | self._reserved[network.version]:
            if number in free:
                free.take(number)
        self._lent[network.version] = _Lent(network, free)
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
            if lent := self._lent.get(address.version):
                lent.take(int(address))
        return sum(map(len, self._reserved.values()))

    @property
    def expected(self) -> bool:
        """Whether somebody has not come back yet for whom an address is reserved."""
        return any(
            lent.may_give(number)
            for version, lent in self._lent.items()
            for number in self._reserved[version]
        )

    def unreserve(self) -> None:
        """Whoever had one and did not come back in time has lost it."""
        held = {address for mine in self._held.values() for address in mine.values()}
        for version, numbers in self._reserved.items():
            if lent := self._lent.get(version):
                for number in numbers:
                    if type(lent.own)(number) not in (held | self._elsewhere):
                        lent.give(number)
            numbers.clear()
        for address, holder in self._kept.items():
            self._put(address)
            self._taken.append(Taken(str(address), holder, left=True))
        self._kept.clear()

    # -- what the address plan says of members ------------------------------------------------

    def claimable(self, id_: str, asked: IPContext, holder: str) -> tuple[str, ...]:
        """What a request carries that only the address plan can say is its own."""
        spans = excluded_spans(asked.excluded_prefixes)
        held = self._held.get(id_, {})
        found: dict[int, Address] = {}
        for text in asked.src_ip_addrs:
            one = ipaddress.ip_interface(text).ip if _readable(text) else None
            if one is None or one.version in found or one.version not in self._lent:
                continue
            lent = self._lent[one.version]
            strange = one not in lent.network or one in self._elsewhere
            fits = one.version not in held and _of(one, self.domain) and one != lent.own
            if strange and fits and not _inside(spans[one.version], int(one)):
                found[one.version] = one
        mine = [one for one in found.values() if self._kept.get(one) != holder]
        if not holder or len(self.foreign) + len(mine) > MOST_FOREIGN:
            return ()
        return tuple(map(str, mine))

    def grant(self, id_: str, address: str) -> None:
        """The address plan says that it is the member's, who asks us for it next."""
        one = ipaddress.ip_address(address)
        self._granted.setdefault(id_, {})[one.version] = one

    def keep(self, address: str, holder: str) -> None:
        """It was given by us, or by an earlier life of ours, to holder: only who is that may
        have it, until `unreserve`."""
        one = ipaddress.ip_address(address)
        if one in self._who():
            return
        self._kept[one] = holder
        if lent := self._ours(one):
            lent.take(int(one))

    @property
    def keeps(self) -> bool:
        """Whether it keeps any so."""
        return bool(self._kept)

    def leave_out(self, address: str) -> list[str]:
        """It is with a member of another router; the connections that had it here till now."""
        one = ipaddress.ip_address(address)
        self._kept.pop(one, None)
        lost = [id_ for id_, mine in self._held.items() if one in mine.values()]
        for id_ in lost:
            del self._held[id_][one.version]
        for mine in self._granted.values():
            if mine.get(one.version) == one:
                del mine[one.version]
        self._elsewhere.add(one)
        if lent := self._ours(one):
            lent.take(int(one))
        return lost

    def return_(self, address: str, holder: str = "") -> list[str]:
        """Its member at another router is gone: it is ours to give again, but if the same member
        has a wire here still, as where it could not move after all. The wire that is to ask again:
        it has it again, or, where it is of another's prefix, it may claim it.
        """
        one = ipaddress.ip_address(address)
        if one not in self._elsewhere:
            return []
        back = [
            id_
            for id_, mine in self._held.items()
            if holder and self._holders.get(id_) == holder and one.version not in mine
        ][:1]
        self._elsewhere.discard(one)
        if back and self._ours(one):
            self._held[back[0]][one.version] = one
            self._taken.append(Taken(address, holder))
        else:
            self._put(one)
        return back

    @property
    def foreign(self) -> tuple[str, ...]:
        """Addresses of other routers' prefixes that members have here."""
        here = dict.fromkeys((*self._who(), *self._kept))
        return tuple(str(one) for one in here if self._ours(one) is None)

    @property
    def holdings(self) -> tuple[Taken, ...]:
        """Every member's, for the address plan."""
        return tuple(Taken(str(one), who) for one, who in self._who().items() if who)

    def drain(self) -> list[Taken]:
        """What changed of members' addresses since it was last asked."""
        taken, self._taken = self._taken, []
        return [one for one in taken if one.holder]

    def holder_of(self, address: str) -> str:
        """Whose it is here; empty: nobody's."""
        one = ipaddress.ip_address(address)
        return self._who().get(one, "") or self._kept.get(one, "")

    def _who(self) -> dict[Address, str]:
        return {
            address: self._holders.get(id_, "")
            for id_, mine in self._held.items()
            for address in mine.values()
        }

    def _ours(self, address: Address) -> _Lent | None:
        lent = self._lent.get(address.version)
        return lent if lent and address in lent.network else None

    def _put(self, address: Address) -> None:
        """It is nobody's: to be given again, if it is of a prefix of ours."""
        lent = self._ours(address)
        if lent and address not in self._elsewhere:
            lent.give(int(address))

    # -- what a member gets -----------------------------------------------------------------

    def assign(
        self, id_: str, asked: IPContext, *, router: bool = False, holder: str = ""
    ) -> IPContext:
        """The context of a connection that ends here; router says who asks is one, holder
        whose it is in the address plan, empty: nobody can say.

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
            self._member(id_, asked, holder)
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
        holder = self._holders.pop(id_, "")
        held = self._held.pop(id_, {})
        for address in {*held.values(), *self._granted.pop(id_, {}).values()}:
            self._put(address)
            self._taken.append(Taken(str(address), holder, left=True))

    def members(self) -> dict[str, tuple[str, ...]]:
        """Connections and the addresses they have, without lengths."""
        return {id_: tuple(map(str, mine.values())) for id_, mine in self._held.items()}

    def _member(self, id_: str, asked: IPContext, holder: str) -> None:
        excluded = excluded_spans(asked.excluded_prefixes)
        mine = dict(self._held.get(id_, {}))
        granted = self._granted.get(id_, {})
        new: list[Address] = []
        for lent in self._in_order():
            version = lent.network.version
            spans = excluded[version]
            if version in mine and not _inside(spans, int(mine[version])):
                continue
            if version in granted and not _inside(spans, int(granted[version])):
                new.append(granted[version])
                continue
            address = self._carried(lent, asked, spans, holder)
            if address is None:
                number = lent.lowest(spans)
                if number is None:
                    raise ExhaustedError(
                        f"no free address for connection {id_} in {lent.network}, of which"
                        f" {len(self._held)} members have one",
                        hint="end members nobody needs, start another router of the domain, or"
                        " have the address plan lend larger prefixes",
                    )
                address = type(lent.own)(number)
            new.append(address)
        self._granted.pop(id_, None)
        for unused in set(granted.values()) - set(new):
            self._taken.append(Taken(str(unused), holder, left=True))
        for address in new:
            self._take(address, holder)
            if before := mine.get(address.version):  # excluded now: another's from here on
                self._put(before)
                self._taken.append(Taken(str(before), holder, left=True))
            mine[address.version] = address
            self._taken.append(Taken(str(address), holder))
        self._held[id_], self._holders[id_] = mine, holder

    def _take(self, address: Address, holder: str) -> None:
        for mine in self._held.values():  # of the same holder's wire before this one
            if mine.get(address.version) == address:
                del mine[address.version]
        self._kept.pop(address, None)
        self._elsewhere.discard(address)
        self._reserved[address.version].discard(int(address))
        if lent := self._ours(address):
            lent.take(int(address))

    def _carried(
        self, lent: _Lent, asked: IPContext, spans: Sequence[tuple[int, int]], holder: str
    ) -> Address | None:
        """The address that a request carries and may have without more words of the address
        plan, as after a restart of either end: it is free, or was this holder's. Where it
        carries none, as after a restart of both, the one that is kept for the holder.
        """
        who = self._who() if holder else {}
        for text in asked.src_ip_addrs:
            one = ipaddress.ip_interface(text).ip if _readable(text) else None
            if one is None or one.version != lent.network.version or _inside(spans, int(one)):
                continue
            if holder and holder in (self._kept.get(one), who.get(one)):
                return one
            free = lent.can_give(int(one)) or int(one) in self._reserved[one.version]
            ours = one in lent.network and one not in (*self._kept, *self._elsewhere)
            if ours and free and one != lent.own:
                return one
        mine = (one for one, who in self._kept.items() if holder and who == holder)
        fits = (one for one in mine if one.version == lent.network.version)
        return next((one for one in fits if not _inside(spans, int(one))), None)

    def _ways(self, asked: Sequence[Route], *, whole: bool) -> tuple[Route, ...]:
        """Routes to us: our address, our prefix and, for members, the whole domain."""
        found: dict[str, Route] = {
            one.prefix: one for one in asked if not self._of_domain(one.prefix)
        }
        for lent in self._in_order():
            by = str(lent.own)
            version = lent.network.version
            wanted = [_host(lent.own), str(lent.network)]
            if whole:
                wanted += [str(one) for one in self._whole(lent) if one.version == version]
            else:
                foreign = map(ipaddress.ip_address, self.foreign)
                wanted += [_host(one) for one in foreign if one.version == version]
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
        the address plan lends nothing twice; but for what it says is elsewhere."""
        if not _readable(text):
            return False
        one = ipaddress.ip_interface(text).network
        ours = [lent.network for lent in self._lent.values()]
        elsewhere = one.num_addresses == 1 and one.network_address in self._elsewhere
        return _within(one, self.known) and (elsewhere or not _within(one, ours))

    def _in_order(self) -> list[_Lent]:
        return [self._lent[one] for one in self._families if one in self._lent]


def _half(lent: _Lent) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface:
    """Upstream's idea of the domain: our address with a mask of half an address's length."""
    return ipaddress.ip_interface(f"{lent.own}/{lent.network.max_prefixlen // 2}")


def _host(address: Address) -> str:
    return f"{address}/{address.max_prefixlen}"


def _of(address: Address, networks: Iterable[Network]) -> bool:
    return any(address in one for one in networks)


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
