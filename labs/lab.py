"""What a lab file says, as values: read once, defaults filled in, references resolved.

Everything the engine does follows from these; nothing here touches the machine,
so `lab check` and `lab show` work for anyone, anywhere.
"""

import ipaddress
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

from labs import schema, units
from labs.source import Source, Where, load, spell
from nsm import domains, nsurl
from nsm.errors import InvalidError
from nsm.model import DNSConfig
from nsm.names import templates

UP: Final = "up"  # the lab's coming up, where else a check's name would be
BRIDGE: Final = "bridge"  # what a switch's own interface is called
SMALLEST_DISK, LARGEST_DISK = 64_000, 256_000_000  # bytes, of memory
SMALLEST, LARGEST = 28, 65_535  # bytes of an IP packet with an echo in it
ON_DEMAND: Final = "on-demand"
IDLE: Final = "15s"  # as upstream's examples
EXAMPLES: Final = "parity"  # the folder of labs of upstream's examples
CLIENT: Final = "{client}"  # in members' names: whose
SLOWEST, FASTEST = 100_000, 30_000_000_000  # bits a second of a link that the kernel can count
LONGEST: Final = 3600.0  # seconds of a check's command, or without a member
LONGEST_LABEL: Final = 63  # characters of a part of a DNS name
RESERVED: Final = (
    "issuer", "dns", "registry", "registry-proxy", "ipam", "nsmgr", "nsmgr-proxy", "forwarder",
    "supplier", "nsmctl", "nursery",
)  # fmt: skip
Family = Literal["ipv4", "ipv6"]
FAMILIES: Final[tuple[Family, Family]] = ("ipv4", "ipv6")


@dataclass(frozen=True, slots=True)
class Cluster:
    """A registry, a trust domain, and the nodes it manages; to others a domain of its name."""

    name: str
    trust_domain: str
    underlay: Family
    registry_on: str
    managers: bool = True  # else floating: a registry that others share
    excluded: tuple[str, ...] = ()  # prefixes of addresses no wire of its nodes may have
    knows: tuple[str, ...] = ()  # the clusters it is federated with
    token_lifetime: str = ""  # as the file has it; "": the programs' own
    disk: int = 0  # bytes of what its stores are on; 0: on the machine's

    @property
    def has_doors(self) -> bool:
        """Whether requests leave for other domains, and those of others come in."""
        return self.managers and bool(self.knows)


@dataclass(frozen=True, slots=True)
class Node:
    """A namespace of the topology: a machine, or a switch (then without cluster and addresses)."""

    name: str
    kind: Literal["node", "switch"]
    cluster: str = ""
    addresses: tuple[str, ...] = ()  # `a/len`, IPv4 first
    forwarders: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # labels; else one

    def address(self, family: Family) -> str:
        """Its underlay address of a family, without the length; `""` if it has none."""
        version = 4 if family == "ipv4" else 6
        for text in self.addresses:
            found = ipaddress.ip_interface(text)
            if found.version == version:
                return str(found.ip)
        return ""


@dataclass(frozen=True, slots=True)
class Port:
    """One end of a cable."""

    node: str
    interface: str

    def __str__(self) -> str:
        return f"{self.node}:{self.interface}"


@dataclass(frozen=True, slots=True)
class Link:
    """A cable between two ports; mtu in bytes, rate in bits a second each way, 0: no limit."""

    ends: tuple[Port, Port]
    mtu: int
    rate: int = 0


@dataclass(frozen=True, slots=True)
class Program:
    """A program of the lab's author, started in a namespace; tcp: the port it is ready on, or 0."""

    name: str
    exec: str
    tcp: int = 0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Somebody who offers a service."""

    name: str
    service: str
    payload: str
    on: str
    prefixes: tuple[str, ...]
    labels: Mapping[str, str]
    run: tuple[Program, ...] = ()
    domain: str = ""  # the floating one it registers in; "" is its node's own
    strict: bool = False  # takes away what addresses another gave a client
    policies: tuple[Mapping[str, Any], ...] = ()  # as a responder reads them
    dns: tuple[DNSConfig, ...] = ()  # whom its clients ask about names
    ruled: bool = False  # its service is registered with its rules, by the lab
    later: bool = False  # it starts when somebody starts it


@dataclass(frozen=True, slots=True)
class Rules:
    """Who serves whom, of a service that its endpoints do not register themselves."""

    service: str
    cluster: str  # whose registry knows it
    payload: str
    matches: tuple[Mapping[str, Any], ...]  # as upstream writes them


@dataclass(frozen=True, slots=True)
class Router:
    """Where members of a network meet on a node: a namespace of its own."""

    name: str
    network: str  # whose, as Lab.networks has it
    on: str


@dataclass(frozen=True, slots=True)
class Network:
    """A flat network (vL3): a service whose clients reach one another through its routers."""

    service: str
    cluster: str  # whose registry knows it, and whose address plan lends its addresses
    floating: bool
    prefixes: tuple[str, ...]
    dns: str = ""  # the template of members' names; "": they have none
    on_demand: bool = False  # routers start on their clients' nodes when somebody asks
    idle: float = 0.0  # seconds without a member after which one of those ends

    @property
    def name(self) -> str:
        """The service with its cluster."""
        return domains.join(self.service, self.cluster)

    @property
    def domain(self) -> str:
        """What its routers add to their names: the floating domain, "" in their own cluster."""
        return self.cluster if self.floating else ""


@dataclass(frozen=True, slots=True)
class Client:
    """Somebody who asks for services (nobody, if netns_only)."""

    name: str
    on: str
    connect: tuple[str, ...] = ()
    netns_only: bool = False
    run: tuple[Program, ...] = ()
    awareness: tuple[tuple[str, ...], ...] = ()  # groups of what it asks for


@dataclass(frozen=True, slots=True)
class Ping:
    """Echoes along wires; size in bytes of the IP packet, 0 for the wire's MTU, -1 for one more."""

    source: str
    target: str
    service: str
    families: tuple[Family, ...]
    strict: bool  # the wire must have all of families
    count: int
    size: int
    lost: int | Literal["all"]


@dataclass(frozen=True, slots=True)
class Datagrams:
    """UDP that is sent back; size as of Ping."""

    source: str
    target: str
    service: str
    families: tuple[Family, ...]
    strict: bool
    count: int
    size: int
    lost: int | Literal["all"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes over TCP along wires."""

    source: str
    target: str
    service: str
    families: tuple[Family, ...]
    strict: bool
    octets: int
    port: int = 0  # 0: any that is free


@dataclass(frozen=True, slots=True)
class Exec:
    """A command in a namespace; timeout in seconds."""

    place: str
    command: str
    timeout: float
    exit: int
    output: str


@dataclass(frozen=True, slots=True)
class Capture:
    """What passes a port while another check runs, or while the clients come `up`."""

    port: Port
    during: str
    sees: tuple[str, ...]
    never: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WireFacts:
    """What the kernel says of clients' wires; empty or 0 is not asked."""

    client: str
    service: str
    mechanism: str
    mtu: int
    endpoint: str = ""
    within: float = 0.0  # seconds until it must be so


@dataclass(frozen=True, slots=True)
class Stop:
    """An endpoint or client that is told to end."""

    process: str


@dataclass(frozen=True, slots=True)
class Broken:
    """What is broken on purpose, of whom, and for how long; see labs/faults.py."""

    what: str  # kill, stop, start, freeze, thaw, end, reboot, link-down, link-up, rate, …
    who: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()  # of nodes, of a partition
    seconds: float | None = None  # until it is taken back; None: it stays
    rate: int = 0  # bits a second


@dataclass(frozen=True, slots=True)
class Over:
    """The wires along which packets flow meanwhile."""

    source: str
    target: str
    service: str


@dataclass(frozen=True, slots=True)
class Faulty:
    """A fault, the traffic meanwhile, and what it may cost that; None: whatever it costs."""

    broken: Broken
    over: Over | None = None
    lost: int | None = None  # datagrams, of all flows, both ways
    healed: float | None = None  # seconds without packets, at most


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table."""

    name: str
    what: Ping | Datagrams | Transfer | Exec | Capture | WireFacts | Stop | Faulty


@dataclass(frozen=True, slots=True)
class Lab:
    """A whole file."""

    name: str
    clusters: Mapping[str, Cluster]
    nodes: Mapping[str, Node]
    links: tuple[Link, ...]
    endpoints: Mapping[str, Endpoint]
    rules: tuple[Rules, ...]
    networks: Mapping[str, Network]  # by service with cluster
    routers: Mapping[str, Router]
    clients: Mapping[str, Client]
    checks: tuple[Check, ...]
    must_be_red: Mapping[str, str]
    discovery: Literal["static", "dns"] = "static"

    @property
    def places(self) -> tuple[str, ...]:
        """Everything with a namespace of its own: nodes, endpoints, routers, clients."""
        return (*self.nodes, *self.endpoints, *self.routers, *self.clients)

    def networks_of(self, client: Client) -> tuple[Network, ...]:
        """Those that a client joins."""
        return _joined(client, self.nodes[client.on], self.networks)

    def is_named(self, client: Client) -> bool:
        """Whether it is told whom to ask about names: of other members, or by an endpoint."""
        if any(network.dns for network in self.networks_of(client)):
            return True
        asked = {domains.split(nsurl.parse(url).service)[0] for url in client.connect}
        return any(one.dns and one.service in asked for one in self.endpoints.values())

    def node_of(self, place: str) -> Node:
        """The node a place is, or stands on. Raises InvalidError naming the nearest."""
        if place in self.nodes:
            return self.nodes[place]
        there = self.endpoints.get(place) or self.routers.get(place) or self.clients.get(place)
        if there is None:
            raise InvalidError(
                f"lab {self.name} has no node, endpoint, router or client {place!r}"
                + schema.nearest(place, list(self.places)),
                hint=f"it has {', '.join(self.places)}",
            )
        return self.nodes[there.on]


def is_name(target: str) -> bool:
    """Whether a check's `to` is a pattern of members' names in DNS."""
    return "{" in target or "}" in target


def serves(service: str, cluster: str, glob: str) -> bool:
    """Whether a glob means a cluster's service: of NAME@CLUSTER if it says one, else of NAME."""
    return fnmatchcase(domains.join(service, cluster) if "@" in glob else service, glob)


def matching(pattern: str, names: Mapping[str, Any] | tuple[str, ...]) -> tuple[str, ...]:
    """The names a glob means, in their own order."""
    return tuple(name for name in names if fnmatchcase(name, pattern))


def find(asked: str) -> Path:
    """A lab file by path, or by the name of one that came with the programs.

    Raises InvalidError with the labs there are.
    """
    path = Path(asked)
    if path.is_file():
        return path
    shipped = {p.stem: p for p in shipped_files()}
    of_examples = {f"{EXAMPLES}/{id_}": p for id_, p in examples().items()}
    if found := shipped.get(asked) or of_examples.get(asked):
        return found
    raise InvalidError(
        f"no lab file {asked!r}" + schema.nearest(asked, [*shipped, *of_examples]),
        hint=f"give a path, or one of {', '.join(sorted(shipped))}",
    )


def shipped_files() -> Iterator[Path]:
    """The lab files that come with the programs."""
    yield from sorted(_home().glob("*.yaml"))


def examples() -> dict[str, Path]:
    """The lab files of upstream's examples, by the example's name."""
    root = _home() / EXAMPLES
    found = {str(p.relative_to(root).with_suffix("")): p for p in sorted(root.rglob("*.yaml"))}
    return {id_: p for id_, p in found.items() if id_ != "index"}


def _home() -> Path:
    return Path(str(resources.files("labs")))


def read(path: Path, *, name: str = "") -> Lab:
    """Read a lab file; name replaces the file's own.

    Raises InvalidError with FILE:LINE, what was found and what was expected.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as wrong:
        raise InvalidError(f"{path}: cannot be read: {wrong}") from None
    return parse(text, str(path), name=name)


def parse(text: str, file: str, *, name: str = "") -> Lab:
    """The lab a text describes; file is what messages call it."""
    source = load(text, file)
    schema.check(source)
    if name:
        source.data["name"] = name
        schema.check(source)
    reader = _Reader(source)
    lab = reader.lab()
    reader.whom(lab)
    return lab


class _Reader:
    """Turns checked data into values, and holds names against one another."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._data: Mapping[str, Any] = source.data

    def _wrong(self, where: Where, says: str) -> InvalidError:
        return InvalidError(f"{self._source.at(where)}: {spell(where)}: {says}")

    def _known(self, where: Where, name: str, known: Mapping[str, Any], kind: str) -> str:
        if name not in known:
            near = schema.nearest(name, list(known)) or f"; there is {', '.join(known) or 'none'}"
            raise self._wrong(where, f"no {kind} {name!r}{near}")
        return name

    def lab(self) -> Lab:
        """The whole, with every reference held against what it refers to."""
        links = self._links()
        nodes = self._nodes(links)
        clusters = self._clusters(nodes)
        for name, node in nodes.items():
            self._reachable(name, node, clusters)
        endpoints = self._endpoints(nodes, clusters)
        networks = self._networks(nodes, clusters, endpoints)
        clients = self._clients(nodes, clusters, endpoints, networks)
        routers = self._routers(nodes, clusters, networks, clients)
        forwarders = {one: on for on in nodes.values() for one in on.forwarders}
        forwarders.pop("forwarder", None)  # what the only one is called
        self._distinct(forwarders, nodes, endpoints, routers, clients)
        return Lab(
            self._data["name"],
            clusters,
            nodes,
            links,
            endpoints,
            self._rules(nodes, endpoints),
            networks,
            routers,
            clients,
            self._checks(nodes, links, endpoints, routers, clients, networks),
            self._data.get("must-be-red", {}),
            self._discovery(clusters),
        )

    # -- topology ---------------------------------------------------------------------------

    def _links(self) -> tuple[Link, ...]:
        nodes = self._data["topology"]["nodes"]
        links, taken = [], set()
        for i, item in enumerate(self._data["topology"].get("links", [])):
            ends = []
            for j, text in enumerate(item["endpoints"]):
                where = ("topology", "links", i, "endpoints", j)
                node, _, interface = text.partition(":")
                self._known(where, node, nodes, "node")
                if text in taken:
                    raise self._wrong(where, f"{text} has two cables")
                own = BRIDGE if nodes[node].get("kind") == "switch" else "lo"
                if interface in ("lo", own):
                    raise self._wrong(where, f"{interface} is there already")
                taken.add(text)
                ends.append(Port(node, interface))
            rate = self._rate(("topology", "links", i, "rate"), item)
            links.append(Link((ends[0], ends[1]), item.get("mtu", 1500), rate))
        return tuple(links)

    def _rate(self, where: Where, item: Mapping[str, Any]) -> int:
        if "rate" not in item:
            return 0
        try:
            rate = units.bits(item["rate"])
        except InvalidError as wrong:
            raise self._wrong(where, wrong.message) from None
        if not SLOWEST <= rate <= FASTEST:
            raise self._wrong(where, f"found {item['rate']}, expected 100kbit to 30Gbit")
        return rate

    def _nodes(self, links: tuple[Link, ...]) -> dict[str, Node]:
        topology = self._data["topology"]
        clusters, kinds = topology["clusters"], topology["nodes"]
        cabled = list(dict.fromkeys(end.node for link in links for end in link.ends))
        self._one_segment(links, kinds)
        drawn = {family: self._drawn(family, kinds, cabled) for family in FAMILIES}
        nodes = {}
        for name, item in kinds.items():
            where = ("topology", "nodes", name)
            if item.get("kind") == "switch":
                for key in ("cluster", "ipv4", "ipv6", "forwarders"):
                    if key in item:
                        raise self._wrong((*where, key), "a switch has none")
                nodes[name] = Node(name, "switch")
                continue
            if "cluster" not in item:
                raise self._wrong(where, '"cluster" is missing')
            cluster = self._known((*where, "cluster"), item["cluster"], clusters, "cluster")
            own = tuple(drawn[family][name] for family in FAMILIES if name in drawn[family])
            nodes[name] = Node(name, "node", cluster, own, item.get("forwarders", {}))
        return nodes

    def _one_segment(self, links: tuple[Link, ...], kinds: Mapping[str, Any]) -> None:
        """All cables must meet: addresses of one prefix in two segments would not reach."""
        ends: dict[str, int] = {}
        for i, link in enumerate(links):
            for j, end in enumerate(link.ends):
                if kinds[end.node].get("kind") != "switch" and end.node in ends:
                    where = ("topology", "links", i, "endpoints", j)
                    raise self._wrong(
                        where,
                        f"{end.node} has two cables: nodes that route are not yet there;"
                        " what works: one cable a node, joined by switches",
                    )
                ends.setdefault(end.node, i)
        joined: set[str] = set()
        reach = {link.ends[0].node for link in links[:1]}
        while reach - joined:
            joined |= reach
            touching = (link for link in links if any(e.node in joined for e in link.ends))
            reach = {end.node for link in touching for end in link.ends}
        for i, link in enumerate(links):
            if link.ends[0].node not in joined:
                raise self._wrong(
                    ("topology", "links", i),
                    f"{link.ends[0]} is in a segment of its own: several segments are not yet"
                    " there; what works: switches joined by a link",
                )

    def _drawn(self, family: Family, kinds: Mapping[str, Any], cabled: list[str]) -> dict[str, str]:
        """Each cabled node's address `a/len`: the given one, or the next free of the prefix."""
        prefix = self._data["topology"].get("underlay", {}).get(family)
        given: dict[str, str] = {n: item[family] for n, item in kinds.items() if family in item}
        for name in given:
            if not prefix:
                where = ("topology", "nodes", name, family)
                raise self._wrong(where, f"topology.underlay.{family} is missing")
        if not prefix:
            return {}
        network = ipaddress.ip_network(prefix)
        owners = self._owners(family, given, network)
        machines = [n for n in cabled if kinds[n].get("kind") != "switch"]
        free = (str(a) for a in network.hosts() if str(a) not in owners)
        found = {}
        for name in machines:
            address = given.get(name) or next(free, None)
            if address is None:
                raise self._wrong(
                    ("topology", "underlay", family),
                    f"{prefix} has no address for {len(machines)} nodes",
                )
            found[name] = f"{address}/{network.prefixlen}"
        return found

    def _owners(
        self, family: Family, given: Mapping[str, str], network: schema.Network
    ) -> dict[str, str]:
        """Whose each given address is, in its shortest form."""
        ends: dict[object, str] = {}
        if network.num_addresses > 2:
            ends[network.network_address] = "own"
            if network.version == 4:
                ends[network.broadcast_address] = "broadcast"
        owners: dict[str, str] = {}
        for name, text in given.items():
            where = ("topology", "nodes", name, family)
            address = ipaddress.ip_address(text)
            if address not in network:
                raise self._wrong(where, f"{text} is outside of {network}")
            if address in ends:
                raise self._wrong(where, f"{text} is the network's {ends[address]} address")
            if str(address) in owners:
                raise self._wrong(where, f"{text} is {owners[str(address)]}'s already")
            owners[str(address)] = name
        return owners

    def _clusters(self, nodes: Mapping[str, Node]) -> dict[str, Cluster]:
        underlay = self._data["topology"].get("underlay", {})
        clusters: dict[str, Cluster] = {}
        domains: dict[str, str] = {}
        for name, item in self._data["topology"]["clusters"].items():
            where = ("topology", "clusters", name)
            item = item or {}
            own = [n.name for n in nodes.values() if n.cluster == name]
            if not own:
                raise self._wrong(where, "no node belongs to it")
            domain = item.get("trust-domain", f"{name}.test")
            if domain in domains:
                raise self._wrong(where, f"trust domain {domain} is {domains[domain]}'s already")
            domains[domain] = name
            registry = item.get("registry-on", own[0])
            if registry not in own:
                raise self._wrong((*where, "registry-on"), f"{registry} is no node of {name}")
            family: Family = item.get("underlay") or ("ipv4" if "ipv4" in underlay else "ipv6")
            managers = item.get("managers", True)
            excluded = tuple(item.get("excluded-prefixes", ()))
            if excluded and not managers:
                raise self._wrong((*where, "excluded-prefixes"), "no wire begins or ends there")
            disk = units.octets(item["disk"]) if "disk" in item else 0
            if "disk" in item and not SMALLEST_DISK <= disk <= LARGEST_DISK:
                raise self._wrong(
                    (*where, "disk"), f"{item['disk']}: 64kB to 256MB, because it is in memory"
                )
            clusters[name] = Cluster(
                name, domain, family, registry, managers, excluded=excluded,
                token_lifetime=item.get("token-lifetime", ""), disk=disk,
            )  # fmt: skip
        return self._federated(clusters)

    def _federated(self, clusters: Mapping[str, Cluster]) -> dict[str, Cluster]:
        """The clusters, each with those it knows."""
        knows: dict[str, list[str]] = {name: [] for name in clusters}
        for i, group in enumerate(self._data["topology"].get("federation", [])):
            for j, name in enumerate(group):
                where = ("topology", "federation", i, j)
                self._known(where, name, clusters, "cluster")
                for other in group[:j]:
                    self._strangers(where, clusters[name], clusters[other], knows)
                    knows[name].append(other)
                    knows[other].append(name)
        for name, cluster in clusters.items():
            if not cluster.managers and not any(clusters[one].managers for one in knows[name]):
                raise self._wrong(
                    ("topology", "clusters", name, "managers"),
                    "a floating domain is for clusters with managers that know it:"
                    f" name {name} and them in topology.federation",
                )
        return {name: replace(one, knows=tuple(knows[name])) for name, one in clusters.items()}

    def _discovery(self, clusters: Mapping[str, Cluster]) -> Literal["static", "dns"]:
        if self._data["topology"].get("discovery", "static") == "static":
            return "static"
        if not any(cluster.knows for cluster in clusters.values()):
            where = ("topology", "discovery")
            raise self._wrong(where, "nobody is looked for: name who knows whom in federation")
        return "dns"

    def _strangers(
        self, where: Where, one: Cluster, other: Cluster, knows: Mapping[str, list[str]]
    ) -> None:
        """Refuse two that know each other already, and two that could not talk."""
        if one is other:
            raise self._wrong(where, f"{one.name} is there twice")
        if other.name in knows[one.name]:
            raise self._wrong(where, f"{other.name} and {one.name} know each other already")
        if one.underlay != other.underlay:
            raise self._wrong(
                where,
                f"{other.name} talks over {other.underlay} and {one.name} over {one.underlay}:"
                " give both the same underlay",
            )

    def _reachable(self, name: str, node: Node, clusters: Mapping[str, Cluster]) -> None:
        if node.kind == "switch":
            return
        family = clusters[node.cluster].underlay
        if not node.address(family):
            raise self._wrong(
                ("topology", "nodes", name),
                f"has no {family} address, which cluster {node.cluster} needs:"
                f" give it a link, and topology.underlay.{family}",
            )

    # -- who offers and who asks ------------------------------------------------------------

    def _machine(self, where: Where, name: str, nodes: Mapping[str, Node]) -> Node:
        self._known(where, name, nodes, "node")
        if nodes[name].kind == "switch":
            raise self._wrong(where, f"{name} is a switch: nothing runs on it")
        return nodes[name]

    def _manager(
        self, where: Where, name: str, nodes: Mapping[str, Node], clusters: Mapping[str, Cluster]
    ) -> Node:
        """A node that has a manager."""
        node = self._machine(where, name, nodes)
        if not clusters[node.cluster].managers:
            raise self._wrong(
                where,
                f"{name} is of the floating domain {node.cluster}: no wire begins or ends there;"
                f" who offers SERVICE@{node.cluster} is on a node of a cluster that knows it",
            )
        return node

    def _endpoints(
        self, nodes: Mapping[str, Node], clusters: Mapping[str, Cluster]
    ) -> dict[str, Endpoint]:
        endpoints: dict[str, Endpoint] = {}
        for key, service in self._data.get("services", {}).items():
            bare, cluster = domains.split(key)
            if cluster:
                self._known(("services", key), cluster, clusters, "cluster")
            floating = cluster if cluster and not clusters[cluster].managers else ""
            for name, item in service.get("endpoints", {}).items():
                where = ("services", key, "endpoints", name)
                node = self._manager((*where, "on"), item["on"], nodes, clusters)
                if cluster:
                    self._may_offer((*where, "on"), node, clusters[cluster], clusters)
                if name in endpoints:
                    raise self._wrong(where, "is there twice: endpoints' names are the lab's")
                self._prefixes((*where, "prefixes"), item["prefixes"])
                endpoints[name] = Endpoint(
                    name,
                    bare,
                    service.get("payload", "ethernet"),
                    node.name,
                    tuple(item["prefixes"]),
                    item.get("labels", {}),
                    self._programs(where, item),
                    floating,
                    item.get("ipam") == "strict",
                    self._policies((*where, "policy-routes"), item),
                    tuple(
                        DNSConfig(tuple(one["servers"]), tuple(one.get("domains", ())))
                        for one in item.get("dns", ())
                    ),
                    "matches" in service,
                    item.get("later", False),
                )
        return endpoints

    def _may_offer(
        self, where: Where, node: Node, whose: Cluster, clusters: Mapping[str, Cluster]
    ) -> None:
        """Refuse a node on which nobody offers a service of that cluster."""
        if not whose.managers:
            self._acquainted(where, clusters[node.cluster], whose.name)
        elif node.cluster != whose.name:
            says = f"{node.name} is of {node.cluster}, the service of {whose.name}"
            raise self._wrong(where, says)

    def _networks(
        self,
        nodes: Mapping[str, Node],
        clusters: Mapping[str, Cluster],
        endpoints: Mapping[str, Endpoint],
    ) -> dict[str, Network]:
        networks: dict[str, Network] = {}
        offered = {(one.service, one.domain or nodes[one.on].cluster) for one in endpoints.values()}
        for key, service in self._data.get("services", {}).items():
            if "vl3" not in service:
                continue
            where: Where = ("services", key)
            item = service["vl3"]
            if service.get("payload", "ip") != "ip":
                raise self._wrong((*where, "payload"), "a flat network (vl3) carries ip")
            bare, cluster = domains.split(key)
            whose = clusters[cluster or self._only(where, clusters)]
            made = Network(
                bare,
                whose.name,
                not whose.managers,
                tuple(item["prefixes"]),
                item.get("dns", ""),
                item["routers"] == ON_DEMAND,
                self._idle((*where, "vl3"), item),
            )
            if made.name in networks or (bare, whose.name) in offered:
                raise self._wrong(where, f"there is a service {made.name} already")
            self._prefixes((*where, "vl3", "prefixes"), item["prefixes"])
            self._apart((*where, "vl3", "prefixes"), made, networks)
            self._template((*where, "vl3", "dns"), made.dns)
            networks[made.name] = made
        return networks

    def _idle(self, where: Where, item: Mapping[str, Any]) -> float:
        if item["routers"] == ON_DEMAND:
            try:
                return _bounded("idle", item.get("idle", IDLE))
            except InvalidError as wrong:
                raise self._wrong(where, wrong.message) from None
        if "idle" in item:
            raise self._wrong((*where, "idle"), f"is for routers: {ON_DEMAND}; these stay")
        return 0.0

    def _template(self, where: Where, text: str) -> None:
        """Refuse what no member could be called by."""
        if not text:
            return
        try:
            templates.parse(text)
        except InvalidError as wrong:
            hint = f"; {wrong.hint}" if wrong.hint else ""
            raise self._wrong(where, f"{wrong.message}{hint}") from None

    def _only(self, where: Where, clusters: Mapping[str, Cluster]) -> str:
        """The cluster that is meant where none is named."""
        if len(clusters) > 1:
            name = where[-1]
            raise self._wrong(
                where, f"whose? {' or '.join(f'{name}@{cluster}' for cluster in clusters)}"
            )
        return next(iter(clusters))

    def _apart(self, where: Where, made: Network, networks: Mapping[str, Network]) -> None:
        """Refuse prefixes that another network of the same address plan has."""
        for other in networks.values():
            for theirs in map(ipaddress.ip_network, other.prefixes):
                for i, own in enumerate(map(ipaddress.ip_network, made.prefixes)):
                    both = other.cluster == made.cluster and own.version == theirs.version
                    if both and own.overlaps(theirs):
                        raise self._wrong((*where, i), f"{own} overlaps {theirs} of {other.name}")

    def _routers(
        self,
        nodes: Mapping[str, Node],
        clusters: Mapping[str, Cluster],
        networks: Mapping[str, Network],
        clients: Mapping[str, Client],
    ) -> dict[str, Router]:
        """By name; one of each network on each node that the file names, or that asks for it."""
        routers: dict[str, Router] = {}
        for key, service in self._data.get("services", {}).items():
            if "vl3" not in service:
                continue
            bare, cluster = domains.split(key)
            network = networks[domains.join(bare, cluster or next(iter(clusters)))]
            where: Where = ("services", key, "vl3", "routers")
            on: Sequence[str] = service["vl3"]["routers"]
            if network.on_demand:
                on = self._asking(network, nodes, networks, clients)
            for i, name in enumerate(on):
                spot = where if network.on_demand else (*where, i)
                node = self._manager(spot, name, nodes, clusters)
                self._may_offer(spot, node, clusters[network.cluster], clusters)
                called = f"{bare.replace('.', '-')}-{name}"
                if called in (*RESERVED, *nodes, *routers):
                    says = f"a router on {name} is called {called}, which is taken"
                    raise self._wrong(spot, says)
                if len(called) > LONGEST_LABEL:
                    says = (
                        f"a router on {name} is called {called}, which has {len(called)} characters"
                        f" and is part of its DNS name: at most {LONGEST_LABEL}"
                    )
                    raise self._wrong(spot, says)
                routers[called] = Router(called, network.name, name)
        return routers

    def _asking(
        self,
        network: Network,
        nodes: Mapping[str, Node],
        networks: Mapping[str, Network],
        clients: Mapping[str, Client],
    ) -> list[str]:
        """The nodes from which somebody asks for a network; refuses those without its routers."""
        found: dict[str, None] = {}
        for client in clients.values():
            node = nodes[client.on]
            if network not in _joined(client, node, networks):
                continue
            if not network.floating and node.cluster != network.cluster:
                raise self._wrong(
                    ("clients", client.name, "connect"),
                    f"{network.name} has its routers {ON_DEMAND}, on nodes of {network.cluster},"
                    f" and {client.name} is on one of {node.cluster}: give the network routers:"
                    " [NODE, ...], or have it in a floating domain",
                )
            found[node.name] = None
        return list(found)

    def _clients(
        self,
        nodes: Mapping[str, Node],
        clusters: Mapping[str, Cluster],
        endpoints: Mapping[str, Endpoint],
        networks: Mapping[str, Network],
    ) -> dict[str, Client]:
        clients = {}
        offers = self._offers(clusters, nodes, endpoints, networks)
        for name, item in self._data.get("clients", {}).items():
            where = ("clients", name)
            alone = item.get("netns-only", False)
            if alone:
                node = self._machine((*where, "on"), item["on"], nodes)
            else:
                node = self._manager((*where, "on"), item["on"], nodes, clusters)
            if alone and (item.get("connect") or item.get("labels")):
                raise self._wrong(where, "netns-only: it connects to nothing and has no labels")
            if not alone and not item.get("connect"):
                raise self._wrong(where, '"connect" is missing, or "netns-only: true"')
            urls = []
            interfaces: set[str] = set()
            for i, text in enumerate(item.get("connect", [])):
                spot = (*where, "connect", i)
                asked = nsurl.parse(text)
                self._offered(spot, asked, clusters[node.cluster], clusters, offers)
                if asked.interface and asked.interface in interfaces:
                    raise self._wrong(spot, f"interface {asked.interface} is asked for twice")
                interfaces.add(asked.interface or "")
                urls.append(_with_labels(asked, item.get("labels", {})))
            clients[name] = Client(
                name,
                node.name,
                tuple(urls),
                alone,
                self._programs(where, item),
                self._awareness(where, item, urls),
            )
        return clients

    def _offers(
        self,
        clusters: Mapping[str, Cluster],
        nodes: Mapping[str, Node],
        endpoints: Mapping[str, Endpoint],
        networks: Mapping[str, Network],
    ) -> dict[str, set[str]]:
        """The services there are in each cluster."""
        offers: dict[str, set[str]] = {name: set() for name in clusters}
        for one in endpoints.values():
            offers[one.domain or nodes[one.on].cluster].add(one.service)
        for network in networks.values():
            offers[network.cluster].add(network.service)
        return offers

    def _offered(
        self,
        where: Where,
        asked: nsurl.NSURL,
        own: Cluster,
        clusters: Mapping[str, Cluster],
        offers: Mapping[str, set[str]],
    ) -> None:
        """A service nobody offers is a typing error, except where the lab wants to be red."""
        if "up" in self._data.get("must-be-red", {}):
            return
        service, domain = domains.split(asked.service)
        if domain:
            self._known(where, domain, clusters, "cluster")
            self._acquainted(where, own, domain)
        there = domain or own.name
        if service in offers[there]:
            return
        elsewhere = [f"{service}@{c}" for c in (own.name, *own.knows) if service in offers[c]]
        near = schema.nearest(service, list(offers[there]))
        if elsewhere:
            near = f"; there is {', '.join(elsewhere)}"
        raise self._wrong(where, f"nobody in {there} offers {service!r}{near}")

    def _acquainted(self, where: Where, own: Cluster, domain: str) -> None:
        """Refuse a domain that a cluster cannot reach. By its own name it needs doors, too."""
        if domain == own.name and not own.knows:
            raise self._wrong(where, f"{own.name} knows no other domain: leave out @{domain}")
        if domain not in (own.name, *own.knows):
            raise self._wrong(
                where, f"{own.name} does not know {domain}: name both in topology.federation"
            )

    def _prefixes(self, where: Where, prefixes: list[str]) -> None:
        networks = [ipaddress.ip_network(text) for text in prefixes]
        for i, network in enumerate(networks):
            if network.num_addresses < 2:
                raise self._wrong((*where, i), f"{network} has not two addresses, as a wire needs")
            for other in networks[:i]:
                if network.version == other.version and network.overlaps(other):
                    raise self._wrong((*where, i), f"{network} overlaps {other}")

    def _rules(
        self, nodes: Mapping[str, Node], endpoints: Mapping[str, Endpoint]
    ) -> tuple[Rules, ...]:
        """The services that have rules: each is one cluster's, and registered by the lab."""
        found = []
        for key, service in self._data.get("services", {}).items():
            if "matches" not in service:
                continue
            where: Where = ("services", key)
            if "vl3" in service:
                raise self._wrong((*where, "matches"), "a flat network (vl3) has its own")
            bare, cluster = domains.split(key)
            on = [nodes[endpoints[name].on].cluster for name in service["endpoints"]]
            if not cluster and len(set(on)) > 1:
                whose = " or ".join(f"{bare}@{one}" for one in dict.fromkeys(on))
                raise self._wrong(where, f"its rules are one cluster's: whose? {whose}")
            matches = tuple(service["matches"])
            payload = service.get("payload", "ethernet")
            found.append(Rules(bare, cluster or on[0], payload, matches))
        return tuple(found)

    def _policies(self, where: Where, item: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
        """Policy routes, each with what a responder can read."""
        for i, one in enumerate(item.get("policy-routes", ())):
            if "from" in one:
                try:
                    ipaddress.ip_interface(one["from"])
                except ValueError as wrong:
                    raise self._wrong((*where, i, "from"), str(wrong)) from None
        return tuple(item.get("policy-routes", ()))

    def _awareness(
        self, where: Where, item: Mapping[str, Any], urls: Sequence[str]
    ) -> tuple[tuple[str, ...], ...]:
        """Groups of what a client asks for, in the words in which it asks."""
        own = {str(nsurl.parse(text)): url
               for text, url in zip(item.get("connect", ()), urls, strict=True)}  # fmt: skip
        groups = []
        for i, group in enumerate(item.get("awareness", ())):
            for j, text in enumerate(group):
                if str(nsurl.parse(text)) not in own:
                    raise self._wrong((*where, "awareness", i, j), f"{text} is not asked for")
            groups.append(tuple(own[str(nsurl.parse(text))] for text in group))
        return tuple(groups)

    def _programs(self, where: Where, item: Mapping[str, Any]) -> tuple[Program, ...]:
        programs: dict[str, Program] = {}
        for i, p in enumerate(item.get("run", [])):
            if p["name"] in programs:
                raise self._wrong((*where, "run", i, "name"), f"{p['name']} is there twice")
            self._command((*where, "run", i, "exec"), p["exec"])
            tcp = p.get("ready", {}).get("tcp", 0)
            programs[p["name"]] = Program(p["name"], p["exec"], tcp)
        return tuple(programs.values())

    def _command(self, where: Where, text: str) -> None:
        """Refuse what no program could be started from."""
        try:
            words = shlex.split(text)
        except ValueError as wrong:
            raise self._wrong(where, str(wrong)) from None
        if not words:
            raise self._wrong(where, "there is no command in it")
        if "\0" in text:
            raise self._wrong(where, "a NUL cannot be in a command")

    def _distinct(self, *kinds: Mapping[str, Any]) -> None:
        """Each name is a namespace's, so no two of them may be equal."""
        seen: set[str] = set(RESERVED)
        for kind in kinds:
            for name in kind:
                if name in seen:
                    asks = name in self._data.get("clients", {})
                    where: Where = ("clients", name) if asks else ("topology", "nodes", name)
                    raise self._wrong(
                        where, "nodes, forwarders, endpoints and clients need names of their own"
                    )
                seen.add(name)

    # -- checks -----------------------------------------------------------------------------

    def whom(self, lab: Lab) -> None:
        """Hold whom faults mean against the processes that the lab comes to."""
        faulty = {c.name: c.what.broken for c in lab.checks if isinstance(c.what, Faulty)}
        if not faulty:
            return
        from labs import processes  # which are made of a whole lab
        from labs.paths import Paths

        known = processes.called(lab, processes.plan(lab, Paths(lab.name)))
        nodes = {name: node for name, node in lab.nodes.items() if node.kind == "node"}
        places = {**lab.clients, **lab.endpoints, **lab.routers}
        disks = {name: cluster for name, cluster in lab.clusters.items() if cluster.disk}
        for i, item in enumerate(self._data["checks"]):
            if item["name"] not in faulty:
                continue
            where: Where = ("checks", i, "fault", (one := faulty[item["name"]]).what)
            for who in (*one.who, *(node for group in one.groups for node in group)):
                place = who.partition(":")[0] if one.what in _CABLES else ""
                if one.what == "fill":
                    self._known(where, who, disks, "cluster with a disk of its own")
                elif one.what in _OF_NODES or place == who:
                    self._known(where, who, nodes, "node")
                elif one.what == "end" or place:
                    self._known(where, place or who, places, "client or endpoint")
                elif one.what == "start":
                    self._known(where, who, {**known, **nodes, **places}, "process or place")
                else:
                    self._known(where, who, known, "process")

    def _checks(
        self,
        nodes: Mapping[str, Node],
        links: tuple[Link, ...],
        endpoints: Mapping[str, Endpoint],
        routers: Mapping[str, Router],
        clients: Mapping[str, Client],
        networks: Mapping[str, Network],
    ) -> tuple[Check, ...]:
        ends = {**endpoints, **clients}
        places = {**nodes, **routers, **ends}
        ports = {str(end): end for link in links for end in link.ends}
        checks: dict[str, Check] = {}
        for i, item in enumerate(self._data.get("checks", [])):
            where: Where = ("checks", i)
            kind = next(k for k in _EXPECTS if k in item)
            asked, expect = item[kind], item.get("expect", {})
            self._expects(where, kind, expect)
            self._named((*where, "name"), item["name"], checks)
            for key in ("from", "to", "client") if kind != "fault" else ():
                if key == "to" and is_name(asked.get(key, "")):
                    self._by_name((*where, kind, key), asked, networks)
                elif key in asked and not matching(
                    asked[key], clients if key == "client" else ends
                ):
                    raise self._wrong((*where, kind, key), f"nobody is called like {asked[key]!r}")
            self._meant(where, kind, item, places, ends, {**endpoints, **routers}, ports, checks)
            try:
                checks[item["name"]] = Check(item["name"], _check(kind, asked, expect, ports))
            except InvalidError as wrong:
                raise self._wrong((*where, kind), wrong.message) from None
        for red in self._data.get("must-be-red", {}):
            if red not in checks and red != UP:
                raise self._wrong(("must-be-red", red), "is no check's name, nor `up`")
        return tuple(checks.values())

    def _meant(
        self,
        where: Where,
        kind: str,
        item: Mapping[str, Any],
        places: Mapping[str, Any],
        ends: Mapping[str, Any],
        far: Mapping[str, Any],
        ports: Mapping[str, Port],
        above: Mapping[str, Check],
    ) -> None:
        """Refuse a check of what is not there."""
        asked, expect = item[kind], item.get("expect", {})
        match kind:
            case "exec":
                self._command((*where, kind, "command"), asked["command"])
                self._known((*where, kind, "in"), asked["in"], places, "place")
            case "stop":
                self._known((*where, kind, "process"), asked["process"], ends, "process")
            case "wire" if "endpoint" in expect:
                spot = (*where, "expect", "endpoint")
                self._known(spot, expect["endpoint"], far, "endpoint or router")
            case "fault":
                self._breakable(where, item, ends)
            case "capture":
                self._known((*where, kind, "on"), asked["on"], ports, "port")
                known = dict.fromkeys((UP, *above))
                self._known((*where, kind, "during"), asked["during"], known, "check above")

    def _breakable(self, where: Where, item: Mapping[str, Any], ends: Mapping[str, Any]) -> None:
        """Refuse a fault that says too little or too much."""
        asked, expect = item["fault"], item.get("expect", {})
        if expect and "over" not in asked:
            raise self._wrong(
                (*where, "expect"),
                "nothing flows: name the wires in fault.over: {from: ..., to: ...}",
            )
        if expect.get("lost") == "all":
            raise self._wrong((*where, "expect", "lost"), "found all, expected a number")
        if ("to" in asked) != ("rate" in asked):
            raise self._wrong((*where, "fault"), "a rate and what it is lowered `to` go together")
        for kind in ("start", "thaw", "link-up", "mend"):
            if kind in asked and "for" in asked:
                raise self._wrong((*where, "fault", "for"), f"means nothing for {kind}")
        for key in ("from", "to"):
            if "over" in asked and not matching(asked["over"][key], ends):
                raise self._wrong(
                    (*where, "fault", "over", key), f"nobody is called like {asked['over'][key]!r}"
                )

    def _by_name(
        self, where: Where, asked: Mapping[str, Any], networks: Mapping[str, Network]
    ) -> None:
        """Refuse a check by names that nobody has."""
        if is_name(asked["to"].replace(CLIENT, "")):
            raise self._wrong(where, f"{asked['to']!r}: what is filled in is {CLIENT}")
        service = asked.get("service", "*")
        there = [one for one in networks.values() if serves(one.service, one.cluster, service)]
        if not any(one.dns for one in there):
            raise self._wrong(
                where,
                f"no member has a name: give the flat network (vl3) that {service!r} means dns",
            )

    def _named(self, where: Where, name: str, checks: Mapping[str, Check]) -> None:
        if name == UP:
            raise self._wrong(where, f"{UP!r} means the lab's coming up: call it otherwise")
        if name in checks:
            raise self._wrong(where, f"{name!r} is there twice")

    def _expects(self, where: Where, kind: str, expect: Mapping[str, Any]) -> None:
        for key in expect:
            if key not in _EXPECTS[kind]:
                known = ", ".join(_EXPECTS[kind]) or "none"
                raise self._wrong(
                    (*where, "expect", key), f"means nothing for {kind}; known: {known}"
                )
        if kind in ("capture", "wire") and not expect:
            known = " or ".join(_EXPECTS[kind])
            raise self._wrong(where, f'"expect" is missing: {known}')


_EXPECTS: Final[Mapping[str, tuple[str, ...]]] = {
    "ping": ("lost",),
    "udp": ("lost",),
    "tcp": ("sha256",),
    "exec": ("exit", "output"),
    "capture": ("sees", "never"),
    "wire": ("mechanism", "mtu", "endpoint"),
    "stop": (),
    "fault": ("lost", "healed"),
}
FOREVER: Final = "ever"
_STAYS: Final[Mapping[str, str]] = {"kill": "0s", "reboot": "0s"}  # what is not said of these
_CABLES: Final = ("link-down", "link-up")  # of a node, or PLACE:INTERFACE
_OF_NODES: Final = ("reboot", "rate", "partition")
FAULTS: Final = (
    "kill", "stop", "start", "freeze", "thaw", "end", "reboot", "link-down", "link-up", "rate",
    "partition", "fill", "mend",
)  # fmt: skip


def _check(
    kind: str, asked: Mapping[str, Any], expect: Mapping[str, Any], ports: Mapping[str, Port]
) -> Ping | Datagrams | Transfer | Exec | Capture | WireFacts | Stop | Faulty:
    family = asked.get("family", "any")
    families: tuple[Family, ...] = FAMILIES if family in ("any", "both") else (family,)
    strict = family != "any"
    service = asked.get("service", "*")
    match kind:
        case "ping" | "udp":
            made = Ping if kind == "ping" else Datagrams
            return made(
                asked["from"], asked["to"], service, families, strict,
                asked.get("count", 3), _size(asked.get("size", "64B")), expect.get("lost", 0),
            )  # fmt: skip
        case "tcp":
            octets, port = units.octets(asked.get("bytes", "1MB")), asked.get("port", 0)
            return Transfer(asked["from"], asked["to"], service, families, strict, octets, port)
        case "exec":
            return Exec(
                asked["in"], asked["command"], _bounded("timeout", asked.get("timeout", "30s")),
                expect.get("exit", 0), expect.get("output", ""),
            )  # fmt: skip
        case "capture":
            return Capture(
                ports[asked["on"]], asked["during"],
                tuple(expect.get("sees", ())), tuple(expect.get("never", ())),
            )  # fmt: skip
        case "stop":
            return Stop(asked["process"])
        case "fault":
            over = asked.get("over")
            return Faulty(
                broken(asked), over and Over(over["from"], over["to"], over.get("service", "*")),
                expect.get("lost"),
                _bounded("healed", expect["healed"]) if "healed" in expect else None,
            )  # fmt: skip
        case _:
            return WireFacts(
                asked["client"], service, expect.get("mechanism", ""), expect.get("mtu", 0),
                expect.get("endpoint", ""), _bounded("within", asked.get("within", "0s")),
            )  # fmt: skip


def broken(asked: Mapping[str, Any]) -> Broken:
    """The fault that a check, or a person, asks for."""
    what = next(kind for kind in FAULTS if kind in asked)
    whom = asked[what]
    stays = asked.get("for", _STAYS.get(what, FOREVER))
    seconds = None if stays == FOREVER else _bounded("for", stays)
    if what == "partition":
        return Broken(what, groups=tuple(tuple(group) for group in whom), seconds=seconds)
    if what == "mend":
        return Broken(what)
    rate = units.bits(asked["to"]) if "to" in asked else 0
    return Broken(what, (whom,) if isinstance(whom, str) else tuple(whom), (), seconds, rate)


def _bounded(key: str, text: str) -> float:
    """Seconds that may be said."""
    seconds = units.seconds(text)
    if seconds > LONGEST:
        raise InvalidError(f"{key}: found {text}, expected up to 60min")
    return seconds


def _size(text: str) -> int:
    """Of a packet in bytes; 0 is the MTU, -1 one more."""
    if text in ("mtu", "mtu+1"):
        return 0 if text == "mtu" else -1
    size = units.octets(text)
    if not SMALLEST <= size <= LARGEST:
        raise InvalidError(f"size: found {text}, expected {SMALLEST}B to {LARGEST}B")
    return size


def _joined(client: Client, node: Node, networks: Mapping[str, Network]) -> tuple[Network, ...]:
    """The networks among what a client asks for; each once."""
    asked = (domains.split(nsurl.parse(url).service) for url in client.connect)
    names = dict.fromkeys(domains.join(bare, domain or node.cluster) for bare, domain in asked)
    return tuple(networks[name] for name in names if name in networks)


def _with_labels(asked: nsurl.NSURL, labels: Mapping[str, str]) -> str:
    """The URL with a client's labels; those of the URL win.

    Upstream's client takes labels from the URL only (`wire.md` §11.3).
    """
    both = {**labels, **asked.labels}
    return str(nsurl.NSURL(asked.mechanism, asked.service, asked.interface, both))
