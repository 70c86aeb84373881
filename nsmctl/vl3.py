"""`nsmctl vl3`: flat L3 networks that workloads join by name (docs/vl3.md).

A network is a network service in a registry and a pool at an address plan, both of its name.
What is known of it is read from those two each time, so what was done by half, or by others,
is seen as it is: `create` again, or `delete` again, does the rest.
"""

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from nsm import domains, nsurl, ondemand
from nsm.errors import (
    DeniedError,
    InvalidError,
    NotFoundError,
    NsmError,
    PreconditionError,
    TakenError,
)
from nsm.model import Endpoint, Service
from nsm.undo import Undo
from nsmctl import show
from nsmctl.asking import AGENT, MANAGER, Identity, Json, Lab, Manager, Node, asked, left

if TYPE_CHECKING:
    from labs.processes import Process
    from labs.seats import Seat
    from nsm.rpc.peers import Peers
    from nsm.rpc.prefixes import AddressPool, LentPrefix, PoolsClient
    from nsm.rpc.registry import RegistryClient

T = TypeVar("T")
PAYLOAD: Final = "IP"
PLAN: Final = "endpoints.ipam"  # the module of an address plan's process
MOST_SHOWN: Final = 3  # names in a sentence
app = typer.Typer(
    help="Flat L3 networks that workloads join by name.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME[@DOMAIN]", help="As clients ask for it.")]
AddressPlan = Annotated[
    str,
    typer.Option(
        "--address-plan",
        metavar="URL",
        envvar="NSM_PREFIX_SERVER_URL",
        help="Which lends routers their prefixes; a lab's own with --lab.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Though routers offer it and hold prefixes.")]


@dataclass(frozen=True, slots=True)
class Network:
    """What two places know of a network; name is as clients ask for it."""

    name: str
    pool: "AddressPool | None" = None
    service: Service | None = None
    routers: tuple[Endpoint, ...] = ()
    suppliers: tuple[Endpoint, ...] = ()

    @property
    def on_demand(self) -> bool:
        """Whether a router is started where a client asks for one."""
        return bool(self.service and ondemand.is_on_demand(self.service))

    @property
    def state(self) -> str:
        """What there is of it."""
        if self.pool and not self.pool.name:
            return "for routers that name no pool"
        if self.pool and self.service:
            on_demand = ", on demand" if self.on_demand else ""
            return f"{len(self.routers)} router{'' if len(self.routers) == 1 else 's'}{on_demand}"
        return "no service" if self.pool else "no pool"

    @property
    def prefixes(self) -> str:
        """Those of its pool."""
        return ", ".join(self.pool.prefixes) if self.pool else ""

    @property
    def leases(self) -> "Sequence[LentPrefix]":
        """What of its pool is lent."""
        return self.pool.leases if self.pool else ()

    def facts(self) -> dict[str, Any]:
        """For a script."""
        return {
            "name": self.name,
            "state": self.state,
            "pool": self.pool
            and {
                "name": self.pool.name,
                "prefixes": self.pool.prefixes,
                "lengths": {"ipv4": self.pool.ipv4_length, "ipv6": self.pool.ipv6_length},
            },
            "service": self.service
            and {"payload": self.service.payload, "identity": _owner(self.service)},
            "on_demand": self.on_demand,
            "suppliers": [
                {"name": one.name, "node": _node(one, self.name), "identity": _owner(one)}
                for one in self.suppliers
            ],
            "routers": [
                {
                    "name": one.name,
                    "url": one.url,
                    "identity": _owner(one),
                    "expires": one.expires,
                    "prefixes": [lent.prefix for lent in self.leases if lent.owner == _owner(one)],
                }
                for one in self.routers
            ],
            "leases": [
                {"prefix": one.prefix, "identity": one.owner, "ends": one.ends}
                for one in self.leases
            ],
        }


@dataclass(frozen=True, slots=True)
class _Where:
    """The two places, asked as whoever sits there."""

    registry: "RegistryClient"
    plan: "PoolsClient"

    async def pools(self) -> "dict[str, AddressPool]":
        """All pools, by name."""
        return {one.name: one for one in await self.plan.pools()}

    async def network(self, name: str, pools: "dict[str, AddressPool]") -> Network:
        """What is known of one; of no service where another payload's has its name."""
        services, endpoints = await asyncio.gather(
            self.registry.find_services(Service(name=name)),
            self.registry.find_endpoints(Endpoint(services=(name,))),
        )
        offering = sorted((one for one in endpoints if name in one.services), key=_name)
        return Network(
            name,
            pools.get(domains.split(name)[0]),
            next((one for one in services if one.name == name), None),
            tuple(one for one in offering if not ondemand.supplies(one, name)),
            tuple(one for one in offering if ondemand.supplies(one, name)),
        )


# --- the verbs -------------------------------------------------------------------------------


@app.command(
    epilog="Example: nsmctl vl3 create orders-db@meet --prefix 172.16.0.0/16"
    " --prefix 2001:db8:10::/64 --address-plan tcp://198.51.100.7:5006"
)
def create(
    name: Name,
    prefix: Annotated[
        list[str], typer.Option("--prefix", metavar="P", help="Of either family; again for more.")
    ],
    router_prefix_length: Annotated[
        int, typer.Option(min=0, max=32, help="Of what a router gets of IPv4; 0 chooses.")
    ] = 0,
    router_prefix_length_ipv6: Annotated[
        int, typer.Option(min=0, max=128, help="Of what a router gets of IPv6; 0 chooses.")
    ] = 0,
    on_demand: Annotated[
        bool, typer.Option("--on-demand", help="Clients' nodes start routers (`run supplier`).")
    ] = False,
    address_plan: AddressPlan = "",
    lab: Lab = "",
    node: Node = "",
    manager: Manager = MANAGER,
    identity: Identity = AGENT,
    json_: Json = False,
) -> None:
    """Make a network: a pool at the address plan, and a network service.

    What is there already stays; what lacks is made. If one of the two cannot be made, the other
    is taken back.
    """
    from nsm.rpc.prefixes import AddressPool

    _check(name)
    own, _ = domains.split(name)
    wanted = AddressPool(own, tuple(prefix), router_prefix_length, router_prefix_length_ipv6)

    async def work(where: _Where) -> tuple[Network, list[str]]:
        return await _create(where, name, wanted, on_demand=on_demand)

    made, new = _at(work, address_plan, lab, node, manager, identity)
    if json_:
        show.as_json({**made.facts(), "made": new})
        return
    what = " and ".join(new)
    show.line(f"{made.name}  {made.prefixes}  {f'made its {what}' if what else 'was there'}")


@app.command(
    "list", epilog="Example: nsmctl vl3 list --domain meet --address-plan tcp://198.51.100.7:5006"
)
def list_(
    domain: Annotated[
        str, typer.Option("--domain", help="Whose services they are; without, this one's.")
    ] = "",
    address_plan: AddressPlan = "",
    lab: Lab = "",
    node: Node = "",
    manager: Manager = MANAGER,
    identity: Identity = AGENT,
    json_: Json = False,
) -> None:
    """All networks of an address plan, and how many routers offer each.

    A service of IP that has no pool there is of another address plan, no network, or half of one.
    """
    if domain:
        _check(f"x@{domain}")

    async def work(where: _Where) -> list[Network]:
        pools = await where.pools()
        names = {name for name in pools if name}
        if not domain:  # of other domains a registry lists nothing
            found = await where.registry.find_services(Service(payload=PAYLOAD))
            names |= {one.name for one in found}
        joined = [domains.join(name, domain) for name in sorted(names)]
        networks = [await where.network(name, pools) for name in joined]
        return [*([Network("", pools[""])] if "" in pools else []), *networks]

    found = _at(work, address_plan, lab, node, manager, identity)
    if json_:
        show.as_json([one.facts() for one in found])
        return
    if not found:
        show.line("no networks; `nsmctl vl3 create` makes one")
        return
    rows = [(one.name or "-", one.prefixes, one.state, len(one.leases)) for one in found]
    show.table("", ("network", "prefixes", "state", ">lent"), rows)


@app.command(
    "show", epilog="Example: nsmctl vl3 show orders-db --address-plan tcp://198.51.100.7:5006"
)
def show_(
    name: Name,
    address_plan: AddressPlan = "",
    lab: Lab = "",
    node: Node = "",
    manager: Manager = MANAGER,
    identity: Identity = AGENT,
    json_: Json = False,
) -> None:
    """One network: its prefixes, its routers, and which prefix each has."""
    _check(name)

    async def work(where: _Where) -> Network:
        pools = await where.pools()
        return _there(await where.network(name, pools), pools)

    found = _at(work, address_plan, lab, node, manager, identity)
    if json_:
        show.as_json(found.facts())
        return
    show.line("  ".join(filter(None, (found.name, found.prefixes, found.state))))
    if advice := _advice(found):
        show.line(f"  {advice}")
    if found.suppliers:
        nodes = _listed(_node(one, found.name) for one in found.suppliers)
        show.line(f"  its routers are started on {nodes}")
    rows = [
        (lent.prefix, _names(found.routers, lent.owner), lent.owner, left(lent.ends) or "held")
        for lent in found.leases
    ]
    holders = {lent.owner for lent in found.leases}
    rows += [
        ("", one.name, _owner(one), "nothing held")
        for one in found.routers
        if _owner(one) not in holders
    ]
    if rows:
        show.table("", ("prefix", "router", "identity", "lease"), rows)


@app.command(
    epilog="Example: nsmctl vl3 delete orders-db@meet --address-plan tcp://198.51.100.7:5006"
)
def delete(
    name: Name,
    force: Force = False,
    address_plan: AddressPlan = "",
    lab: Lab = "",
    node: Node = "",
    manager: Manager = MANAGER,
    identity: Identity = AGENT,
    json_: Json = False,
) -> None:
    """Forget a network that no router offers any more: its service, then its pool.

    If the pool cannot be forgotten, the service comes back. With --force the wires of its
    members stay until they end; new ones are refused.
    """
    _check(name)

    async def work(where: _Where) -> tuple[Network, list[str], str]:
        pools = await where.pools()
        found = _there(await where.network(name, pools), pools)
        if found.routers and not force:
            raise TakenError(
                f"{name} has {found.state}: {_listed(one.name for one in found.routers)}",
                hint="end them first, or say --force",
            )
        return (found, *await _delete(where, found, force=force))

    found, gone, stays = _at(work, address_plan, lab, node, manager, identity)
    if json_:
        show.as_json({"name": found.name, "forgotten": gone, "stays": stays})
        return
    show.line(f"{found.name}  {found.prefixes}  forgot its {' and '.join(gone) or 'nothing'}")
    if stays:
        show.line(f"  its service stays: {stays}")


# --- what they do ----------------------------------------------------------------------------


async def _create(
    where: _Where, name: str, wanted: "AddressPool", *, on_demand: bool
) -> tuple[Network, list[str]]:
    """The network, and what of it is new."""
    before = await where.network(name, await where.pools())
    if before.service:
        _admit(before.service)
    new = []
    async with Undo() as undo:
        if before.pool is None:
            new.append("pool")
            undo.add(f"forget the pool {wanted.name!r} again", _take_back, where, wanted)
        pool = await where.plan.create(wanted)
        service = before.service
        matches = ondemand.matches(name) if on_demand else ()
        if service is None:
            new.append("service")
            asked_for = Service(name, PAYLOAD, matches)
            undo.add(
                f"forget the service {name!r} again", where.registry.unregister_service, asked_for
            )
            service = (await where.registry.register_service(asked_for)).item
        elif on_demand and service.matches != matches:
            new.append("service's matches")
            asked_for = replace(service, matches=matches, path_ids=())
            undo.add(f"register {name!r} as before", _put_back, where, service)
            service = (await where.registry.register_service(asked_for)).item
    return replace(before, pool=pool, service=service), new


async def _take_back(where: _Where, made: "AddressPool") -> None:
    """Forget a pool, if it is the one that we made."""
    there = (await where.pools()).get(made.name)
    if there and _networks(there) == _networks(made) and not there.leases:
        await where.plan.delete(made.name)


def _networks(pool: "AddressPool") -> set[Any]:
    """Its prefixes, however they are written."""
    return {ipaddress.ip_network(one) for one in pool.prefixes}


async def _delete(where: _Where, found: Network, *, force: bool) -> tuple[list[str], str]:
    """What is gone, and why the service stays if it does."""
    gone, stays = [], ""
    async with Undo() as undo:
        if service := found.service:
            _admit(service)
            undo.add(f"register {found.name!r} again", _put_back, where, service)
            try:
                await where.registry.unregister_service(service)
                gone.append("service")
            except NsmError as refusal:
                if not (force and found.pool and refusal.code == DeniedError.code):
                    raise
                stays = refusal.message
        if found.pool:
            try:
                await where.plan.delete(found.pool.name, force=force)
            except PreconditionError as held:  # which is no fault of this machine
                raise TakenError(held.message, hint=held.hint) from None
            gone.append("pool")
    return gone, stays


async def _put_back(where: _Where, service: Service) -> None:
    await where.registry.register_service(replace(service, path_ids=()))


def _admit(service: Service) -> None:
    """Refuse what is somebody's, and no network of addresses."""
    if service.payload.upper() != PAYLOAD:
        raise TakenError(
            f"{service.name} is a service of payload {service.payload}, which vL3 is not",
            hint="take another name",
        )


def _there(found: Network, pools: "dict[str, AddressPool]") -> Network:
    """The network, of which there is something; else NotFoundError."""
    if found.service and not found.pool:
        _admit(found.service)
    if found.service or found.pool:
        return found
    known = _listed(filter(None, pools)) or "none with a name"
    raise NotFoundError(
        f"there is no {found.name}: no service, and no such pool; the address plan has {known}"
    )


def _advice(found: Network) -> str:
    """What makes a whole of a half."""
    if found.pool and not found.service:
        prefixes = " ".join(f"--prefix {one}" for one in found.pool.prefixes)
        return f"nobody could ask for it: `nsmctl vl3 create {found.name} {prefixes}` completes it"
    if not found.pool:
        return (
            "its routers have no addresses here: `nsmctl vl3 create` with its prefixes completes"
            " it, `nsmctl vl3 delete` forgets it"
        )
    if found.on_demand and not found.suppliers:
        return "nobody starts its routers: `nsmctl run supplier` on each node of its clients does"
    if found.suppliers and not found.on_demand:
        return (
            "its clients are not sent to those who start its routers: `nsmctl vl3 create"
            f" {found.name} --on-demand` with its prefixes does that"
        )
    return ""


def _at(
    work: Callable[[_Where], Awaitable[T]],
    address_plan: str,
    lab: str,
    node: str,
    manager: str,
    identity: str,
) -> T:
    """What work returns."""
    url = _url(address_plan, lab)

    async def ask(seat: "Seat", peers: "Peers") -> T:
        from nsm.rpc.prefixes import PoolsClient
        from nsm.rpc.registry import RegistryClient

        registry = RegistryClient(peers, seat.manager)
        return await work(_Where(registry, PoolsClient(peers, url)))

    return asked(ask, lab, node, manager, identity, also=f"the address plan at {url}")


def _url(address_plan: str, lab: str) -> str:
    """Which address plan is meant."""
    if address_plan:
        found = address_plan.split(",")
        whose = "NSM_PREFIX_SERVER_URL names"
    elif lab:
        from labs import engine, processes

        show.need_root()
        found = plans_of(processes.plan(*engine.running(lab)).processes)
        whose = f"lab {lab} has"
    else:
        raise InvalidError(
            "no address plan is named",
            hint="say --address-plan tcp://HOST:5006, or set NSM_PREFIX_SERVER_URL",
        )
    if len(found) != 1:
        raise InvalidError(
            f"{whose} {f'{len(found)} address plans' if found else 'no address plan'}",
            hint="say one with --address-plan",
        )
    return found[0]


def plans_of(running: "Iterable[Process]") -> list[str]:
    """Where a lab's address plans listen."""
    listened = [
        one.environment["NSM_LISTEN_ON"].split(",") for one in running if one.module == PLAN
    ]
    return [next(url for url in urls if url.startswith("tcp://")) for urls in listened]


def _check(name: str) -> None:
    """Refuse what no client could ask for."""
    domain = domains.domain_of(Service(name=name))
    if domain:
        domains.direct(domain)
    try:
        asked_for = nsurl.parse(f"kernel://{name}/nsm-1").service
    except InvalidError:
        asked_for = ""
    if asked_for != name:
        raise InvalidError(
            f"no client could ask for {name!r}", hint="a name is letters, digits and hyphens"
        )


def _name(one: Endpoint) -> str:
    return one.name


def _node(supplier: Endpoint, service: str) -> str:
    return supplier.labels.get(service, {}).get("nodeName", "")


def _owner(record: Endpoint | Service) -> str:
    return record.path_ids[0] if record.path_ids else ""


def _names(routers: Sequence[Endpoint], owner: str) -> str:
    return ", ".join(one.name for one in routers if _owner(one) == owner) or "(none registered)"


def _listed(names: Any) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - MOST_SHOWN} more" if listed[MOST_SHOWN:] else ""
    return ", ".join(listed[:MOST_SHOWN]) + more
