"""A vL3 domain of real processes on two nodes: an address plan, three routers, five members.

Each router runs among its node's programs, and its wires end in a namespace of its own.
"""

import json
import re
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

from labs.processes import Entry, Plan, Process, Stage
from tests.e2e.vl3.names import ROUTERS
from tests.e2e.wires.nodes import Nodes, Program
from tests.support.spaces import Space, ip
from tests.support.wait import until

LAB = """
name: vl3
topology:
  clusters:
    east: {trust-domain: east.test}
  nodes:
    one: {cluster: east}
    two: {cluster: east}
    lan: {kind: switch}
  links:
    - {endpoints: ["one:eth0", "lan:p1"]}
    - {endpoints: ["two:eth0", "lan:p2"]}
  underlay: {ipv4: 198.18.0.0/24}
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
"""
AT = {"r1": "one", "r2": "two", "r3": "two"}
DOMAIN = "172.16.0.0/16,2001:db8:10::/64"
ADDRESSES = {"one": "198.18.0.1", "two": "198.18.0.2"}
PLAN = "tcp://198.18.0.1:5006"
FIRST_GID = 61_950


class Domain(Nodes):
    """The lab's nodes. Address plan, routers and members are started by the tests."""

    MORE_MODULES = ("endpoints.vl3", "endpoints.ipam", "tests.e2e.vl3.teller")

    def __init__(self, directory: Path, **variables: str) -> None:
        super().__init__(LAB, directory, **variables)
        self.routers: dict[str, Process] = {}
        self.plan = self._with_domain(self.plan)

    def _with_domain(self, plan: Plan) -> Plan:
        processes, entries = [], list(plan.entries)
        for process in plan.processes:
            _, _, kind = process.name.partition("/")
            if process.stage is not Stage.ENDPOINT:
                processes.append(process)
                continue
            node, gid = AT[kind], FIRST_GID + ROUTERS.index(kind)
            settings = {
                "NSM_PREFIX_SERVER_URL": PLAN,
                "NSM_NAMESPACE": self.space(kind).path,
                "NSM_LABELS": f"router:{kind}",
                "NSM_REGISTER_SERVICE": "false",
            }
            dropped = ("NSM_PAYLOAD", "NSM_CIDR_PREFIX")
            environment = {k: v for k, v in process.environment.items() if k not in dropped}
            self.routers[kind] = replace(
                process,
                module="endpoints.vl3",
                namespace=self.paths.namespace(node),
                gid=gid,
                privileged=True,
                environment={**environment, **settings},
            )
            id_ = f"spiffe://east.test/router/{kind}"
            entries.append(Entry("east", id_, self.paths.namespace(node), gid, f"{kind}.router"))
        like = next(one for one in processes if one.stage is Stage.REGISTRY)
        gid = FIRST_GID + len(ROUTERS)
        environment = {k: v for k, v in like.environment.items() if k != "NSM_REGISTRY_URL"}
        self.address_plan = replace(
            like,
            name="one/ipam",
            module="endpoints.ipam",
            gid=gid,
            log=self.paths.log("one/ipam"),
            environment={
                **environment,
                "NSM_NAME": "ipam",
                "NSM_LISTEN_ON": PLAN,
                "NSM_PREFIX": DOMAIN,
                "NSM_STORE": str(self.directory / "ipam.sqlite"),
            },
        )
        entries.append(Entry("east", "spiffe://east.test/ipam", like.namespace, gid, "ipam"))
        return Plan(tuple(processes), tuple(entries))

    def tell(self) -> Program:
        """Register the service, with a choice of routers."""
        process = replace(self.process("m1"), module="tests.e2e.vl3.teller")
        return self.bear(process, "teller").ready()

    def lend(self, **variables: str) -> Program:
        """Start the address plan."""
        return self.bear(self.address_plan, "ipam", **variables).ready()

    def route(self, name: str, **variables: str) -> Program:
        """Start a router; it says that it is ready when it is registered."""
        return self.bear(self.routers[name], name, **variables).ready()

    def end_clients(self) -> None:
        """Who came last goes first: members before their routers, those before their plan."""
        self.hear(lambda: False, 0.0)
        for program in reversed(self.programs):
            if program not in self.now.values() and program.pid and program.status is None:
                program.end()

    def member(self, place: str, *, at: str = "", **variables: str) -> "Member":
        """Start a member and wait for its wire; at chooses the router."""
        url = f"kernel://net/nsm-1{'?at=' + at if at else ''}"
        return Member(self.client(place, url, name=place, **variables), self.space(place))


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
        """The router its wire leads to."""
        ups = [one for one in map(json.loads, self.program.log) if one.get("state") == "up"]
        return str(ups[-1]["endpoint"])


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


async def joined(domain: Domain, *names: str) -> None:
    """Wait until each of those routers has a route to each other's prefixes."""

    def all_known() -> bool:
        found = [routes(domain.space(name)) for name in names]
        wide = [{one for one in each if "/" in one} for each in found]
        return all(len(each) >= 2 * (len(names) - 1) for each in wide)

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


def lost(pinging: Iterable[Pinging]) -> tuple[int, int]:
    """Of how many pings how many were lost, the last of each aside."""
    counts = [one.end() for one in pinging]
    return sum(sent for sent, _ in counts), sum(max(0, sent - got - 1) for sent, got in counts)
