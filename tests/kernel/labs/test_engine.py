"""The engine: what it makes, what it leaves, and what it does with others' leftovers.

The programs are stand-ins here, because these tests are about whoever starts them;
tests/e2e/labs has the real ones.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import alive, births, engine, nursery, processes, state
from labs.alive import Mark
from labs.lab import Lab, parse
from labs.paths import Paths
from labs.processes import Stage
from nsm.errors import TakenError, UnsupportedError
from nsm.kernel import topology
from nsm.kernel.namespaces import create_named, delete_named, list_named
from nsm.kernel.topology import Plug
from tests.support.wait import until

STANDIN = {stage: "tests.support.standin" for stage in Stage if stage != Stage.PROGRAM}
HERE = Path(__file__).parents[3]
TEXT = """\
name: NAME
topology:
  clusters: {c: {}}
  nodes: {n1: {cluster: c}, n2: {cluster: c}, sw: {kind: switch}}
  links:
    - {endpoints: ["n1:eth0", "sw:p1"]}
    - {endpoints: ["n2:eth0", "sw:p2"], mtu: 1400}
  underlay: {ipv4: 198.18.0.0/24, ipv6: "fd00:18::/64"}
services:
  y: {endpoints: {resp: {on: n2, prefixes: [172.16.1.0/24]}}}
clients:
  app: {on: n1, connect: ["kernel://y/nsm-1"]}
  web: {on: n1, netns-only: true, run: [{name: serve, exec: SERVE, ready: {tcp: 8080}}]}
"""
SERVE = f"{sys.executable} -P -m http.server 8080"


def made(name: str) -> tuple[Lab, str, Paths]:
    text = TEXT.replace("NAME", name).replace("SERVE", SERVE)
    return parse(text, "x.yaml"), text, Paths(name)


def bring_up(name: str, **options: object) -> engine.Up:
    lab, text, paths = made(name)
    with state.locked(paths, create=True):
        return engine.up(lab, text, "x.yaml", modules=STANDIN, **options)  # type: ignore[arg-type]


def take_down(name: str) -> engine.Gone | None:
    paths = Paths(name)
    with state.locked(paths, create=False) as there:
        return engine.down(paths) if there else None


def ip(*words: str) -> list[dict[str, object]]:
    done = subprocess.run(["ip", "-j", *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout or "[]")


def processes_of(name: str) -> list[int]:
    """Asked of /proc, by what stands in the command line."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                words = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            if f"\0{name}/".encode() in words or words.endswith(f"labs.nursery\0{name}\0".encode()):
                found.append(int(entry))
    return found


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[str]:
    """A name for one test's lab; whatever the test leaves of it is taken down."""
    name = f"t{os.getpid() % 10000}-{abs(hash(request.node.name)) % 1000}"
    yield name
    take_down(name)


def test_a_lab_is_namespaces_cables_a_bridge_and_addresses_as_drawn(lab):
    bring_up(lab)
    assert {f"{lab}-{p}" for p in ("n1", "n2", "sw", "resp", "app", "web")} <= set(list_named())
    eth0 = next(d for d in ip("-n", f"{lab}-n2", "addr") if d["ifname"] == "eth0")
    addresses = {f"{a['local']}/{a['prefixlen']}" for a in eth0["addr_info"]}
    assert {"198.18.0.2/24", "fd00:18::2/64"} <= addresses
    assert eth0["mtu"] == 1400
    assert "UP" in eth0["flags"]
    ports = [d for d in ip("-n", f"{lab}-sw", "-d", "link") if d.get("master") == "bridge"]
    assert sorted(d["ifname"] for d in ports) == ["p1", "p2"]
    only_lo = ip("-n", f"{lab}-app", "link")
    assert [d["ifname"] for d in only_lo] == ["lo"]


def test_packets_cross_the_underlay_in_both_families_at_once(lab):
    bring_up(lab)
    from labs.hands import Hands

    targets = [{"address": a, "size": 1400} for a in ("198.18.0.2", "fd00:18::2")]
    with Hands() as hands:
        order = {"do": "ping", "targets": targets, "count": 3, "patience": 1.0}
        told = hands.ask({f"{lab}-n1": order})[f"{lab}-n1"]
    assert [row["lost"] for row in told] == [0, 0]


def test_a_cable_carries_only_when_both_ends_are_up_and_its_port_is_open():
    names = [f"k{os.getpid() % 10000}-{side}" for side in "ab"]
    for name in names:
        create_named(name)
    try:
        a, b = names
        topology.cable(Plug(a, "x"), Plug(b, "p"), 1500)
        topology.configure(a, "x", ["198.18.0.1/24"])
        assert not topology.carries(a, "x")
        topology.bridge(b, "bridge", ["p"])
        end = time.monotonic() + 5
        while not (topology.carries(a, "x") and topology.carries(b, "p")):
            assert time.monotonic() < end
        said = subprocess.run(
            ["bridge", "-n", b, "link", "show"], capture_output=True, text=True, check=True
        )
        assert "state forwarding" in said.stdout
        ip("-n", b, "link", "set", "p", "down")
        assert not topology.carries(b, "p")
    finally:
        for name in names:
            delete_named(name)


def test_each_process_runs_in_its_namespace_under_a_group_of_its_own(lab):
    bring_up(lab)
    born = state.born(Paths(lab))
    groups = set()
    for name, child in born.items():
        if name == "nursery":
            continue
        status = Path(f"/proc/{child.mark.pid}/status").read_text()
        group = int(status.split("Gid:")[1].split()[1])
        groups.add(group)
        place = name.partition("/")[2].partition(".")[0]
        place = place if place in ("resp", "app", "web") else name.partition("/")[0]
        inode = os.stat(f"/run/netns/{lab}-{place}").st_ino
        assert os.stat(f"/proc/{child.mark.pid}/ns/net").st_ino == inode, name
        effective = int(status.split("CapEff:")[1].split()[0], 16)
        unprivileged = name.endswith(("/registry", "/resp", "/app"))
        assert (effective == 0) == unprivileged, name
    assert len(groups) == len(born) - 1


def test_after_down_nothing_of_a_lab_is_left(lab):
    bring_up(lab)
    assert processes_of(lab)
    gone = take_down(lab)
    assert gone is not None
    assert gone.left == ()
    assert [name for name in list_named() if name.startswith(f"{lab}-")] == []
    assert processes_of(lab) == []
    assert not os.path.exists(Paths(lab).folder)


def test_a_program_of_the_lab_is_ready_when_it_listens_and_ends_with_the_lab(lab):
    bring_up(lab)
    mark = state.born(Paths(lab))["n1/web.serve"].mark
    assert mark.alive
    words = Path(f"/proc/{mark.pid}/cmdline").read_bytes()
    assert b"http.server" in words
    take_down(lab)
    assert not mark.alive


def test_the_second_up_of_a_name_says_since_when_and_what_to_do(lab):
    bring_up(lab)
    pids = processes_of(lab)
    with pytest.raises(TakenError) as caught:
        bring_up(lab)
    assert f"lab {lab} is up since {time.strftime('%H:')}" in str(caught.value)
    assert "2 of 2 nodes" in str(caught.value)
    assert f"`nsmctl lab down {lab}` or --replace" in str(caught.value)
    assert processes_of(lab) == pids
    bring_up(lab, replace_it=True)
    assert not set(pids) & set(processes_of(lab))


def test_two_labs_of_one_file_run_side_by_side(lab):
    other = f"{lab}b"
    try:
        bring_up(lab)
        bring_up(other)
        take_down(lab)
        assert processes_of(lab) == []
        left, paths = engine.running(other)
        assert all(engine.node_health(left, paths).values())
    finally:
        take_down(other)


def test_a_name_somebody_works_on_is_refused_with_who(lab):
    lab_, text, paths = made(lab)
    with state.locked(paths, create=True):
        engine.up(lab_, text, "x.yaml", modules=STANDIN)
        with (
            pytest.raises(TakenError, match=f"by pid {os.getpid()} since"),
            state.locked(paths, create=True),
        ):
            pass


def test_a_foreign_namespace_of_the_same_name_is_left_alone(lab):
    create_named(f"{lab}-app")
    try:
        with pytest.raises(TakenError, match="exists already"):
            bring_up(lab)
        assert f"{lab}-app" in list_named()
        assert f"{lab}-n1" not in list_named()
    finally:
        delete_named(f"{lab}-app")


@pytest.mark.parametrize("when", ["network", "managers", "clients"])
def test_what_a_killed_engine_left_is_cleared_by_the_next_up(lab, when):
    _kill_engine_at(lab, when)
    made_up = bring_up(lab)
    assert made_up.cleaned
    left, paths = engine.running(lab)
    assert all(engine.node_health(left, paths).values())


@pytest.mark.parametrize("when", ["network", "managers", "clients"])
def test_what_a_killed_engine_left_is_cleared_by_down(lab, when):
    _kill_engine_at(lab, when)
    gone = take_down(lab)
    assert gone is not None
    assert gone.left == ()
    assert [n for n in list_named() if n.startswith(f"{lab}-")] == []
    assert processes_of(lab) == []


def _kill_engine_at(name: str, when: str) -> None:
    """Run an engine and kill -9 it when it reports that stage."""
    program = (
        "import sys\n"
        "from tests.kernel.labs.test_engine import bring_up\n"
        "def report(what):\n"
        f"    if what.startswith({when!r}):\n"
        "        import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
        f"bring_up({name!r}, report=report)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=HERE, check=False, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert state.read(Paths(name)).crashed


async def test_a_nursery_that_outlives_its_engine_writes_into_no_other_labs_journal(lab):
    for _ in range(3):
        _kill_engine_at(lab, "network")  # its nursery is still importing then
        bring_up(lab)
        nurseries = [line for line in _journal(lab) if line["name"] == "nursery"]
        assert [n["pid"] for n in nurseries] == [state.born(Paths(lab))["nursery"].mark.pid]
        take_down(lab)


def _journal(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(Paths(name).processes).read_text().splitlines()]


async def test_a_killed_nursery_leaves_processes_that_down_still_finds(lab):
    bring_up(lab)
    born = state.born(Paths(lab))
    os.kill(born["nursery"].mark.pid, signal.SIGKILL)
    await until(lambda: not born["nursery"].mark.alive, "the nursery is dead", bar=0.5)
    assert processes_of(lab)
    assert take_down(lab).left == ()
    assert processes_of(lab) == []


async def test_an_ended_process_is_reaped_and_the_lab_is_not_well(lab):
    bring_up(lab)
    lab_, paths = engine.running(lab)
    mark = state.born(paths)["n1/nsmgr"].mark
    alive.kill([mark])
    await until(lambda: state.born(paths)["n1/nsmgr"].ended == -9, "its end is noted", bar=0.5)
    assert not os.path.exists(f"/proc/{mark.pid}")
    assert engine.node_health(lab_, paths) == {"n1": False, "n2": True}


async def test_an_order_in_the_same_round_as_an_end_comes_after_it(lab):
    """Whoever saw somebody dead may have them started again at once."""
    bring_up(lab)
    born = state.born(Paths(lab))
    nursery, dead = born["nursery"].mark, born["n1/nsmgr"].mark
    os.kill(nursery.pid, signal.SIGSTOP)
    try:
        os.kill(dead.pid, signal.SIGKILL)
        await until(lambda: not dead.alive, "n1's nsmgr is dead", bar=0.5)
        with open(Paths(lab).orders, "wb", buffering=0) as orders:
            orders.write(b'{"again": "n1/nsmgr"}\n')
    finally:
        os.kill(nursery.pid, signal.SIGCONT)

    def answered() -> bool:
        refused = [one for one in _journal(lab) if one["event"] == "refused"]
        assert not refused, refused
        return state.born(Paths(lab))["n1/nsmgr"].mark.alive

    await until(answered, "n1's nsmgr is there again", bar=0.5)


def test_a_process_that_fails_ends_the_start_with_its_last_words_and_nothing_left(lab):
    lab_, text, paths = made(lab)
    failing = {**STANDIN, Stage.ENDPOINT: "tests.support.no_such_program"}
    with state.locked(paths, create=True), pytest.raises(births.ProcessFailedError) as caught:
        engine.up(lab_, text, "x.yaml", modules=failing)
    assert "no_such_program" in str(caught.value)
    assert [n for n in list_named() if n.startswith(f"{lab}-")] == []
    assert not os.path.exists(paths.folder)


def test_a_lab_that_is_up_stays_up_when_somebody_runs_it_again(lab):
    bring_up(lab)
    file = Path(Paths(lab).text)
    words = ["-P", "-m", "nsmctl", "lab", "run", str(file)]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE)}, cwd="/",
    )  # fmt: skip
    assert done.returncode == 1
    assert "is up since" in done.stderr
    left, paths = engine.running(lab)
    assert all(engine.node_health(left, paths).values())


async def test_a_ctrl_c_while_a_lab_is_made_takes_all_of_it_back(lab):
    program = (
        "from tests.kernel.labs.test_engine import bring_up\n"
        "import time\n"
        "def report(what):\n"
        "    print(what, flush=True)\n"
        "    if what.startswith('forwarders'): time.sleep(5)\n"
        f"bring_up({lab!r}, report=report)\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", program], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert running.stdout
    while not running.stdout.readline().startswith(b"forwarders"):
        pass
    assert processes_of(lab)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=10)
    assert running.returncode == -signal.SIGINT
    assert processes_of(lab) == []
    assert not os.path.exists(Paths(lab).folder)


def test_logs_are_bounded(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"x" * (nursery.LARGEST_LOG + 1))
    parent = nursery.Nursery(-1)
    parent._children[-1] = nursery.Child("x", 0, -1, -1, str(log), 0.0)
    parent._bound_logs()
    assert log.stat().st_size == 0
    assert (tmp_path / "log.1").stat().st_size == nursery.LARGEST_LOG + 1


def test_without_ipv6_an_ipv4_lab_comes_up_and_an_ipv6_one_is_refused(lab, monkeypatch):
    monkeypatch.setattr(engine, "IPV6", "/nowhere")
    bring_up(lab)
    eth0 = next(d for d in ip("-n", f"{lab}-n1", "addr") if d["ifname"] == "eth0")
    assert "198.18.0.1" in {a["local"] for a in eth0["addr_info"]}
    take_down(lab)
    _, text, paths = made(lab)
    six = parse(text.replace("clusters: {c: {}}", "clusters: {c: {underlay: ipv6}}"), "x")
    with state.locked(paths, create=True), pytest.raises(UnsupportedError, match="uses IPv6"):
        engine.up(six, text, "x", modules=STANDIN)
    assert not os.path.exists(paths.folder)


def test_a_reused_pid_is_never_signalled():
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        alive.stop([Mark(sleeper.pid, alive.started(sleeper.pid) + 1)], 0.1)
        assert sleeper.poll() is None
        alive.stop([Mark(sleeper.pid, alive.started(sleeper.pid))], 1.0)
        assert sleeper.wait() == -signal.SIGTERM
    finally:
        sleeper.kill()
        sleeper.wait()


async def test_a_process_started_by_hand_in_a_labs_namespace_ends_with_it(lab):
    bring_up(lab)
    shell = subprocess.Popen(["ip", "netns", "exec", f"{lab}-app", "sleep", "600"])
    try:
        inode = os.stat(f"/run/netns/{lab}-app").st_ino
        await until(
            lambda: os.stat(f"/proc/{shell.pid}/ns/net").st_ino == inode, "it is inside", bar=0.5
        )
        take_down(lab)
        assert shell.wait(1) == -signal.SIGKILL
    finally:
        shell.kill()
        shell.wait()


def test_a_forked_process_is_what_an_execd_one_would_be(lab):
    """The same environment, fds, signals, ids, capabilities, argv and start as with `-m`."""
    bring_up(lab)
    _, paths = engine.running(lab)
    lab_, _, _ = made(lab)
    process = next(p for p in processes.plan(lab_, paths).processes if p.name == "n1/nsmgr")
    forked = json.loads(Path(process.log).read_text().splitlines()[0])
    execd = _execd(process, paths)
    assert forked["main"] == "__main__"
    assert forked == execd


def test_what_watches_over_a_test_reaches_every_process_of_its_lab(lab, monkeypatch, tmp_path):
    monkeypatch.setenv("NSM_LOOP_GUARD", str(tmp_path / "told"))
    bring_up(lab)
    lab_, _, paths = made(lab)
    for process in processes.plan(lab_, paths).processes:
        (serving,) = (m for n, m in state.born(paths).items() if n == process.name)
        if process.module:
            line = Path(process.log).read_text().splitlines()[0]
            given = json.loads(line)["environment"]
        else:
            environ = Path(f"/proc/{serving.mark.pid}/environ").read_text()
            given = dict(one.split("=", 1) for one in environ.split("\0") if one)
        assert given.get("NSM_LOOP_GUARD") == str(tmp_path / "told"), process.name


def _execd(process: processes.Process, paths: Paths) -> dict[str, object]:
    """The same program by exec: in the namespace, as the group, with a log and a pipe as fds."""
    log = f"{paths.folder}/log/execd"
    ready, ready_end = os.pipe()
    script = (
        f"exec setpriv --regid {process.gid} --clear-groups"
        f" {sys.executable} -P -m tests.support.standin"
        f" </dev/null >>{log} 2>&1 3>&{ready_end} {ready_end}>&-"
    )
    running = subprocess.Popen(
        ["ip", "netns", "exec", process.namespace, "bash", "-c", script],
        env={**process.environment, "PYTHONPATH": str(HERE)},
        pass_fds=[ready_end],
        cwd=process.folder,
        start_new_session=True,
        umask=0o022,
    )
    os.close(ready_end)
    assert os.read(ready, 100) == b"standing in\n"
    os.close(ready)
    running.terminate()
    running.wait()
    found = json.loads(Path(log).read_text().splitlines()[0])
    # where it finds the code is ours to say for exec; its log has another name
    for name in ("PYTHONPATH", "PWD", "SHLVL", "_", "OLDPWD"):  # and the shell adds some
        found["environment"].pop(name, None)
    found["fds"] = {k: v.replace("execd", "n1.nsmgr") for k, v in found["fds"].items()}
    return found
