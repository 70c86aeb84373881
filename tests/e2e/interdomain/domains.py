"""Three domains of real processes, each of a trust domain of its own that knows the others'.

Two have everything: registry, registry proxy, manager's proxy, managers and forwarders. The
third has a registry alone, and endpoints float there. A file says where they are.
"""

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from labs.lab import Family
from labs.processes import Entry, Plan, Process, Stage, host
from nsm.identity.authority import Authority, open_authority
from tests.e2e.interdomain import leaves
from tests.e2e.interdomain.leaves import shown_at
from tests.e2e.wires.nodes import ANYWHERE, Nodes, Program

LAB = """
name: domains
must-be-red: {up: "clients of a test are started by it"}
topology:
  clusters:
    one: {trust-domain: one.test}
    two: {trust-domain: two.test}
    three: {trust-domain: three.test}
  nodes:
    a: {cluster: one}
    b: {cluster: two}
    b2: {cluster: two}
    c: {cluster: three}
    lan: {kind: switch}
  links:
    - {endpoints: ["a:eth0", "lan:p1"]}
    - {endpoints: ["b:eth0", "lan:p2"]}
    - {endpoints: ["b2:eth0", "lan:p3"]}
    - {endpoints: ["c:eth0", "lan:p4"]}
  underlay: {ipv4: 198.18.0.0/24}
services:
  frames: {payload: ethernet, endpoints: {pong: {on: b, prefixes: [172.16.1.0/24]}}}
  packets: {payload: ip, endpoints: {sealed: {on: b, prefixes: [172.16.2.0/24]}}}
  loose: {payload: ip, endpoints: {floater: {on: b2, prefixes: [172.16.3.0/24]}}}
  moving: {payload: ethernet, endpoints: {here: {on: b, prefixes: [172.16.4.0/24]}, there: {on: b2, prefixes: [172.16.4.0/24]}}}
clients:
  app: {on: a, connect: ["kernel://frames/nsm-1"]}
  near: {on: b, connect: ["kernel://frames/nsm-1"]}
  beside: {on: b2, connect: ["kernel://frames/nsm-1"]}
"""  # noqa: E501 - a line for each
SPARE = ("here", "there")  # places of an endpoint that is started by a test
DOORS = {"one": "a", "two": "b"}  # on which node a domain's proxies run
ALONE = "c"  # the node of the domain that has a registry only
FLOATING = {"floater": "three"}  # endpoints that register in another domain
ADDRESSES = {"a": "198.18.0.1", "b": "198.18.0.2", "b2": "198.18.0.3", "c": "198.18.0.4"}
FIRST_GID = 61_900
NO_PORTS: Mapping[str, int] = {}
MANAGER, REGISTRY, PROXY, REGISTRY_PROXY = 5001, 5002, 5004, 5005


class Domains(Nodes):
    """The lab's nodes, with the doors between their domains."""

    MORE_MODULES = ("nsmgr.proxy", "registry.proxy", "tests.e2e.interdomain.looker")

    def __init__(self, directory: Path, *, six: bool = False, **variables: str) -> None:
        """six: nodes have IPv6 only."""
        text = LAB.replace("{ipv4: 198.18.0.0/24}", '{ipv6: "fd00:18::/64"}') if six else LAB
        super().__init__(text, directory, **variables)
        family: Family = "ipv6" if six else "ipv4"
        self.at = {node.name: node.address(family) for node in self.lab.nodes.values()}
        self.spare: dict[str, Process] = {}
        self.plan = self._with_doors(self.plan)

    # -- files that a test may change ----------------------------------------------------------

    def domains_file(self, cluster: str) -> Path:
        """Where a domain has written down where the others are."""
        return Path(self.paths.cluster(cluster, "domains.yaml"))

    def addresses_file(self, cluster: str) -> Path:
        """By which addresses others reach a domain's nodes; not there at first."""
        return Path(self.paths.cluster(cluster, "map-ip.yaml"))

    def labels_file(self, cluster: str) -> Path:
        """What a domain says of itself; not there at first."""
        return Path(self.paths.cluster(cluster, "cluster-info.yaml"))

    def bundle_file(self, cluster: str, of: str) -> Path:
        """What a domain trusts of another's identities."""
        return Path(self.paths.cluster(cluster, "federation", f"{of}.test.pem"))

    def know(self, cluster: str, ports: Mapping[str, int] = NO_PORTS, **places: str) -> None:
        """Write at which addresses domains are, and at which ports some proxies are."""
        known = {name: {"registry": [host(at, REGISTRY)]} for name, at in places.items()}
        for name in DOORS.keys() & places.keys():
            known[name]["nsmgr-proxy"] = [host(places[name], ports.get(name, PROXY))]
        write(self.domains_file(cluster), yaml.safe_dump(known))

    def authority(self, cluster: str) -> Authority:
        """Whom a domain's identities are of."""
        domain = self.lab.clusters[cluster].trust_domain
        return open_authority(Path(self.paths.cluster(cluster, "authority")), domain)

    def prepare(self) -> None:
        """Say where everybody is, and exchange bundles."""
        for cluster in DOORS:
            self.know(
                cluster,
                **{name: self.at[node] for name, node in {**DOORS, "three": ALONE}.items()},
            )
        bundles = {name: self.authority(name).bundle_pem() for name in self.lab.clusters}
        for name in bundles:
            for other in bundles.keys() - {name}:
                self.bundle_file(name, other).parent.mkdir(exist_ok=True)
                self.bundle_file(name, other).write_bytes(bundles[other])

    # -- the plan --------------------------------------------------------------------------------

    def _with_doors(self, plan: Plan) -> Plan:
        processes: list[Process] = []
        entries: list[Entry] = list(plan.entries)
        for process in plan.processes:
            node, _, kind = process.name.partition("/")
            cluster = self.lab.nodes[node].cluster
            if node == ALONE and process.stage in (Stage.MANAGER, Stage.FORWARDER):
                continue
            if kind in SPARE:
                self.spare[kind] = process
                continue
            more: Mapping[str, str] = {}
            if process.stage is Stage.ISSUER:
                more = {"NSM_FEDERATION_DIR": self.paths.cluster(cluster, "federation")}
            elif process.stage is Stage.REGISTRY and cluster in DOORS:
                more = {"NSM_PROXY_REGISTRY_URL": host(self.at[DOORS[cluster]], PROXY)}
            elif kind in FLOATING:
                names = ("NSM_NAME", "NSM_SERVICE_NAMES")
                more = {key: f"{process.environment[key]}@{FLOATING[kind]}" for key in names}
            processes.append(replace(process, environment={**process.environment, **more}))
        for gid, (cluster, node) in enumerate(DOORS.items(), FIRST_GID):
            like = next(one for one in plan.processes if one.name == f"{node}/registry")
            for offset, door in enumerate((self._proxy(cluster, node), self._asker(cluster, node))):
                name, stage, module, settings = door
                own = replace(
                    like,
                    name=f"{node}/{name}",
                    stage=stage,
                    module=module,
                    gid=gid + 10 * offset,
                    log=self.paths.log(f"{node}/{name}"),
                    environment={
                        **{k: v for k, v in like.environment.items() if k != "NSM_STORE"},
                        **settings,
                    },
                )
                processes.append(own)
                id_ = f"spiffe://{cluster}.test/node/{node}/{name}"
                entries.append(Entry(cluster, id_, own.namespace, own.gid, f"{name}.{node}"))
        return Plan(tuple(processes), tuple(entries))

    def _proxy(self, cluster: str, node: str) -> tuple[str, Stage, str, dict[str, str]]:
        return "nsmgr-proxy", Stage.MANAGER, "nsmgr.proxy", {
            "NSM_NAME": f"nsmgr-proxy-{cluster}",
            "NSM_LISTEN_ON": host(self.at[node], PROXY),
            "NSM_REGISTRY_URL": host(self.at[node], REGISTRY),
            "NSM_REGISTRY_PROXY_URL": host(self.at[node], REGISTRY_PROXY),
            "NSM_MAP_IP_FILE_PATH": str(self.addresses_file(cluster)),
            "NSM_CLUSTER_INFO_PATH": str(self.labels_file(cluster)),
        }  # fmt: skip

    def _asker(self, cluster: str, node: str) -> tuple[str, Stage, str, dict[str, str]]:
        return "registry-proxy", Stage.REGISTRY, "registry.proxy", {
            "NSM_NAME": f"registry-proxy-{cluster}",
            "NSM_LISTEN_ON": host(self.at[node], REGISTRY_PROXY),
            "NSM_DOMAINS_PATH": str(self.domains_file(cluster)),
        }  # fmt: skip

    # -- who is who ------------------------------------------------------------------------------

    def leaves(self) -> str:
        """The certificates, in PEM, of all whom a path between domains may cross."""
        inside = {node: [MANAGER] for node in ADDRESSES if node != ALONE}
        for node in DOORS.values():
            inside[node].append(PROXY)
        texts = [shown_at(self.paths.node(node, "forwarder.sock")) for node in inside]
        texts += [shown_at(self._met_at(name)) for name in ("b/pong", "b/sealed", "b2/floater")]
        for node, ports in inside.items():
            places = [word for port in ports for word in (self.at[node], str(port))]
            found = self.space(node).run(sys.executable, leaves.__file__, *places)
            assert found.returncode == 0, found.stderr
            texts.append(found.stdout)
        return "".join(texts)

    def _met_at(self, name: str) -> str:
        """An endpoint's socket, which it makes where nobody else looks."""
        process = Path(f"/proc/{self.now[name].pid}")
        own = {os.readlink(fd) for fd in (process / "fd").iterdir() if fd.is_symlink()}
        lines = [line.split() for line in (process / "net/unix").read_text().splitlines()[1:]]
        (path,) = {  # under which it was made; where it is met is beside that
            line[7] for line in lines if len(line) > 7 and f"socket:[{line[6]}]" in own
        }
        return str(Path(path).with_name("listen.on"))

    def second(self, like: str, name: str, node: str, prefix: str) -> Program:
        """Another endpoint in an endpoint's place and under its identity, on another node."""
        process = self.process(like)
        door = f"unix://{self.paths.node(node, 'nsm.io.sock')}"
        own = {"NSM_NAME": name, "NSM_CONNECT_TO": door, "NSM_CIDR_PREFIX": prefix}
        return self.bear(process, name, **own).ready()

    def mover(self, place: str) -> Program:
        """The one endpoint of the service `moving`, in a spare place: same name, same identity."""
        return self.bear(
            replace(self.spare[place], gid=ANYWHERE), "mover", NSM_NAME="mover"
        ).ready()

    def looker(self, place: str, url: str, **variables: str) -> Program:
        """A client that tells its wire's path with what each token in it says; see looker.py."""
        process = replace(self.process(place), module="tests.e2e.interdomain.looker")
        name = f"looker{len(self.programs)}"
        status = self.paths.status(name)
        own = {"NSM_NAME": name, "LOOKER_URL": url, "LOOKER_STATUS": status}
        program = self.bear(process, name, **own, **variables)
        program.status_file = Path(status)
        return program.ready()


def tcp(node: str, port: int) -> str:
    """The URL of a program on a node."""
    return host(ADDRESSES[node], port)


def write(path: Path, text: str) -> None:
    """Replace a file at once: nobody reads half of it."""
    beside = path.with_suffix(".new")
    beside.write_text(text)
    os.replace(beside, path)


def requests(programs: Iterable[Program]) -> list[int]:
    """How many Requests each granted."""
    granted = '"method": "networkservice.NetworkService/Request"', '"code": "OK"'
    return [sum(all(word in line for word in granted) for line in one.log) for one in programs]
