"""Which processes a lab is made of: their settings, identities and order. Pure.

Each gets a group id of its own, and with its network namespace that is who it is:
the cluster's issuer gives each (namespace, group) its SPIFFE id. So a process of a
lab proves itself as one on a real node does, and no two share an identity.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from labs import nameserver
from labs.lab import Client, Cluster, Endpoint, Lab, Network, Node, Program, Router, Rules
from labs.paths import Paths
from nsm import domains
from nsm.kernel.namespaces import NAMED

FIRST_GID: Final = 61_000  # above what distributions give out; the namespace tells two labs apart
REGISTRY_PORT: Final = 5002
MANAGER_PORT: Final = 5001
MANAGER_PROXY_PORT: Final = 5004
REGISTRY_PROXY_PORT: Final = 5005
ADDRESS_PLAN_PORT: Final = 5006
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
READY_FD: Final = 3


class Stage(IntEnum):
    """The order of starting; stopping goes the other way."""

    ISSUER = 0
    REGISTRY = 1
    ADDRESS_PLAN = 2
    NETWORK = 3
    NAMESERVER = 4
    REGISTRY_PROXY = 5
    MANAGER = 6
    MANAGER_PROXY = 7
    FORWARDER = 8
    ROUTER = 9
    SUPPLIER = 10
    ENDPOINT = 11
    CLIENT = 12
    PROGRAM = 13


MODULES: Final[Mapping[Stage, str]] = {
    Stage.ISSUER: "nsm.process.issuer",
    Stage.REGISTRY: "registry",
    Stage.ADDRESS_PLAN: "endpoints.ipam",
    Stage.NETWORK: "nsmctl",
    Stage.REGISTRY_PROXY: "registry.proxy",
    Stage.MANAGER: "nsmgr",
    Stage.MANAGER_PROXY: "nsmgr.proxy",
    Stage.FORWARDER: "forwarder",
    Stage.ROUTER: "endpoints.vl3",
    Stage.SUPPLIER: "endpoints.supplier",
    Stage.ENDPOINT: "endpoints.responder",
    Stage.CLIENT: "nsm.process.client",
}
WORKLOADS: Final = {Stage.CLIENT: "client", Stage.ENDPOINT: "endpoint", Stage.ROUTER: "router"}
_OF_CLUSTERS: Final = (
    Stage.ISSUER, Stage.REGISTRY, Stage.ADDRESS_PLAN, Stage.NAMESERVER, Stage.REGISTRY_PROXY,
    Stage.MANAGER_PROXY,
)  # fmt: skip
_FOREIGN: Final = (Stage.NAMESERVER, Stage.PROGRAM)
_PRIVILEGED: Final = (
    Stage.ISSUER, Stage.MANAGER, Stage.FORWARDER, Stage.ROUTER, Stage.SUPPLIER,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Process:
    """One process: which program, where, as whom, told what."""

    name: str  # NODE/PROC
    stage: Stage
    namespace: str
    gid: int
    environment: Mapping[str, str] = field(repr=False)
    log: str
    folder: str
    module: str = ""
    argv: tuple[str, ...] = ()  # the module's arguments; a program of the author's without one
    privileged: bool = False
    tcp: int = 0  # it is ready when something listens there; 0: it says so itself
    later: bool = False  # it starts when somebody starts it

    @property
    def is_foreign(self) -> bool:
        """Whether it is a program of others, which does not say that it is ready."""
        return self.stage in _FOREIGN

    @property
    def is_errand(self) -> bool:
        """Whether it does something once: it is ready when it has ended well."""
        return self.stage == Stage.NETWORK

    def order(self) -> dict[str, Any]:
        """What the nursery is told."""
        return {
            "name": self.name,
            "namespace": self.namespace,
            "gid": self.gid,
            "environment": dict(self.environment),
            "log": self.log,
            "folder": self.folder,
            "module": self.module,
            "argv": list(self.argv),
            "privileged": self.privileged,
            "later": self.later,
        }


@dataclass(frozen=True, slots=True)
class Entry:
    """Who a process is: its SPIFFE id, by namespace and group id."""

    cluster: str
    spiffe_id: str
    namespace: str
    gid: int
    dns: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All processes of a lab, and all identities of each cluster."""

    processes: tuple[Process, ...]
    entries: tuple[Entry, ...]
    on_demand: tuple[Process, ...] = ()  # whom suppliers start, and not we

    def of(self, stage: Stage) -> tuple[Process, ...]:
        """The processes of one stage."""
        return tuple(p for p in self.processes if p.stage == stage)


def plan(lab: Lab, paths: Paths) -> Plan:
    """Everything a lab starts, in the order of the file."""
    return _Planner(lab, paths).plan()


def ctl_gid(lab: Lab, node: str) -> int:
    """The group under which `nsmctl` asks on a node."""
    return FIRST_GID + len(lab.places) * 8 + list(lab.nodes).index(node)


def host(address: str, port: int) -> str:
    """`tcp://ADDRESS:PORT`, with brackets where IPv6 wants them."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def at(lab: Lab, cluster: Cluster, port: int) -> str:
    """The URL of a process on a cluster's first node: the one its registry is on."""
    return host(lab.nodes[cluster.registry_on].address(cluster.underlay), port)


def supplied(lab: Lab) -> list[str]:
    """The nodes on which routers start on demand."""
    return list(
        dict.fromkeys(one.on for one in lab.routers.values() if lab.networks[one.network].on_demand)
    )


def routers_of(paths: Paths, node: str) -> str:
    """Where a node's supplier reads how its routers are started."""
    return paths.node(node, "routers.yaml")


def supplier_of(paths: Paths, node: str) -> str:
    """The folder in which a node's supplier notes whom it has started."""
    return paths.node(node, "supplier")


def recipes(plan_: Plan, lab: Lab, node: str) -> dict[str, Any]:
    """What stands there: of each network, how its router on that node is started."""
    found = {}
    for one in plan_.on_demand:
        if lab.node_of(one.name.partition("/")[2]).name == node:
            told = dict(one.environment)
            service, name = told.pop("NSM_SERVICE_NAMES"), told.pop("NSM_NAME")
            namespace, _ = told.pop("NSM_NAMESPACE"), told.pop("NSM_READY_FD")
            found[service] = {
                "name": name,
                "namespace": namespace,
                "module": one.module,
                "gid": one.gid,
                "log": one.log,
                "environment": told,
            }
    return found


def excluded_of(paths: Paths, node: Node) -> str:
    """Where a node's manager reads which addresses no wire may have."""
    return paths.node(node.name, "excluded_prefixes.yaml")


def rules_of(paths: Paths, rules: Rules) -> str:
    """Where a service with its rules is written."""
    return paths.cluster(rules.cluster, f"{rules.service}.yaml")


def policies_of(paths: Paths, endpoint: Endpoint) -> str:
    """Where an endpoint reads its policy routes."""
    return paths.node(endpoint.on, f"{endpoint.name}.policy-routes.yaml")


def domains_of(lab: Lab, cluster: Cluster) -> dict[str, dict[str, list[str]]]:
    """Where the domains are that a cluster knows, and it itself: what NSM_DOMAINS_PATH holds."""
    found = {}
    for name in (cluster.name, *cluster.knows):
        one = lab.clusters[name]
        found[name] = {"registry": [at(lab, one, REGISTRY_PORT)]}
        if one.has_doors:
            found[name]["nsmgr-proxy"] = [at(lab, one, MANAGER_PROXY_PORT)]
    return found


def nameserver_on(lab: Lab) -> str:
    """The node of a lab's DNS server: the floating domain's that there is, or the first."""
    floating = [one for one in lab.clusters.values() if not one.managers]
    return (*floating, *lab.clusters.values())[0].registry_on


def all_domains(lab: Lab) -> dict[str, dict[str, list[str]]]:
    """Where all domains are that anybody knows: what a lab's DNS server says."""
    found: dict[str, dict[str, list[str]]] = {}
    for cluster in lab.clusters.values():
        if cluster.knows:
            found |= domains_of(lab, cluster)
    return found


def called(lab: Lab, plan_: Plan) -> dict[str, str]:
    """NODE/PROC by every name that somebody may call it; the one for people first."""
    all_ = [p for p in (*plan_.processes, *plan_.on_demand) if not p.is_errand]
    found: dict[str, str] = {}
    for process in all_:
        node, _, own = process.name.partition("/")
        kind = WORKLOADS.get(process.stage)
        if kind:
            found |= {f"{kind}:{own}": process.name, own: process.name}
        elif process.stage == Stage.PROGRAM:
            found |= {f"program:{own}": process.name, own: process.name}
        else:
            if process.stage in _OF_CLUSTERS:
                found[f"{own}@{lab.nodes[node].cluster}"] = process.name
            found[f"{own}@{node}"] = process.name
        found[process.name] = process.name
    for stage, kind in ((Stage.ROUTER, "router"), (Stage.FORWARDER, "forwarder")):
        for node in lab.nodes:
            there = [p.name for p in all_ if p.stage == stage and p.name.startswith(f"{node}/")]
            if len(there) == 1:
                found.setdefault(f"{kind}@{node}", there[0])
    return found


class _Planner:
    def __init__(self, lab: Lab, paths: Paths) -> None:
        self._lab = lab
        self._paths = paths
        self._gid = FIRST_GID
        self._processes: list[Process] = []
        self._on_demand: set[str] = set()
        self._entries: list[Entry] = []

    def plan(self) -> Plan:
        for cluster in self._lab.clusters.values():
            self._cluster(cluster)
        if self._lab.discovery == "dns":
            self._nameserver()
        for node in self._lab.nodes.values():
            if node.kind == "node":
                self._node(node)
        self._networks()
        for rules in self._lab.rules:
            self._rules(rules)
        for endpoint in self._lab.endpoints.values():
            self._endpoint(endpoint)
        for client in self._lab.clients.values():
            self._client(client)
        owners: list[Endpoint | Client] = [*self._lab.endpoints.values()]
        owners += self._lab.clients.values()
        for owner in owners:
            for program in owner.run:
                self._program(owner, program)
        started = [p for p in self._processes if p.name not in self._on_demand]
        later = [p for p in self._processes if p.name in self._on_demand]
        return Plan(tuple(started), tuple(self._entries), tuple(later))

    def _cluster(self, cluster: Cluster) -> None:
        self._issuer(cluster)
        self._registry(cluster)
        if any(network.cluster == cluster.name for network in self._lab.networks.values()):
            self._address_plan(cluster)
        if cluster.has_doors:
            self._registry_proxy(cluster)
            self._manager_proxy(cluster)

    def _networks(self) -> None:
        for network in self._lab.networks.values():
            self._network(network)
        for router in self._lab.routers.values():
            self._router(router, self._lab.networks[router.network])
        for node in supplied(self._lab):
            self._supplier(node)

    def _node(self, node: Node) -> None:
        if self._lab.clusters[node.cluster].managers:
            self._manager(node)
            for name, labels in (node.forwarders or {"forwarder": {}}).items():
                self._forwarder(node, name, labels)
        gid = ctl_gid(self._lab, node.name)
        self._entry(node.cluster, f"node/{node.name}/nsmctl", node.name, gid)

    # -- each kind --------------------------------------------------------------------------

    def _issuer(self, cluster: Cluster) -> None:
        name = f"{cluster.registry_on}/issuer"
        settings = {
            "NSM_NAME": f"issuer-{cluster.name}",
            "NSM_TRUST_DOMAIN": cluster.trust_domain,
            "NSM_LISTEN_ON": f"unix://{self._paths.cluster(cluster.name, 'spiffe.sock')}",
            "NSM_ENTRIES": self._paths.cluster(cluster.name, "entries.json"),
            "NSM_ISSUER_DIR": self._paths.authority(cluster.name),
        }
        if cluster.knows:
            settings["NSM_FEDERATION_DIR"] = self._paths.federation(cluster.name)
        self._process(name, Stage.ISSUER, cluster.registry_on, settings)

    def _registry(self, cluster: Cluster) -> None:
        settings = {
            "NSM_NAME": f"registry-{cluster.name}",
            "NSM_LISTEN_ON": self._registry_url(cluster.name),
            "NSM_STORE": self._store(cluster, "registry.sqlite"),
        }
        if cluster.has_doors:
            settings["NSM_PROXY_REGISTRY_URL"] = at(self._lab, cluster, MANAGER_PROXY_PORT)
        on = cluster.registry_on
        self._identified(f"{on}/registry", Stage.REGISTRY, on, f"node/{on}/registry", settings)

    def _rules(self, rules: Rules) -> None:
        """What registers them: the very command that a person would type on that node."""
        cluster = self._lab.clusters[rules.cluster]
        on = cluster.registry_on
        socket = f"unix://{self._paths.cluster(cluster.name, 'spiffe.sock')}"
        argv = ["define", rules_of(self._paths, rules), "--identity", socket,
                "--manager", self._registry_url(cluster.name)]  # fmt: skip
        self._process(
            f"{on}/registry.{rules.service}", Stage.NETWORK, on, {}, argv,
            gid=ctl_gid(self._lab, on),
        )  # fmt: skip

    def _address_plan(self, cluster: Cluster) -> None:
        on = cluster.registry_on
        settings = {
            "NSM_NAME": f"ipam-{cluster.name}",
            "NSM_LISTEN_ON": at(self._lab, cluster, ADDRESS_PLAN_PORT),
            "NSM_STORE": self._store(cluster, "ipam.sqlite"),
            "NSM_OPERATORS": f"spiffe://{cluster.trust_domain}/node/{on}/nsmctl",
        }
        self._identified(f"{on}/ipam", Stage.ADDRESS_PLAN, on, f"node/{on}/ipam", settings)

    def _network(self, network: Network) -> None:
        """What defines it: the very command that a person would type on that node."""
        cluster = self._lab.clusters[network.cluster]
        on = cluster.registry_on
        socket = f"unix://{self._paths.cluster(cluster.name, 'spiffe.sock')}"
        # straight to the registry, in whose own words there is no @
        argv = ["vl3", "create", network.service, "--manager", self._registry_url(cluster.name),
                "--address-plan", at(self._lab, cluster, ADDRESS_PLAN_PORT),
                "--identity", socket]  # fmt: skip
        for prefix in network.prefixes:
            argv += ["--prefix", prefix]
        if network.on_demand:
            argv += ["--on-demand"]
        self._process(
            f"{on}/ipam.{network.service}", Stage.NETWORK, on, {}, argv, gid=ctl_gid(self._lab, on)
        )

    def _router(self, router: Router, network: Network) -> None:
        """It runs among its node's programs; its wires end in its own namespace."""
        settings = {
            "NSM_NAME": domains.join(router.name, network.domain),
            "NSM_CONNECT_TO": self._door(router.on),
            "NSM_SERVICE_NAMES": domains.join(network.service, network.domain),
            "NSM_REGISTER_SERVICE": "false",
            "NSM_PREFIX_SERVER_URL": at(
                self._lab, self._lab.clusters[network.cluster], ADDRESS_PLAN_PORT
            ),
            "NSM_POOL": network.service,
            "NSM_NAMESPACE": f"{NAMED}/{self._paths.namespace(router.name)}",
            "NSM_DNS_TEMPLATES": network.dns,
        }
        id_, name = f"router/{router.name}", f"{router.on}/{router.name}"
        if network.on_demand:
            settings["NSM_IDLE_TIMEOUT"] = f"{network.idle:g}s"
            self._on_demand.add(name)
        self._identified(name, Stage.ROUTER, router.on, id_, settings)
        # and whoever is in that namespace, with `nsmctl lab exec`
        self._entry(self._lab.node_of(router.on).cluster, id_, router.name, self._gid)

    def _supplier(self, node: str) -> None:
        settings = {
            "NSM_NAME": f"supplier-{node}",
            "NSM_CONNECT_TO": self._door(node),
            "NSM_ROUTERS_FILE": routers_of(self._paths, node),
            "NSM_STATE_DIR": supplier_of(self._paths, node),
        }
        id_ = f"node/{node}/supplier"
        self._identified(f"{node}/supplier", Stage.SUPPLIER, node, id_, settings)

    def _registry_proxy(self, cluster: Cluster) -> None:
        settings = {
            "NSM_NAME": f"registry-proxy-{cluster.name}",
            "NSM_LISTEN_ON": at(self._lab, cluster, REGISTRY_PROXY_PORT),
        }
        if self._lab.discovery == "dns":
            server = self._lab.nodes[nameserver_on(self._lab)].address(cluster.underlay)
            settings["NSM_DNS_SERVERS"] = f"[{server}]:53" if ":" in server else f"{server}:53"
        else:
            settings["NSM_DOMAINS_PATH"] = self._paths.domains(cluster.name)
        on = cluster.registry_on
        id_ = f"node/{on}/registry-proxy"
        self._identified(f"{on}/registry-proxy", Stage.REGISTRY_PROXY, on, id_, settings)

    def _nameserver(self) -> None:
        on = nameserver_on(self._lab)
        self._process(
            f"{on}/dns",
            Stage.NAMESERVER,
            on,
            {},
            argv=["sh", self._paths.dns("start")],
            tcp=nameserver.PORT,
            folder=self._paths.dns(),
        )

    def _manager_proxy(self, cluster: Cluster) -> None:
        on = cluster.registry_on
        settings = {
            "NSM_NAME": f"nsmgr-proxy-{cluster.name}",
            "NSM_LISTEN_ON": at(self._lab, cluster, MANAGER_PROXY_PORT),
            "NSM_REGISTRY_URL": self._registry_url(cluster.name),
            "NSM_REGISTRY_PROXY_URL": at(self._lab, cluster, REGISTRY_PROXY_PORT),
            # not this machine's own files, nor any at all
            "NSM_MAP_IP_FILE_PATH": self._paths.cluster(cluster.name, "map-ip.yaml"),
            "NSM_CLUSTER_INFO_PATH": self._paths.cluster(cluster.name, "clusterinfo.yaml"),
            "NSM_OBSERVERS": f"spiffe://{cluster.trust_domain}/node/{on}/nsmctl",
        }
        id_ = f"node/{on}/nsmgr-proxy"
        self._identified(f"{on}/nsmgr-proxy", Stage.MANAGER_PROXY, on, id_, settings)

    def _manager(self, node: Node) -> None:
        domain = self._lab.clusters[node.cluster].trust_domain
        address = node.address(self._lab.clusters[node.cluster].underlay)
        settings = {
            "NSM_NAME": f"nsmgr-{node.name}",
            "NSM_LISTEN_ON": f"{self._door(node.name)},{host(address, MANAGER_PORT)}",
            "NSM_REGISTRY_URL": self._registry_url(node.cluster),
            # not this machine's own file, nor one at all, unless the lab has made it
            "NSM_EXCLUDED_PREFIXES_PATH": excluded_of(self._paths, node),
            "NSM_OBSERVERS": f"spiffe://{domain}/node/{node.name}/nsmctl",
            "NSM_STORE": self._node_store(node, "nsmgr"),
        }
        id_ = f"node/{node.name}/nsmgr"
        self._identified(f"{node.name}/nsmgr", Stage.MANAGER, node.name, id_, settings)

    def _forwarder(self, node: Node, name: str, labels: Mapping[str, str]) -> None:
        cluster = self._lab.clusters[node.cluster]
        settings = {
            "NSM_NAME": f"{name}-{node.name}",
            "NSM_CONNECT_TO": self._door(node.name),
            "NSM_LISTEN_ON": f"unix://{self._paths.node(node.name, f'{name}.sock')}",
            "NSM_TUNNEL_IP": node.address(cluster.underlay),
            "NSM_STORE": self._node_store(node, name),
        }
        if labels:
            settings["NSM_LABELS"] = ",".join(f"{k}:{v}" for k, v in labels.items())
        id_ = f"node/{node.name}/{name}"
        self._identified(f"{node.name}/{name}", Stage.FORWARDER, node.name, id_, settings)

    def _node_store(self, node: Node, name: str) -> str:
        cluster = self._lab.clusters[node.cluster]
        if cluster.disk:
            return f"{self._paths.disk(cluster.name)}/{node.name}.{name}.sqlite"
        return self._paths.node(node.name, f"{name}.sqlite")

    def _endpoint(self, endpoint: Endpoint) -> None:
        # one pool for each prefix: a wire gets addresses of every one (`wire.md` §10.1)
        pools = ",".join(f"[{prefix}]" for prefix in endpoint.prefixes)
        settings = {
            "NSM_NAME": domains.join(endpoint.name, endpoint.domain),
            "NSM_CONNECT_TO": self._door(endpoint.on),
            "NSM_SERVICE_NAMES": domains.join(endpoint.service, endpoint.domain),
            "NSM_PAYLOAD": endpoint.payload.upper(),
            "NSM_CIDR_PREFIX": pools if len(endpoint.prefixes) > 1 else endpoint.prefixes[0],
        }
        # not this machine's own file, nor one at all, unless the lab has made it
        settings["NSM_PBR_CONFIG_PATH"] = policies_of(self._paths, endpoint)
        if endpoint.ruled:
            settings["NSM_REGISTER_SERVICE"] = "false"
        if endpoint.strict:
            settings["NSM_IPAM_POLICY"] = "strict"
        if endpoint.dns:
            settings["NSM_DNS_CONFIGS"] = json.dumps(
                [{"dns_server_ips": one.servers, "search_domains": one.search_domains}
                 for one in endpoint.dns]
            )  # fmt: skip
        if endpoint.labels:
            settings["NSM_LABELS"] = ",".join(f"{k}:{v}" for k, v in endpoint.labels.items())
        name = f"{endpoint.on}/{endpoint.name}"
        id_ = f"endpoint/{endpoint.name}"
        self._identified(name, Stage.ENDPOINT, endpoint.name, id_, settings)

    def _client(self, client: Client) -> None:
        if client.netns_only:  # nobody in it, but whoever enters it with nsmctl is somebody
            self._gid += 1
            cluster = self._lab.node_of(client.name).cluster
            self._entry(cluster, f"client/{client.name}", client.name, self._gid)
            return
        settings = {
            "NSM_NAME": client.name,
            "NSM_CONNECT_TO": self._door(client.on),
            "NSM_NETWORK_SERVICES": ",".join(client.connect),
            "NSM_STATUS_FILE": self._paths.status(client.name),
            "NSM_OUTAGE_LOG": self._paths.outages(client.name),
            "NSM_RESOLV_CONF": self._paths.resolv_conf(client.name),
        }
        if client.awareness:
            groups = ("[" + ",".join(group) + "]" for group in client.awareness)
            settings["NSM_AWARENESS_GROUPS"] = ",".join(groups)
        if self._lab.is_named(client):
            settings["NSM_LOCAL_DNS_SERVER_ENABLED"] = "true"  # or it is not ready
        name = f"{client.on}/{client.name}"
        self._identified(name, Stage.CLIENT, client.name, f"client/{client.name}", settings)

    def _program(self, owner: Endpoint | Client, program: Program) -> None:
        self._process(
            f"{owner.on}/{owner.name}.{program.name}",
            Stage.PROGRAM,
            owner.name,
            {},
            argv=shlex.split(program.exec),
            tcp=program.tcp,
            folder=self._paths.home(owner.name),
        )

    # -- what they share --------------------------------------------------------------------

    def _door(self, node: str) -> str:
        return f"unix://{self._paths.node(node, 'nsm.io.sock')}"

    def _store(self, cluster: Cluster, file: str) -> str:
        """Where a process of a cluster keeps what its next life needs."""
        if cluster.disk:
            return f"{self._paths.disk(cluster.name)}/{file}"
        return self._paths.cluster(cluster.name, file)

    def _registry_url(self, cluster: str) -> str:
        return at(self._lab, self._lab.clusters[cluster], REGISTRY_PORT)

    def _identified(
        self, name: str, stage: Stage, place: str, id_: str, settings: Mapping[str, str]
    ) -> None:
        cluster = self._lab.node_of(place).cluster
        socket = f"unix://{self._paths.cluster(cluster, 'spiffe.sock')}"
        settings = {**settings, "SPIFFE_ENDPOINT_SOCKET": socket}
        if lifetime := self._lab.clusters[cluster].token_lifetime:
            settings["NSM_MAX_TOKEN_LIFETIME"] = lifetime.replace("min", "m")
        gid = self._process(name, stage, place, settings)
        self._entry(cluster, id_, place, gid)

    def _entry(self, cluster: str, id_: str, place: str, gid: int) -> None:
        domain = self._lab.clusters[cluster].trust_domain
        spiffe_id = f"spiffe://{domain}/{id_}"
        dns = ".".join((*reversed(id_.split("/")[1:]), domain))
        self._entries.append(Entry(cluster, spiffe_id, self._paths.namespace(place), gid, dns))

    def _process(
        self,
        name: str,
        stage: Stage,
        place: str,
        settings: Mapping[str, str],
        argv: Sequence[str] = (),
        tcp: int = 0,
        gid: int = 0,
        folder: str = "",
    ) -> int:
        """gid: somebody's who is known already; without, a new one."""
        node = self._lab.node_of(place)
        environment = {
            "PATH": PATH,
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "TMPDIR": self._paths.node(node.name, "tmp"),
            "VWIRE_LAB": f"{self._lab.name}/{name}",
            "NODE_NAME": node.name,
            "CLUSTER_NAME": node.cluster,
        }
        is_foreign = stage in _FOREIGN
        if not is_foreign:
            environment |= {"NSM_LOG_LEVEL": "INFO", "NSM_READY_FD": str(READY_FD), **settings}
        if not gid:
            self._gid += 1
        self._processes.append(
            Process(
                name,
                stage,
                self._paths.namespace(place),
                gid or self._gid,
                environment,
                self._paths.log(name),
                folder or self._paths.folder,
                "" if is_foreign else MODULES[stage],
                tuple(argv),
                stage in _PRIVILEGED or is_foreign,
                tcp,
                later=place in self._lab.endpoints and self._lab.endpoints[place].later,
            )
        )
        return gid or self._gid


def entries(plan_: Plan, cluster: str) -> list[dict[str, Any]]:
    """A cluster's registration entries, as its issuer reads them."""
    return [
        {
            "id": entry.spiffe_id,
            "netns": f"{NAMED}/{entry.namespace}",
            "gid": entry.gid,
            "dns": [entry.dns],
        }
        for entry in plan_.entries
        if entry.cluster == cluster
    ]
