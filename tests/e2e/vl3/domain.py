"""vL3 domains of real processes: address plans, routers, members.

Each router runs among its node's programs, and its wires end in a namespace of its own. Which
there are is in a lab file: its endpoints are routers, and each service has an address plan, on
the first node of its cluster.
"""

import json
import re
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

from labs.engine import _introduce
from labs.lab import Cluster
from labs.processes import Entry, Plan, Process, Stage, at
from tests.e2e.wires.nodes import Nodes, Program, two_nodes
from tests.support.spaces import Space, ip
from tests.support.wait import until

LAB = two_nodes("""
name: vl3
services:
  net:
    payload: ip
    endpoints:
      r1: {on: one, prefixes: [172.16.0.0/24]}
      r2: {on: two, prefixes: [172.16.0.0/24]}
      r3: {on: two, prefixes: [172.16.0.0/24]}
clients:
  m1: {on: one, connect: ["kernel://net/nsm-1"]}
  m2: {on: one, connect: ["kernel://net/nsm-1"]}
  m3: {on: two, connect: ["kernel://net/nsm-1"]}
  m4: {on: two, connect: ["kernel://net/nsm-1"]}
  m5: {on: two, connect: ["kernel://net/nsm-1"]}
must-be-red: {up: "clients of a test are started by it"}
""")
DOMAIN = "172.16.0.0/16,2001:db8:10::/64"
FIRST_GID = 61_800
FIRST_PORT = 5006  # of address plans


class Domain(Nodes):
    """The lab's nodes. Address plans, routers and members are started by the tests."""

    MORE_MODULES = (
        "endpoints.vl3",
        "endpoints.ipam",
        "tests.e2e.vl3.teller",
        "tests.e2e.vl3.pretender",
    )
    STAGES = (
        Stage.ISSUER,
        Stage.REGISTRY,
        Stage.REGISTRY_PROXY,
        Stage.MANAGER,
        Stage.MANAGER_PROXY,
        Stage.FORWARDER,
    )

    def __init__(self, directory: Path, text: str = LAB, **variables: str) -> None:
        super().__init__(text, directory, **variables)
        self.routers: dict[str, Process] = {}
        self.plans: dict[str, Process] = {}
        self.networks: dict[str, list[str]] = {}
        """The routers of each, by name."""
        self.plan = self._with_domains(self.plan)

    def prepare(self) -> None:
        """Clusters that are federated know one another."""
        _introduce(self.lab, self.paths)

    def _with_domains(self, plan: Plan) -> Plan:
        processes = [one for one in plan.processes if one.stage is not Stage.ENDPOINT]
        entries = list(plan.entries)
        for process in plan.of(Stage.ENDPOINT):
            name = process.name.partition("/")[2]
            endpoint = self.lab.endpoints[name]
            self.networks.setdefault(endpoint.service, []).append(name)
            cluster = self.lab.clusters[endpoint.domain or self.lab.node_of(name).cluster]
            if endpoint.service not in self.plans:
                self.plans[endpoint.service] = self._address_plan(cluster, processes, entries)
            settings = {
                "NSM_PREFIX_SERVER_URL": self.plans[endpoint.service].environment["NSM_LISTEN_ON"],
                "NSM_NAMESPACE": self.space(name).path,
                "NSM_LABELS": f"router:{name}",
                "NSM_REGISTER_SERVICE": "false",
            }
            dropped = ("NSM_PAYLOAD", "NSM_CIDR_PREFIX")
            environment = {k: v for k, v in process.environment.items() if k not in dropped}
            self.routers[name] = replace(
                process,
                module="endpoints.vl3",
                namespace=self.paths.namespace(endpoint.on),
                gid=FIRST_GID + len(entries),
                privileged=True,
                environment={**environment, **settings},
            )
            entries.append(self._entry(f"router/{name}", self.routers[name], endpoint.on))
        return Plan(tuple(processes), tuple(entries))

    def _address_plan(
        self, cluster: Cluster, processes: list[Process], entries: list[Entry]
    ) -> Process:
        name = f"ipam{len(self.plans)}"
        like = next(one for one in processes if one.name == f"{cluster.registry_on}/registry")
        dropped = ("NSM_REGISTRY_URL", "NSM_PROXY_REGISTRY_URL")
        made = replace(
            like,
            name=f"{cluster.registry_on}/{name}",
            module="endpoints.ipam",
            gid=FIRST_GID + len(entries),
            log=self.paths.log(f"{cluster.registry_on}/{name}"),
            environment={
                **{k: v for k, v in like.environment.items() if k not in dropped},
                "NSM_NAME": name,
                "NSM_LISTEN_ON": at(self.lab, cluster, FIRST_PORT + len(self.plans)),
                "NSM_PREFIX": DOMAIN,
                "NSM_STORE": str(self.directory / f"{name}.sqlite"),
            },
        )
        entries.append(self._entry(name, made, cluster.registry_on))
        return made

    def _entry(self, id_: str, process: Process, node: str) -> Entry:
        cluster = self.lab.nodes[node].cluster
        trust_domain = self.lab.clusters[cluster].trust_domain
        dns = id_.replace("/", ".")
        return Entry(cluster, f"spiffe://{trust_domain}/{id_}", process.namespace, process.gid, dns)

    def tell(self) -> None:
        """Register the services, with a choice of routers."""
        for service, routers in self.networks.items():
            plan = self.plans[service]
            node = plan.name.partition("/")[0]
            cluster = self.lab.clusters[self.lab.nodes[node].cluster]
            process = replace(plan, module="tests.e2e.vl3.teller")
            settings = {
                "NSM_CONNECT_TO": at(self.lab, cluster, 5002),
                "TELLER_SERVICE": service,
                "TELLER_ROUTERS": ",".join(routers),
            }
            self.bear(process, f"teller-{service}", **settings).ready()

    def lend(self, service: str = "net", **variables: str) -> Program:
        """Start the service's address plan."""
        process = self.plans[service]
        return self.bear(process, process.name.partition("/")[2], **variables).ready()

    def route(self, name: str, **variables: str) -> Program:
        """Start a router; it says that it is ready when it is registered."""
        return self.bear(self.routers[name], name, **variables).ready()

    def end_clients(self) -> None:
        """Who came last goes first: members before their routers, those before their plan."""
        self.hear(lambda: False, 0.0)
        for program in reversed(self.programs):
            if program not in self.now.values() and program.pid and program.status is None:
                program.end()

    def member(self, place: str, *, at: str = "", near: str = "", **variables: str) -> "Member":
        """Start a member and wait for its wire; at chooses the router, near as long as it lives."""
        url = self.url(place, at)
        url += f"?near={near}" if near else ""
        return Member(self.client(place, url, name=place, **variables), self.space(place))

    def url(self, place: str, at: str = "") -> str:
        """What is asked for in that place."""
        (url,) = self.lab.clients[place].connect
        return f"{url}?at={at}" if at else url


class Member:
    """A member and its namespace."""

    def __init__(self, program: Program, space: Space) -> None:
        self.program = program
        self.space = space

    @property
    def addresses(self) -> list[str]:
        """What it has of the domain, as its kernel says: IPv4 first."""
        (link,) = self.space.ip("addr", "show", "nsm-1")
        found = [one["local"] for one in link["addr_info"] if one["scope"] == "global"]
        return sorted(found, key=lambda one: (ip_address(one).version, one))

    @property
    def mtu(self) -> int:
        """Its wire's, as its kernel says."""
        (link,) = self.space.ip("link", "show", "nsm-1")
        return int(link["mtu"])

    @property
    def router(self) -> str:
        """The router its wire leads to, without its domain."""
        ups = [one for one in map(json.loads, self.program.log) if one.get("state") == "up"]
        return str(ups[-1]["endpoint"]).partition("@")[0]


def routes(space: Space) -> set[str]:
    """All prefixes of the domain that a namespace has a route to."""
    found = [*space.ip("route"), *ip("-6", "-n", space.name, "route")]
    networks = [ip_network(one) for one in DOMAIN.split(",")]
    texts = [str(one["dst"]) for one in found if one["dst"] not in ("default", "multicast")]
    return {
        text
        for text in texts
        for network in networks
        if ip_network(text).version == network.version and ip_network(text).subnet_of(network)
    }


async def unreachable(members: Iterable[Member], *options: str) -> list[str]:
    """Pairs of members that do not reach one another, by every address of either."""
    listed = list(members)
    return [
        f"{one.program.name} → {other.program.name} {address}"
        for one in listed
        for other in listed
        if one is not other
        for address in other.addresses
        if not await one.space.pings(address, *options)
    ]


def full(member: Member, address: str) -> tuple[str, ...]:
    """The options of a ping that fills the wire and must not be cut."""
    headers = 48 if ":" in address else 28
    return "-M", "do", "-s", str(member.mtu - headers)


async def joined(domain: Domain, *names: str, families: int = 2) -> None:
    """Wait until each of those routers has a route to each other's prefixes."""

    def all_known() -> bool:
        found = [routes(domain.space(name)) for name in names]
        wide = [{one for one in each if "/" in one} for each in found]
        return all(len(each) >= families * (len(names) - 1) for each in wide)

    await until(all_known, f"{len(names)} routers to be joined", bar=3)


class Pinging:
    """Pings that go on while something happens; `lost` is how many did not come back."""

    def __init__(self, member: Member, address: str) -> None:
        command = ["ip", "netns", "exec", member.space.name, "ping", "-n", "-q", "-i", "0.02"]
        self._process = subprocess.Popen(
            [*command, address], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def end(self) -> tuple[int, int]:
        """How many were sent, and how many of them came back. The last may be under way."""
        self._process.send_signal(signal.SIGINT)
        said, _ = self._process.communicate(timeout=10)
        match = re.search(r"(\d+) packets transmitted, (\d+) received", said)
        assert match, said
        return int(match[1]), int(match[2])


def lost_of(pinging: Iterable[Pinging]) -> tuple[int, int]:
    """Of how many pings how many were lost, the last of each aside."""
    counts = [one.end() for one in pinging]
    return sum(sent for sent, _ in counts), sum(max(0, sent - got - 1) for sent, got in counts)


def echoes(member: Member) -> int:
    """Echo requests that came to a member."""
    lines = member.space.run("cat", "/proc/net/snmp").stdout.splitlines()
    heads, values = (line.split() for line in lines if line.startswith("Icmp:"))
    return int(values[heads.index("InEchos")])
