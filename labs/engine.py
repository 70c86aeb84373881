"""Bringing a lab up, and taking it down from what is written about it.

Up and down share no memory: down works from the state on disk alone, after a crash
as after a good day. So there is one way of cleaning up, and it is used every time.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml

from labs import alive, disks, nameserver, processes, state
from labs.alive import Mark
from labs.births import Births
from labs.lab import BRIDGE, Lab, Link, Node, matching, parse
from labs.paths import ROOT, Paths
from labs.processes import Stage
from labs.state import State
from labs.wires import wires
from nsm.errors import (
    DeadlineError,
    InvalidError,
    NotFoundError,
    PreconditionError,
    TakenError,
    UnavailableError,
    UnsupportedError,
)
from nsm.kernel import topology, wireguard_go
from nsm.kernel.namespaces import NAMED, create_named, delete_named, list_named
from nsm.kernel.topology import Plug
from nsm.names import resolvconf
from nsm.process import config

Report = Callable[[str], None]
"""Told what is being done, in a few words, whenever that changes."""

IPV6: Final = "/proc/sys/net/ipv6"  # not there where the kernel was booted without
CARRIER: Final = 5.0  # seconds until cables pass packets; some milliseconds in fact
TELLING: Final = 0.5  # seconds a client may take from being ready to having written it
JOINING: Final = 10.0  # seconds until a network's routers are joined; a fraction of one in fact
POLITE: Final = 5.0  # seconds a process may take to end
# A slow machine's managers and forwarders may need longer than upstream's to hear one another; and
# whose WireGuard a lab has is asked of its forwarders.
_HANDED_ON: Final = {
    **dict.fromkeys(
        (Stage.REGISTRY_PROXY, Stage.MANAGER, Stage.MANAGER_PROXY), ("NSM_DIAL_TIMEOUT",)
    ),
    Stage.FORWARDER: ("NSM_DIAL_TIMEOUT", "NSM_WIREGUARD"),
}
_STAGES: Final = {
    Stage.ISSUER: "issuers",
    Stage.REGISTRY: "registries",
    Stage.ADDRESS_PLAN: "address plans",
    Stage.NAMESERVER: "name servers",
    Stage.NETWORK: "networks and rules",
    Stage.REGISTRY_PROXY: "registries' proxies",
    Stage.MANAGER: "managers",
    Stage.MANAGER_PROXY: "managers' proxies",
    Stage.FORWARDER: "forwarders",
    Stage.ROUTER: "routers",
    Stage.SUPPLIER: "suppliers",
    Stage.ENDPOINT: "endpoints",
    Stage.CLIENT: "clients",
    Stage.PROGRAM: "programs",
}


class NotUpError(UnavailableError):
    """There is no such lab now."""


@dataclass(frozen=True, slots=True)
class Up:
    """A lab that is up, and how long each part of that took, in seconds."""

    lab: Lab
    paths: Paths
    seconds: Mapping[str, float]
    cleaned: bool  # something of a crashed engine was in the way


@dataclass(frozen=True, slots=True)
class Gone:
    """A lab taken down: how long it took in seconds, who had to be killed, what is left."""

    seconds: float
    killed: int
    left: tuple[str, ...]


def silent(_: str) -> None:
    """A report to nobody."""


# --- up --------------------------------------------------------------------------------------


def up(
    lab: Lab,
    text: str,
    file: str,
    *,
    replace_it: bool = False,
    report: Report = silent,
    root: str = ROOT,
    modules: Mapping[Stage, str] = processes.MODULES,
    before: Callable[[Stage], None] = lambda _: None,
) -> Up:
    """Bring a lab up; the caller holds its lock. All of it, or nothing of it.

    text is the lab file's; before is called before each stage's processes start. Raises
    TakenError if it is up already, ProcessFailedError with the process and its last words
    if one does not come up.
    """
    paths = Paths(lab.name, root)
    cleaned = _cleared(paths, replace_it=replace_it, report=report)
    try:
        check_machine(lab)
        return _made(lab, text, file, paths, modules, cleaned, report, before)
    except BaseException:
        report("taking it back")
        down(paths, report=silent)
        raise


def _cleared(paths: Paths, *, replace_it: bool, report: Report) -> bool:
    """Make room: refuse a lab that is up, take away what a crash left. Whether it did."""
    _refuse_foreign(paths)
    old = _noted(paths)
    if old is None:
        return False
    if old.phase == "up" and not replace_it:
        raise TakenError(_is_up(paths, old), hint=f"`nsmctl lab down {paths.lab}` or --replace")
    report("taking the old one down" if old.phase == "up" else "clearing what a crash left")
    gone = down(paths, report=silent, keep_folder=True)
    if gone.left:
        raise PreconditionError(f"lab {paths.lab}: cannot clear {', '.join(gone.left)}")
    return old.phase != "up"


def _is_up(paths: Paths, old: State) -> str:
    when = time.strftime("%H:%M", time.localtime(old.since))
    nodes, whole = 0, 0
    with contextlib.suppress(FileNotFoundError, InvalidError):
        lab = saved(paths)
        health = node_health(lab, paths)
        nodes, whole = len(health), sum(health.values())
    return f"lab {paths.lab} is up since {when}, {whole} of {nodes} nodes"


def check_machine(lab: Lab) -> None:
    """Raises UnsupportedError where this machine cannot hold the lab."""
    if sys.platform != "linux":
        raise UnsupportedError("labs need Linux's network namespaces", hint="use a Linux VM")
    if lab.discovery == "dns" and not shutil.which(nameserver.PROGRAM, path=processes.PATH):
        raise UnsupportedError(
            f"lab {lab.name} has its clusters found by DNS, and there is no {nameserver.PROGRAM}",
            hint="apt-get install unbound, or topology.discovery: static",
        )
    wants = any(cluster.underlay == "ipv6" for cluster in lab.clusters.values())
    wants = wants or any(":" in p for e in lab.endpoints.values() for p in e.prefixes)
    wants = wants or any(":" in p for n in lab.networks.values() for p in n.prefixes)
    if wants and not os.path.exists(IPV6):
        raise UnsupportedError(
            f"lab {lab.name} uses IPv6, and this kernel has it switched off",
            hint="boot without ipv6.disable=1, or use an IPv4 lab: one-node",
        )


def _made(
    lab: Lab,
    text: str,
    file: str,
    paths: Paths,
    modules: Mapping[Stage, str],
    cleaned: bool,
    report: Report,
    before: Callable[[Stage], None],
) -> Up:
    seconds: dict[str, float] = {}
    plan = processes.plan(lab, paths)
    wanted = [paths.namespace(place) for place in lab.places]
    if taken := sorted(set(wanted) & set(list_named())):
        raise TakenError(
            f"network namespace {taken[0]} exists already, and is not of lab {lab.name}",
            hint=f"`ip netns del {taken[0]}` if nobody needs it, or --name ANOTHER",
        )
    if kept := [path for one in wanted if os.path.lexists(path := f"{resolvconf.NETNS}/{one}")]:
        raise TakenError(
            f"{kept[0]} is there already, and is not of lab {lab.name}",
            hint="remove it if nobody needs it, or --name ANOTHER",
        )
    now = State(lab.name, file, "making", time.time(), state.me(), dict.fromkeys(wanted, 0))
    state.write(paths, now)
    state.put(paths.text, text)
    _folders(lab, paths)
    needed = {stage: modules[stage] for stage in Stage if plan.of(stage) and stage in modules}
    also = ("nsm.names.resolver",) if any(map(lab.is_named, lab.clients.values())) else ()
    with _clock(seconds, "imports"), Births(paths, (*needed.values(), *also)) as births:
        with _clock(seconds, "network"):
            report(f"network: {len(wanted)} namespaces, {len(lab.links)} links")
            cookies = _network(lab, paths)
        now = replace(now, namespaces=cookies)
        state.write(paths, now)
        _entries(lab, paths, plan)
        _introduce(lab, paths)
        if lab.discovery == "dns":
            _name_places(lab, paths)
        _told_by_files(lab, paths, plan)
        report("imports")
        births.warm()
        with _clock(seconds, "cables"):
            _await_cables(lab, paths)
        for stage in Stage:
            todo = [
                replace(
                    p,
                    module=modules[stage] if p.module else "",
                    environment={
                        **config.for_children(also=_HANDED_ON.get(stage, ())),
                        **p.environment,
                    },
                )
                for p in plan.of(stage)
            ]
            if todo:
                report(f"{_STAGES[stage]}: {len(todo)}")
                before(stage)
                with _clock(seconds, _STAGES[stage]):
                    births.bear(todo)
            if stage is Stage.CLIENT:
                _hear_of_wires(lab, paths)
                if lab.networks:
                    with _clock(seconds, "routers' wires"):
                        _await_routers(lab, paths)
        state.write(paths, replace(now, phase="up", since=time.time()))
    seconds["imports"] -= sum(v for k, v in seconds.items() if k != "imports")
    return Up(lab, paths, seconds, cleaned)


def _folders(lab: Lab, paths: Paths) -> None:
    for folder in paths.folders(tuple(lab.nodes), tuple(lab.clusters)):
        os.makedirs(folder, exist_ok=True)
    for place in (*lab.endpoints, *lab.clients):
        os.makedirs(paths.home(place))
    os.mkfifo(paths.orders, 0o600)
    for cluster in lab.clusters.values():
        if cluster.disk:
            disks.mount(paths.disk(cluster.name), cluster.disk)


def _await_cables(lab: Lab, paths: Paths) -> None:
    """Wait until every cable passes packets: a first one that is lost costs TCP a second."""
    end = time.monotonic() + CARRIER
    for port in [end_ for link in lab.links for end_ in link.ends]:
        while not topology.carries(paths.namespace(port.node), port.interface):
            if time.monotonic() > end:
                raise DeadlineError(f"{port} passes no packets {CARRIER:g} s after it was made")
            time.sleep(0.01)


def _await_routers(lab: Lab, paths: Paths) -> None:
    """Wait until those of a network that have members know the way to one another."""
    end = time.monotonic() + JOINING
    of = {wire.endpoint: wire.network for wire in wires(lab, paths) if wire.endpoint in lab.routers}
    own = {name: topology.addresses(paths.namespace(name), "lo") for name in of}
    for a, b in itertools.permutations(of, 2):
        for address in own[b] if of[a] == of[b] else ():
            while not topology.leads(paths.namespace(a), address):
                if time.monotonic() > end:
                    raise DeadlineError(
                        f"{a} has no way to {address}, which is {b}'s, {JOINING:g} s after members"
                        " have joined both",
                        hint=f"nsmctl lab logs {a} --lab {lab.name}",
                    )
                time.sleep(0.01)


def _hear_of_wires(lab: Lab, paths: Paths) -> None:
    """Wait for the status files: a client may say that it is ready just before it writes."""
    end = time.monotonic() + TELLING
    for client in lab.clients.values():
        while len(state.statuses(paths, client.name)) < len(client.connect):
            if time.monotonic() > end:
                return  # the tables show what is told
            time.sleep(0.01)


@contextlib.contextmanager
def _clock(seconds: dict[str, float], what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[what] = time.monotonic() - start


def _network(lab: Lab, paths: Paths) -> dict[str, int]:
    """Namespaces, cables, bridges, addresses; the cookie of each namespace."""
    cookies = {}
    for place in lab.places:
        create_named(paths.namespace(place))
        cookies[paths.namespace(place)] = topology.cookie_named(paths.namespace(place))
    for link in lab.links:
        cable(paths, link)
    for client in lab.clients:
        at_home(paths.namespace(client))
    ends = [end for link in lab.links for end in link.ends]
    for node in lab.nodes.values():
        if node.kind == "switch":
            ports = [end.interface for end in ends if end.node == node.name]
            topology.bridge(paths.namespace(node.name), BRIDGE, ports)
        else:
            address(lab, paths, node)
    return cookies


def cable(paths: Paths, link: Link) -> None:
    """Make one of a lab's cables between two namespaces that are there."""
    a, b = (Plug(paths.namespace(end.node), end.interface) for end in link.ends)
    topology.cable(a, b, link.mtu)
    for end in (a, b) if link.rate else ():
        topology.slow_down(end.namespace, end.interface, link.rate)


def address(lab: Lab, paths: Paths, node: Node) -> None:
    """Give a node's interfaces their addresses, those that this kernel can."""
    able = [a for a in node.addresses if ":" not in a or os.path.exists(IPV6)]
    for end in (end for link in lab.links for end in link.ends if end.node == node.name):
        topology.configure(paths.namespace(node.name), end.interface, able)


def at_home(namespace: str) -> None:
    """What a workload has of its own: a resolv.conf, and ports below 1024, as in a container.

    The file names no server, because none of the machine's is reached from there.
    """
    resolvconf.private(namespace, "")
    topology.open_low_ports(namespace)


def _entries(lab: Lab, paths: Paths, plan: processes.Plan) -> None:
    for cluster in lab.clusters:
        with open(paths.cluster(cluster, "entries.json"), "w") as out:
            json.dump(processes.entries(plan, cluster), out, indent=1)


def _told_by_files(lab: Lab, paths: Paths, plan: processes.Plan) -> None:
    """What the mesh's programs read from files, as a cluster's operator would write them."""
    for name in processes.supplied(lab):
        text = yaml.safe_dump(processes.recipes(plan, lab, name))
        state.put(processes.routers_of(paths, name), text)
    for node in lab.nodes.values():
        if node.kind == "node" and (excluded := lab.clusters[node.cluster].excluded):
            text = yaml.safe_dump({"prefixes": list(excluded)})
            state.put(processes.excluded_of(paths, node), text)
    for endpoint in lab.endpoints.values():
        if endpoint.policies:
            text = yaml.safe_dump([dict(one) for one in endpoint.policies])
            state.put(processes.policies_of(paths, endpoint), text)
    for rules in lab.rules:
        resource = {
            "apiVersion": "networkservicemesh.io/v1",
            "kind": "NetworkService",
            "metadata": {"name": rules.service},
            "spec": {"payload": rules.payload.upper(), "matches": list(rules.matches)},
        }
        state.put(processes.rules_of(paths, rules), yaml.safe_dump(resource, sort_keys=False))


def _introduce(lab: Lab, paths: Paths) -> None:
    """Make clusters that are federated known to each other: by their bundles, and where they are.

    That is done before an issuer starts, because one that is running looks for new bundles
    only now and then.
    """
    federated = [cluster for cluster in lab.clusters.values() if cluster.knows]
    if not federated:
        return
    from nsm.identity.authority import open_authority  # a tenth of a second that few labs need

    bundles = {
        cluster.name: open_authority(
            Path(paths.authority(cluster.name)), cluster.trust_domain
        ).bundle_pem()
        for cluster in federated
    }
    for cluster in federated:
        folder = Path(paths.federation(cluster.name))
        folder.mkdir(exist_ok=True)
        for name in cluster.knows:
            (folder / f"{lab.clusters[name].trust_domain}.pem").write_bytes(bundles[name])
        if cluster.has_doors and lab.discovery == "static":
            known = processes.domains_of(lab, cluster)
            state.put(paths.domains(cluster.name), yaml.safe_dump(known, sort_keys=False))


def _name_places(lab: Lab, paths: Paths) -> None:
    """Have the lab's DNS server say where the clusters are."""
    places = processes.all_domains(lab)
    os.makedirs(paths.dns())
    for zone, text in nameserver.zones(places).items():
        state.put(paths.dns(f"{zone}.zone"), text)
    addresses = [one.partition("/")[0] for one in lab.nodes[processes.nameserver_on(lab)].addresses]
    state.put(paths.dns("conf"), nameserver.configuration(paths.dns(), addresses, places))
    program = shutil.which(nameserver.PROGRAM, path=processes.PATH)
    assert program, "looked for before anything was made"
    with open(program, "rb") as file:
        start = nameserver.start(program, file.read(nameserver.HEAD), paths.dns("conf"))
    state.put(paths.dns("start"), start)


def made_by_us(paths: Paths) -> bool:
    """Whether there is such a lab, and this process made it."""
    now = state.read(paths)
    return now is not None and now.engine == state.me()


# --- down ------------------------------------------------------------------------------------


def down(paths: Paths, *, report: Report = silent, keep_folder: bool = False) -> Gone:
    """Take a lab down, whatever state it is in; the caller holds its lock.

    First whoever has something to take back politely, last what can simply go. A Ctrl-C
    meanwhile waits until all of it is done, which is bounded.
    """
    with undisturbed():
        return _taken_down(paths, report, keep_folder=keep_folder)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Whoever asks for the end meanwhile is obeyed afterwards.

    Handlers and no mask, because a mask is one thread's: the signal would go to another,
    and its handler would run in this one all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # no handler ever runs here
        return
    heard: list[int] = []
    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.signal(number, lambda number, _: heard.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in dict.fromkeys(heard):
            signal.raise_signal(late)


def _taken_down(paths: Paths, report: Report, *, keep_folder: bool) -> Gone:
    start = time.monotonic()
    _refuse_foreign(paths)
    now = _noted(paths)
    if now is not None:
        state.write(paths, replace(now, phase="going", engine=state.me()))
    children = state.born(paths)
    killed = 0
    for what, group in _goodbyes(paths, children):
        report(f"{what}: {len(group)}")
        killed += alive.stop(group, POLITE)
    if "nursery" in children:
        alive.stop([children["nursery"].mark], POLITE)
        with contextlib.suppress(ChildProcessError):  # it is ours if this process made the lab
            os.waitpid(children["nursery"].mark.pid, os.WNOHANG)
    # whom the nursery bore while it was being stopped, and whoever else came into the lab
    alive.kill([child.mark for child in state.born(paths).values()])
    names = _own(now.namespaces if now else {})
    # a number is a namespace's as long as that is there: soon after, it may be another's
    inodes = [topology.inode_named(name) for name in list_named() if name in names]
    alive.kill(alive.inside(inodes))
    stubborn = alive.inside(inodes)
    sockets = wireguard_go.tidy(_cookies(now.namespaces if now else {}, names))
    report(f"namespaces: {len(names)}")
    for name in names:
        resolvconf.forget(name)
        delete_named(name)
    disks.unmount(paths.folder)
    left = [*_left(paths, names, stubborn), *(f"socket {path}" for path in sockets)]
    if not left:
        if keep_folder:
            _empty(paths)
        else:
            state.remove(paths)
            left = [paths.folder] if os.path.exists(paths.folder) else []
    return Gone(time.monotonic() - start, killed, tuple(left))


def _refuse_foreign(paths: Paths) -> None:
    """Raises TakenError rather than remove what no lab has made."""
    if state.is_foreign(paths):
        raise TakenError(
            f"{paths.folder} is no lab's: there is no state.json in it",
            hint=f"look into it, and remove it yourself, or take another name than {paths.lab}",
        )


def _noted(paths: Paths) -> State | None:
    """The state; where it is broken, what the lab's file says there must be.

    Raises InvalidError where that is broken too.
    """
    try:
        return state.read(paths)
    except InvalidError as broken:
        try:
            lab = saved(paths)
        except (FileNotFoundError, InvalidError):
            raise InvalidError(
                f"{broken.message}, and {paths.text} does not tell either what there is of the lab",
                hint=f"end its processes, `ip netns del` its namespaces, remove {paths.folder}",
            ) from None
    lives = any(child.mark.alive for child in state.born(paths).values())
    names = dict.fromkeys((paths.namespace(place) for place in lab.places), 0)
    phase = "up" if lives else "going"
    return State(lab.name, paths.text, phase, time.time(), state.me(), names)


def _goodbyes(paths: Paths, children: Mapping[str, state.Born]) -> Iterator[tuple[str, list[Mark]]]:
    """Who is stopped together: clients and programs, endpoints, routers, then the rest.

    Whoever takes a registration back needs the mesh for that.
    """
    groups: dict[str, list[Mark]] = {"clients": [], "endpoints": [], "routers": [], "the mesh": []}
    lab = None
    with contextlib.suppress(FileNotFoundError, InvalidError):
        lab = saved(paths)
    for name, child in children.items():
        if name == "nursery" or not child.mark.alive:
            continue
        who = name.partition("/")[2].partition(".")[0]
        if lab and who in lab.endpoints:
            groups["endpoints"].append(child.mark)
        elif lab and (who in lab.routers or who == "supplier"):
            groups["routers"].append(child.mark)
        elif lab and who in lab.clients:
            groups["clients"].append(child.mark)
        else:
            groups["the mesh"].append(child.mark)
    yield from ((what, group) for what, group in groups.items() if group)


def _own(namespaces: Mapping[str, int]) -> list[str]:
    """The names of a lab's that are not another's by now, by the cookies noted for them."""
    own = []
    for name, cookie in namespaces.items():
        found = cookie
        # a file on which nothing is mounted is what an engine leaves that dies while it mounts
        with contextlib.suppress(NotFoundError, InvalidError):
            found = topology.cookie_named(name)
        if cookie in (0, found):
            own.append(name)
    return own


def _cookies(noted: Mapping[str, int], names: Sequence[str]) -> set[int]:
    """Those of a lab's namespaces, as noted or as they are."""
    found = set(noted.values())
    for name in names:
        with contextlib.suppress(NotFoundError, InvalidError):
            found.add(topology.cookie_named(name))
    return found - {0}


def _left(paths: Paths, names: Sequence[str], stubborn: Sequence[Mark]) -> list[str]:
    left = [f"namespace {name}" for name in names if os.path.lexists(f"{NAMED}/{name}")]
    left += [path for name in names if os.path.lexists(path := f"{resolvconf.NETNS}/{name}")]
    left += [f"process {mark.pid}" for mark in stubborn if mark.alive]
    born = state.born(paths).values()
    left += [f"process {child.mark.pid} ({child.name})" for child in born if child.mark.alive]
    return left


def _empty(paths: Paths) -> None:
    """Remove what is in the folder, but not the folder, whose lock we hold."""
    for entry in os.scandir(paths.folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)


# --- looking ---------------------------------------------------------------------------------


def saved(paths: Paths) -> Lab:
    """The lab that is there, from the copy of its file. Raises FileNotFoundError."""
    with open(paths.text) as file:
        return parse(file.read(), paths.text, name=paths.lab)


def running(name: str, root: str = ROOT) -> tuple[Lab, Paths]:
    """A lab that is up. Raises NotUpError with those that are."""
    paths = Paths(name, root)
    down_ = f"nsmctl lab down {name}"
    try:
        now = state.read(paths)
    except InvalidError as broken:
        raise NotUpError(f"lab {name} is not whole: {broken.message}", hint=down_) from None
    if now is None or now.phase != "up":
        there = [n for n in state.labs(root) if n != name]
        also = f"; up are {', '.join(there)}" if there else ""
        if now is not None:
            how = "is being made or taken down"
            if now.crashed:
                how = "is not whole: its engine was killed"
            raise NotUpError(f"lab {name} {how}{also}", hint=down_)
        raise NotUpError(f"lab {name} is not up{also}", hint=f"nsmctl lab up {name}")
    try:
        return saved(paths), paths
    except (FileNotFoundError, InvalidError) as broken:
        raise NotUpError(f"lab {name} is not whole: {broken}", hint=down_) from None


def node_health(lab: Lab, paths: Paths) -> dict[str, bool]:
    """Of each node that runs something: whether all of it is alive and ready."""
    children = state.born(paths)
    health = {name: True for name, node in lab.nodes.items() if node.kind == "node"}
    for process in processes.plan(lab, paths).processes:
        if process.is_errand:
            continue
        child = children.get(process.name)
        if child is None and process.later:
            continue
        ready = child is not None and (child.ready is not None or not process.module)
        node = process.name.partition("/")[0]
        health[node] = health[node] and ready and child is not None and child.mark.alive
    return health


def on_demand(lab: Lab, paths: Paths) -> dict[str, Mark | None]:
    """The routers that suppliers start, by NODE/PROC; None where nobody asked for one yet."""
    found = {}
    for process in processes.plan(lab, paths).on_demand:
        node = process.name.partition("/")[0]
        folder = processes.supplier_of(paths, node)
        found[process.name] = state.supplied(folder, process.environment["NSM_NAME"])
    return found


def log_files(paths: Paths, asked: str = "") -> list[str]:
    """The logs a person means by NODE, NODE/PROC or a glob of those; all without."""
    lab = saved(paths)
    plan = processes.plan(lab, paths)
    names = tuple(p.name for p in (*plan.processes, *plan.on_demand))
    wanted = matching(asked, names) or matching(f"{asked}/*", names) if asked else names
    wanted = wanted or tuple(n for n in names if n.partition("/")[2] == asked)
    if not wanted:
        raise InvalidError(f"lab {lab.name} has no process {asked!r}", hint=", ".join(names))
    return [paths.log(name) for name in wanted]
