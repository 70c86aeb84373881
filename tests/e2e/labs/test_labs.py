"""Labs of the real programs, run as a person runs them."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from labs import lab as labfile
from nsm.process import config
from tests.support.wait import until, write

HERE = Path(__file__).parents[3]
BROKEN = sorted((HERE / "labs/broken").glob("*.yaml"))
SAMPLE = ("ping", "up")  # of the broken labs, in make test
COMMAND = [sys.executable, "-P", "-m", "nsmctl"]
LATER = partial(pytest.param, marks=pytest.mark.long)

STAGES = ("calling", "manager", "find", "forwarder", "kernel", "endpoint")
SHIPPED = {  # the wires of each: client, interface, kind, nodes, and the MTU a tunnel leaves
    "one-node": [("app", "nsm-1", "veth", ["node-1", "node-1"], None)],
    "two-nodes": [
        ("near", "nsm-1", "veth", ["east-2", "east-2"], None),
        ("far", "nsm-1", "vxlan", ["east-1", "east-2"], 1446),
        ("far", "nsm-2", "vxlan", ["east-1", "east-2"], 1446),
        ("far-six", "nsm-1", "vxlan", ["six-1", "six-2"], 1426),
        ("app", "nsm-1", "wireguard", ["east-1", "east-2"], 1440),
        ("app-six", "nsm-1", "wireguard", ["six-1", "six-2"], 1420),
    ],
    "interdomain": [
        ("app-e", "nsm-1", "wireguard", ["east-1", "west-1"], 1440),
        ("app-e", "nsm-2", "vxlan", ["east-1", "west-1"], 1446),
        ("app-w", "nsm-1", "veth", ["west-1", "west-1"], None),
        ("app-w", "nsm-2", "wireguard", ["west-1", "east-1"], 1440),
    ],
}


SOCKETS = Path("/run/wireguard")  # of wireguard-go


def surroundings() -> dict[str, str]:
    """What a test's nsmctl is given: nothing of ours but what watches over the test."""
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE), **config.for_children()}


def nsmctl(
    *words: str, patience: float = 120.0, folder: str | Path = "/", **more: str
) -> subprocess.CompletedProcess[str]:
    """A command of ours in a folder, with more in its environment."""
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, check=False,
        env={**surroundings(), **more}, cwd=folder, timeout=patience,
    )  # fmt: skip


def names(base: str) -> str:
    """A lab's name of this run's own."""
    return f"{base}-{os.getpid() % 10000}"


@contextlib.contextmanager
def up(file: str) -> Iterator[str]:
    name = names(file)
    done = nsmctl("lab", "up", file, "--name", name)
    try:
        assert done.returncode == 0, done.stderr
        yield name
    finally:
        nsmctl("lab", "down", name)


@pytest.mark.parametrize("file", ["one-node", LATER("two-nodes")])
def test_a_shipped_lab_holds_all_its_checks_and_leaves_nothing(file):
    name = names(file)
    start = time.monotonic()
    done = nsmctl("lab", "run", file, "--name", name, "--json")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    told = json.loads(done.stdout)
    write(f"{file}: the whole run", time.monotonic() - start, 15.0)
    write(f"{file}: up", told["up_s"], 3.0)
    assert told["left"] == []
    assert told["failed"] == 0
    assert all(check["holds"] for check in told["checks"])
    assert all(wire["lost"] == 0 for wire in told["wires"])
    assert {w["client"]: (w["mechanism"], w["nodes"]) for w in told["wires"]} == {
        client: (kind, nodes) for client, _, kind, nodes, _ in SHIPPED[file]
    }
    for wire in told["wires"]:
        stages = [wire["stages"][stage] for stage in STAGES]
        assert min(stages) > 0, wire
        assert sum(stages) <= wire["ms"] < 1000 * told["up_s"], wire
        assert wire["there_ms"] > 0, wire
        assert wire["back_ms"] > 0, wire
    assert not os.path.exists(f"/run/vwire/labs/{name}")


def ip(*words: str) -> list[dict[str, Any]]:
    done = subprocess.run(["ip", "-j", *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout or "[]")


def interfaces(namespace: str) -> set[str]:
    """Of a namespace whose name may be there a moment sooner or later than itself: none then."""
    command = ["ip", "-j", "-n", namespace, "link"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {d["ifname"] for d in json.loads(done.stdout or "[]")}


def pings(namespace: str, address: str, mtu: int) -> bool:
    """Whether stock ping, in one piece of exactly so many bytes, is answered."""
    payload = mtu - (48 if ":" in address else 28)
    words = ["ping", "-c", "1", "-W", "5", "-M", "do", "-s", str(payload), address]
    done = subprocess.run(
        ["ip", "netns", "exec", namespace, *words], capture_output=True, text=True, check=False
    )
    return done.returncode == 0


@pytest.mark.parametrize("file", [LATER("one-node"), LATER("two-nodes"), "interdomain"])
def test_what_a_lab_says_of_its_wires_is_what_the_kernel_and_stock_ping_say(file):
    with up(file) as lab:
        told = json.loads(nsmctl("lab", "status", lab, "--json").stdout)["wires"]
        assert len(told) == len(SHIPPED[file])
        for wire, (client, interface, kind, _, mtu) in zip(told, SHIPPED[file], strict=True):
            assert (wire["client"], wire["interface"]) == (client, interface)
            (link,) = ip("-n", f"{lab}-{client}", "-d", "link", "show", interface)
            assert wire["mechanism"] == kind
            made = {link["linkinfo"]["info_kind"]}
            assert made <= ({"wireguard", "tun"} if kind == "wireguard" else {kind})
            assert link["mtu"] == wire["mtu"] == (mtu or link["mtu"])
            assert "UP" in link["flags"]
            (there,) = ip("-n", f"{lab}-{client}", "address", "show", interface)
            bound = {one["local"] for one in there["addr_info"] if one["scope"] == "global"}
            assert bound == set(wire["client_addresses"])
            for far in wire["endpoint_addresses"]:
                assert pings(f"{lab}-{client}", far, link["mtu"]), far
                assert not pings(f"{lab}-outsider", far, 64), far
            for near in wire["client_addresses"]:
                assert pings(f"{lab}-{wire['endpoint']}", near, link["mtu"]), near


def test_the_table_of_a_run_is_text_and_ends_with_the_line_that_sums_it_up():
    done = nsmctl("lab", "run", "one-node", "--name", names("table"))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("6 checks hold, 0 failed  up ")
    assert last.endswith("left over: 0")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in SAMPLE else pytest.mark.long)
        for path in BROKEN
    ],
)
def test_a_broken_lab_turns_red_where_it_must_and_says_why(path):
    red = labfile.read(path).must_be_red
    done = nsmctl("lab", "run", str(path), "--name", names(path.stem), "--json")
    assert done.returncode == 1, f"{done.stdout}\n{done.stderr}"
    told = json.loads(done.stdout)
    if "up" in red:
        assert red["up"] in told["error"]
        return
    assert {c["name"] for c in told["checks"] if not c["holds"]} == set(red)
    for check in told["checks"]:
        if check["name"] in red:
            assert red[check["name"]] in check["says"]
    assert told["left"] == []


def test_the_verbs_tell_of_a_lab_that_is_up():
    with up("one-node") as lab:
        status = json.loads(nsmctl("lab", "status", lab, "--json").stdout)
        assert status["phase"] == "up"
        assert status["wires"][0]["mechanism"] == "veth"
        listed = json.loads(nsmctl("lab", "list", "--json").stdout)
        assert (1, 1) in [(one["nodes"], one["wires"]) for one in listed if one["lab"] == lab]
        assert re.search(rf"{lab}  up \d+ s", nsmctl("lab", "list").stdout)
        found = nsmctl("services", "--lab", lab, "--json")
        assert "icmp-responder" in [s["name"] for s in json.loads(found.stdout)], found.stderr
        found = nsmctl("endpoints", "--lab", lab, "--json")
        offers = {s for e in json.loads(found.stdout) for s in e["services"]}
        assert "icmp-responder" in offers
        wires = json.loads(nsmctl("connections", "--lab", lab, "--json").stdout)
        assert [w["service"] for w in wires] == ["icmp-responder"]
        hops = json.loads(nsmctl("path", wires[0]["id"], "--lab", lab, "--json").stdout)["path"]
        assert [hop["name"] for hop in hops][:3] == ["app", "nsmgr-node-1", "forwarder-node-1"]
        ids = [hop["spiffe_id"] for hop in hops]
        assert len(set(ids)) == len(ids) == 4
        text = json.dumps(hops)
        assert "eyJ" not in text  # how every JWT begins
        table = nsmctl("lab", "status", lab).stdout
        assert re.search(r"^node-1/nsmgr +\d+ ready +\d+ *$", table, re.MULTILINE), table
        for verb in ("services", "endpoints", "connections", f"path {wires[0]['id']}"):
            table += nsmctl(*verb.split(), "--lab", lab).stdout
        assert max(map(len, table.splitlines())) <= 80
        inside = nsmctl(
            "lab", "exec", "app", "--lab", lab, "--", "ip", "-j", "link", "show", "nsm-1"
        )
        assert json.loads(inside.stdout)[0]["ifname"] == "nsm-1"
        assert nsmctl("lab", "exec", "app", "--lab", lab, "--", "false").returncode == 1
        logs = nsmctl("lab", "logs", "node-1/nsmgr", "--lab", lab).stdout
        assert "ready" in logs


def test_every_process_of_a_lab_that_nsmctl_starts_is_watched_for_calls_that_block():
    with up("one-node") as lab:
        status = json.loads(nsmctl("lab", "status", lab, "--json").stdout)
        assert len(status["processes"]) == 6
        for name, process in status["processes"].items():
            folder = f"/proc/{process['pid']}/fd"
            held = {os.readlink(f"{folder}/{number}") for number in os.listdir(folder)}
            assert os.environ["NSM_LOOP_GUARD"] in held, name


@pytest.mark.long
async def test_logs_can_be_followed_and_are_json_for_programs():
    with up("one-node") as lab:
        told = json.loads(nsmctl("lab", "logs", "node-1", "--lab", lab, "--json").stdout)
        assert set(told) == {
            f"node-1.{name}"
            for name in ("issuer", "registry", "nsmgr", "forwarder", "responder", "app")
        }
        assert all(any("ready" in line for line in lines) for lines in told.values()), told
        with subprocess.Popen(
            [*COMMAND, "lab", "logs", "node-1/nsmgr", "--lab", lab, "-f"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=surroundings(), cwd="/",
        ) as following:  # fmt: skip
            assert following.stdout
            os.set_blocking(following.stdout.fileno(), False)
            heard = bytearray()

            def hears(what: bytes) -> bool:
                heard.extend(following.stdout.read() or b"")
                return what in heard

            try:
                await until(lambda: hears(b"ready"), "what a log has already", bar=1.0)
                words = ("connect", "kernel://icmp-responder/nsm-9", "--lab", lab, "-n", "outsider")
                wire = json.loads(nsmctl(*words, "--json", "--", "true").stdout)
                assert wire["interface"] == "nsm-9"
                assert min(wire["stages"][stage] for stage in STAGES) > 0
                await until(lambda: hears(b"client/outsider"), "what comes meanwhile", bar=1.0)
            finally:
                following.send_signal(signal.SIGINT)
                _, errors = following.communicate(timeout=10)
            assert (following.returncode, errors) == (130, b"")


def test_connect_holds_a_wire_around_a_command_and_takes_it_back():
    with up("one-node") as lab:
        words = ("connect", "kernel://icmp-responder/nsm-9", "--lab", lab, "-n", "outsider")
        done = nsmctl(*words, "--", "ip", "-br", "addr", "show", "nsm-9")
        assert done.returncode == 0, done.stderr
        assert "nsm-9" in done.stdout
        after = nsmctl("lab", "exec", "outsider", "--lab", lab, "--", "ip", "link", "show", "nsm-9")
        assert after.returncode == 1


def test_connect_to_what_nobody_offers_is_exit_code_1_with_a_sentence():
    with up("one-node") as lab:
        words = ("connect", "kernel://nothing/nsm-9", "--lab", lab, "-n", "outsider")
        done = nsmctl(*words, "--", "true")
        assert done.returncode == 1
        assert "nothing" in done.stderr


async def test_ctrl_c_ends_a_held_wire_and_takes_it_back():
    with up("one-node") as lab:
        words = ("connect", "kernel://icmp-responder/nsm-9", "--lab", lab, "-n", "outsider")
        running = subprocess.Popen(
            [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=surroundings(), cwd="/", text=True,
        )  # fmt: skip
        assert running.stdout
        assert running.stdout.readline().startswith("nsm-9 172.16.1.")
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=10)
        assert running.returncode == 130, errors
        assert errors == ""
        after = nsmctl("lab", "exec", "outsider", "--lab", lab, "--", "ip", "link", "show", "nsm-9")
        assert after.returncode == 1
        wires = json.loads(nsmctl("connections", "--lab", lab, "--json").stdout)
        assert [w["id"] for w in wires] == ["app-0"]


def _on_a_terminal(*words: str, hang_up_at: bytes = b"", **more: str) -> tuple[int, bytes]:
    """Exit code and output of nsmctl on a terminal of its own, which may be closed early."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [*COMMAND, *words], {**surroundings(), "TERM": "xterm", **more})
    out = b""
    with contextlib.suppress(OSError):  # EIO: the other side has ended
        while (data := os.read(terminal, 4096)) and not (hang_up_at and hang_up_at in out):
            out += data
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), out


@pytest.mark.long
def test_on_a_terminal_progress_moves_and_with_no_color_nothing_but_text_comes():
    code, out = _on_a_terminal("lab", "run", "one-node", "--name", names("tty"))
    assert code == 0, out
    assert b"\x1b" in out
    code, out = _on_a_terminal("lab", "run", "one-node", "--name", names("nc"), NO_COLOR="1")
    assert code == 0, out
    assert b"\x1b" not in out


@pytest.mark.parametrize("at", ["managers", LATER("clients"), LATER("check")])
def test_a_closed_terminal_takes_the_lab_down_too(at):
    name = names(f"hup-{at}")
    words = ("lab", "run", "two-nodes", "--name", name)
    code, out = _on_a_terminal(*words, hang_up_at=at.encode(), NO_COLOR="1")
    assert at.encode() in out
    assert code != 0
    assert not os.path.exists(f"/run/vwire/labs/{name}")


async def test_two_labs_of_one_file_run_at_once():
    both = [names("one"), names("other")]
    running = [
        subprocess.Popen(
            [*COMMAND, "lab", "run", "one-node", "--name", name, "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=surroundings(), cwd="/", text=True,
        )
        for name in both
    ]  # fmt: skip

    def wires() -> list[str]:
        """What `ip` finds of both at one moment: the client's interface of each."""
        found = [d["name"] for d in ip("netns") if d["name"] in {f"{name}-app" for name in both}]
        return [name for name in found if "nsm-1" in interfaces(name)]

    await until(lambda: len(wires()) == 2, "both labs have their wire", bar=5.0)
    assert all(run.poll() is None for run in running)
    for run in running:
        out, errors = run.communicate(timeout=60)
        assert run.returncode == 0, f"{out}\n{errors}"
        assert json.loads(out)["failed"] == 0


@pytest.mark.parametrize("clears", ["up", LATER("down")])
async def test_a_killed_engine_is_cleared_by_the_next_up_or_down(clears):
    name = names(f"killed-{clears}")
    running = subprocess.Popen(
        [*COMMAND, "lab", "run", "two-nodes", "--name", name],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=surroundings(), cwd="/",
    )  # fmt: skip
    await until(Path(f"/run/vwire/labs/{name}/status/far").exists, "a first wire", bar=3.0)
    running.kill()
    running.wait()
    if clears == "up":
        again = nsmctl("lab", "up", "one-node", "--name", name, "--json")
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout)["cleaned"]
        assert json.loads(nsmctl("lab", "status", name, "--json").stdout)["well"] == 1
    down = nsmctl("lab", "down", name, "--json")
    assert json.loads(down.stdout)[name]["left"] == []
    assert not os.path.exists(f"/run/vwire/labs/{name}")
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert name not in left


@pytest.mark.long
def test_what_killed_forwarders_left_of_wires_goes_with_their_lab():
    """Nobody closes these wires; on a kernel with WireGuard there is nothing to see of it."""
    with up("two-nodes") as name:
        folder = Path(f"/run/vwire/labs/{name}")
        cookies = json.loads((folder / "state.json").read_text())["namespaces"].values()
        lines = (folder / "processes.jsonl").read_text().splitlines()
        born = [one for one in map(json.loads, lines) if one["event"] == "born"]
        forwarders = [one["pid"] for one in born if one["name"].endswith("/forwarder")]
        assert len(forwarders) == 4
        for pid in forwarders:
            os.kill(pid, signal.SIGKILL)
        down = nsmctl("lab", "down", name, "--json")
        assert json.loads(down.stdout)[name]["left"] == []
    assert [path for path in SOCKETS.glob("*") if home_of(path) in cookies] == []


def home_of(socket: Path) -> int:
    """The namespace of the forwarder whose wireguard-go it is; 0 if it is nobody's of ours."""
    try:
        return int(os.getxattr(socket, "trusted.vwire").split(b"/")[1], 16)
    except OSError:
        return 0


async def test_ctrl_c_takes_a_lab_down_and_leaves_nothing():
    name = names("ctrl-c")
    running = subprocess.Popen(
        [*COMMAND, "lab", "run", "two-nodes", "--name", name],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=surroundings(), cwd="/",
    )  # fmt: skip
    status = Path(f"/run/vwire/labs/{name}/status/far")
    await until(status.exists, "a client's first wire", bar=3.0)
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=30)
    assert running.returncode == 130, out
    assert not os.path.exists(f"/run/vwire/labs/{name}")
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert name not in left
