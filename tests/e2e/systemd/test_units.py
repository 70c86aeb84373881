"""deploy/systemd on machines with a real systemd: starts, stops, deaths, and what wires notice."""

import contextlib
import json
import platform
import re
import signal
import subprocess
from collections.abc import Iterator
from importlib import import_module

import pytest

from nsm.process.config import parse, strangers
from tests.e2e.systemd.machine import Machine, wait
from tests.e2e.systemd.mesh import CLIENT, ROOT, UNITS, Standing, setting, unit_file

FOLDER = ROOT / "deploy" / "systemd"
# What `systemd-analyze security` finds open, and what that is of 10: what each needs, and what
# would confine nothing more.
ALWAYS = {
    "AF_UNIX",
    "DeviceAllow",  # nobody but the forwarder may use any
    "IPAddressDeny",  # which addresses a mesh has, nobody knows here
    "RootDirectoryOrRootImage",
    "resources",  # setrlimit
}
NETWORK = {"PrivateNetwork", "AF_INET_INET6"}
SEES_OTHERS = {"ProcSubset", "ProtectProc", "PrivateUsers"}
OPEN = {
    "vwire-issuer": (0.8, ALWAYS | SEES_OTHERS),
    "vwire-registry": (1.2, ALWAYS | NETWORK),
    "vwire-nsmgr": (1.4, ALWAYS | NETWORK | {"PrivateUsers"}),  # a socket's other end is somebody
    "vwire-forwarder": (
        2.8,
        ALWAYS | NETWORK | SEES_OTHERS
        | {"AF_NETLINK", "AmbientCapabilities", "CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE"}
        | {"CAP_NET_BIND_SERVICE_BROADCAST_RAW)", "PrivateDevices", "RestrictNamespaces_net"}
        | {"privileged"},  # open_by_handle_at, bpf
    ),
}  # fmt: skip
STEADY = {"NSM_MAX_TOKEN_LIFETIME": "60s", "NSM_REQUEST_TIMEOUT": "1500ms"}
SERVICES = {"near": "echo", "app": "far", "sealed": "sealed"}
REFRESHING = ("vwire-nsmgr", "vwire-forwarder")
FAR_ENDS = {"near": "172.16.1.0", "app": "172.16.2.0", "sealed": "172.16.3.0"}


@pytest.fixture
def east(machines: tuple[Machine, Machine]) -> Machine:
    return machines[0]


@pytest.fixture(scope="module")
def wires(machines: tuple[Machine, Machine]) -> Iterator[Standing]:
    """One on the node (near), between nodes (app), and encrypted (sealed), there all the while."""
    east, west = machines
    for unit, service in SERVICES.items():
        east.start(unit, CLIENT, NSM_NETWORK_SERVICES=f"kernel://{service}/nsm-1", **STEADY)
    standing = Standing(east, west, *SERVICES)
    yield standing
    assert not standing.changed()
    east.stop(*SERVICES)


@contextlib.contextmanager
def no_packet_lost(one: Machine) -> Iterator[None]:
    """Every wire carries echoes for the block, and all of them come back."""
    with contextlib.ExitStack() as flows:
        counts = {
            unit: flows.enter_context(one.flow(unit, address)) for unit, address in FAR_ENDS.items()
        }
        yield
    for unit, seen in counts.items():
        assert not seen.lost, f"{unit} lost {sorted(seen.lost)}"
        assert seen.received > 20


def test_what_is_installed_is_well_formed_for_systemd(east):
    assert east.sh("systemd-analyze verify --man=no /etc/systemd/system/vwire-*.service") == ""
    assert {path.stem for path in FOLDER.glob("*.service")} == set(UNITS)


def test_the_units_are_well_formed_where_no_systemd_runs(tmp_path):
    """For machines on which the others here cannot be tried."""
    for unit in UNITS:
        text = (FOLDER / f"{unit}.service").read_text()
        (tmp_path / f"{unit}.service").write_text(text.replace("/opt/vwire/bin/python", "/bin/sh"))
    files = [str(tmp_path / f"{unit}.service") for unit in UNITS]
    command = ["systemd-analyze", "verify", "--man=no", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("unit", UNITS)
def test_a_service_is_exposed_to_what_it_needs_and_to_nothing_else(east, unit):
    level, wanted = OPEN[unit]
    said = east.run("systemd-analyze", "security", "--no-pager", unit)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+) ", said)
    assert found, said
    assert float(found[1]) <= level
    if not east.run("systemctl", "--version").startswith("systemd 252 "):
        return  # another one looks at other things
    told = json.loads(east.run("systemd-analyze", "security", "--json=short", unit))
    exposed = {one["json_field"] for one in told if one["exposure"] not in (None, "0")}
    kinds = ("CapabilityBoundingSet_", "RestrictAddressFamilies_", "SystemCallFilter_")
    assert {re.sub(f"^({'|'.join(kinds)})", "", one) for one in exposed} == wanted


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_says_nothing_its_program_does_not_understand(unit):
    text = (FOLDER / f"{unit}.service").read_text()
    told = dict(
        line.split("=", 1) for line in re.findall(r"^Environment=(.*)$", text, re.MULTILINE)
    )
    for word, meaning in (("%H", "host"), ("%S", "/var/lib"), ("%t", "/run")):
        told = {name: value.replace(word, meaning) for name, value in told.items()}
    assert "%" not in "".join(told.values())
    (module,) = re.findall(r"^ExecStart=/opt/vwire/bin/python -P -m (\S+)$", text, re.MULTILINE)
    kind = import_module(module if "." in module else f"{module}.config").Config
    if unit == "vwire-issuer":
        told["NSM_TRUST_DOMAIN"] = "example.org"  # from issuer.env
    parse(kind, told)
    assert strangers(kind, told) == ()


@pytest.mark.parametrize("unit", UNITS)
def test_each_runs_as_a_user_of_its_own_with_its_capabilities_and_no_way_to_more(east, unit):
    status = east.status(unit)
    uid = east.run("id", "-u", unit).strip()
    assert uid != "0"
    assert status["Uid"].split() == [uid] * 4
    wanted = unit_file(unit)["CapabilityBoundingSet"].split()
    for kind in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[kind], 16).bit_count() == len(wanted), kind
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    limits = east.run("cat", f"/proc/{east.main_pid(unit)}/limits")
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)  # its memory holds keys


def test_a_unit_is_active_when_it_serves_and_its_status_says_where(east):
    says = {
        "vwire-issuer": "issuer issuer ready: unix:///run/vwire/issuer/agent.sock; ",
        "vwire-registry": f"registry registry-{east.name} ready: tcp://:5002; ",
        "vwire-nsmgr": f"nsmgr nsmgr-{east.name} ready: "
        "unix:///var/lib/networkservicemesh/nsm.io.sock, tcp://:5001; registry tcp://198.18.0.1:",
        "vwire-forwarder": f"forwarder forwarder-{east.name} ready: "
        "unix:///run/vwire/forwarder/forwarder.sock; ",
    }
    for unit in UNITS:
        assert east.show(unit, "ActiveState") == "active"
        assert east.show(unit, "StatusText").startswith(says[unit])
    # who is started waits for the one before: the forwarder is ready when it is registered
    began = [int(east.show(unit, "ActiveEnterTimestampMonotonic")) for unit in UNITS]
    assert began == sorted(began)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(0, id="restarted", marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, id="killed"),
    ],
)
@pytest.mark.parametrize(
    "unit", [*(pytest.param(u, marks=pytest.mark.long) for u in UNITS[:-1]), UNITS[-1]]
)
def test_a_program_goes_and_comes_back_and_no_packet_is_lost(machines, wires, unit, number):
    east, _ = machines
    lives, before = int(east.show(unit, "NRestarts")), east.main_pid(unit)
    with no_packet_lost(east):
        if number:
            east.kill(unit, number)
            wait(lambda: int(east.show(unit, "NRestarts")) == lives + 1, "a unit's next life")
            wait(lambda: east.active(unit), f"{unit} active again", bar=2)
        else:
            east.run("systemctl", "restart", unit)
        assert east.main_pid(unit) != before
        if unit in REFRESHING:  # whose end makes clients ask again
            wires.refreshed(unit)
        for service in SERVICES.values():
            east.start("extra", CLIENT, NSM_NETWORK_SERVICES=f"kernel://{service}/nsm-1", **STEADY)
            assert east.pings("extra")
            east.stop("extra")
    assert not wires.changed()


def test_a_loop_that_hangs_is_ended_says_where_and_is_started_again(machines, wires):
    east, _ = machines
    unit = "vwire-forwarder"
    with dropin(east, unit, "WatchdogSec=1s"):
        lives = int(east.show(unit, "NRestarts"))
        with no_packet_lost(east):
            east.kill(unit, signal.SIGSTOP)
            # more than one life, where a busy machine gives the next one no turn in a second either
            wait(lambda: int(east.show(unit, "NRestarts")) > lives, "the watchdog", bar=3)
            wait(lambda: east.active(unit), f"{unit} active again", bar=2)
    assert "Watchdog timeout (limit 1s)!" in east.journal(unit)
    assert "Fatal Python error: Aborted" in east.journal(unit)
    assert re.search(r"forwarder/__main__\.py\", line \d+ in main", east.journal(unit))


@contextlib.contextmanager
def dropin(one: Machine, unit: str, *lines: str) -> Iterator[None]:
    """More settings for a unit's service, for the block; it is restarted for both."""
    folder = f"/etc/systemd/system/{unit}.service.d"
    text = "\n".join(["[Service]", *lines])
    again = f"systemctl daemon-reload; systemctl restart {unit}"
    one.sh(f"mkdir -p {folder}; cat >{folder}/test.conf <<'END'\n{text}\nEND\n{again}")
    try:
        yield
    finally:
        one.sh(f"rm -r {folder}; {again}")


def test_what_the_forwarder_started_outlives_it_in_its_unit(machines, wires):
    east, _ = machines
    group = "/sys/fs/cgroup/system.slice/vwire-forwarder.service/cgroup.procs"
    (pid,) = east.sh("grep -lz ^wireguard-go /proc/[0-9]*/cmdline | cut -d/ -f3").split()
    with no_packet_lost(east):
        for command in ("restart", "stop", "start"):
            east.run("systemctl", command, "vwire-forwarder")
            assert pid in east.run("cat", group).split(), command
    assert east.run("cat", f"/proc/{pid}/comm") == "wireguard-go\n"
    status = east.run("cat", f"/proc/{pid}/status")  # it reads packets from anybody
    held = re.findall(r"^Cap(Prm|Eff|Amb):\t([0-9a-f]+)$", status, re.MULTILINE)
    assert held == [(kind, f"{1 << 12:016x}") for kind in ("Prm", "Eff", "Amb")]
    (name,) = east.sh("ls /run/vwire/wireguard").split()
    view = ("nsenter", "-m", "-t", str(east.main_pid("vwire-forwarder")))
    assert name.removesuffix(".sock") in east.run(*view, "ls", "/run/wireguard")
    assert east.run(*view, "wg", "show", name.removesuffix(".sock"), "listen-port").strip() != "0"


@pytest.mark.long
def test_systemd_itself_may_be_reloaded_and_executed_anew(machines, wires):
    east, _ = machines
    pids = {unit: east.main_pid(unit) for unit in UNITS}
    with dropin(east, "vwire-nsmgr", "WatchdogSec=1s"):
        pids["vwire-nsmgr"] = east.main_pid("vwire-nsmgr")
        for command in ("daemon-reload", "daemon-reexec"):
            east.run("systemctl", command)
            heard = east.show("vwire-nsmgr", "WatchdogTimestampMonotonic")
            for _ in range(3):  # the watchdog still hears the same process
                wait(lambda h=heard: heard_since(east, h), "a word to the watchdog")
                heard = east.show("vwire-nsmgr", "WatchdogTimestampMonotonic")
            assert {unit: east.main_pid(unit) for unit in UNITS} == pids
    assert all(east.pings(unit) for unit in SERVICES)


def heard_since(one: Machine, before: str) -> bool:
    return one.show("vwire-nsmgr", "WatchdogTimestampMonotonic") != before


def test_all_of_it_stops_from_the_forwarder_to_the_issuer_and_wires_stay(machines, wires):
    east, _ = machines
    with no_packet_lost(east):
        # all at once, as a machine that goes down stops them
        conflicts = " ".join(f"{unit}.service" for unit in UNITS)
        east.sh(f"systemd-run --quiet --collect --property=Conflicts='{conflicts}' true")
        wait(lambda: {east.show(unit, "ActiveState") for unit in UNITS} == {"inactive"}, "the end")
        ended = [int(east.show(unit, "InactiveEnterTimestampMonotonic")) for unit in UNITS]
        assert ended == sorted(ended, reverse=True)
        assert {east.show(unit, "Result") for unit in UNITS} == {"success"}
        left = east.sh("find /run/vwire /var/lib/networkservicemesh -type s; ls /run/vwire")
        (sealed, *rest) = left.split()  # of a wireguard-go that runs on
        assert sealed.startswith("/run/vwire/wireguard/nsm")
        assert rest == ["forwarder", "issuer", "wireguard"]  # which others may have been given
        east.run("systemctl", "start", *UNITS)
        for unit in REFRESHING:
            wires.refreshed(unit)
    assert not wires.changed()


HANDLE = """
import os
from nsm.kernel import namespaces
handle = namespaces._handle(os.open("/proc/self/ns/net", os.O_RDONLY))
assert namespaces._by_handle(handle)
"""
PROGRAM = """
from nsm.kernel import splice
assert splice.load(splice.outward(1))
"""


@pytest.mark.parametrize(
    ("script", "since"),
    [(HANDLE, (6, 18)), (PROGRAM, (5, 8))],
    ids=["a namespace is found by its handle", "a tunnel is joined by a program"],
)
def test_what_a_forwarder_does_seldom_its_sandbox_lets_it_do(east, script, since):
    if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < since:
        pytest.skip("kernel lacks what is tried here")
    east.sh(f"cat >/opt/seldom.py <<'END'{script}END")
    with dropin(east, "vwire-forwarder", "ExecStartPre=/opt/vwire/bin/python -P /opt/seldom.py"):
        assert east.active("vwire-forwarder")


def test_a_wrong_setting_is_in_the_status_and_the_unit_stays_down_until_it_is_right(east):
    unit = "vwire-forwarder"
    with setting(east, "forwarder", "NSM_ISOLATION=sideways"):
        east.run("systemctl", "restart", unit, wrong=True)
        why = "NSM_ISOLATION is 'sideways'; expected one of auto, in-place, hop"
        assert why in east.journal(unit)
        assert east.show(unit, "StatusText") == f"cannot run: {why}"
        shown = [east.show(unit, one) for one in ("ExecMainStatus", "ActiveState", "NRestarts")]
        assert shown == ["2", "failed", "0"]
    east.run("systemctl", "start", unit)
    assert east.active(unit)


@pytest.mark.long
def test_a_unit_that_cannot_run_stays_down_in_the_end_and_says_so(east):
    unit = "vwire-forwarder"
    with dropin(east, unit, "[Unit]", "StartLimitBurst=3"):
        less = f"/etc/systemd/system/{unit}.service.d/less.conf"
        east.sh(f"printf '[Service]\\nAmbientCapabilities=\\n' >{less}; systemctl daemon-reload")
        try:
            east.run("systemctl", "restart", unit, wrong=True)
            wait(lambda: east.show(unit, "SubState") == "failed", "no more tries", bar=3)
            assert " lacks CAP_NET_ADMIN" in east.show(unit, "StatusText")
            assert east.show(unit, "ExecMainStatus") == "3"
        finally:
            east.sh(f"rm {less}; systemctl daemon-reload; systemctl reset-failed {unit}")
            east.run("systemctl", "start", unit)


@pytest.mark.long
def test_a_forwarder_waits_for_the_registry_longer_than_a_start_may_take_and_says_so(
    machines, wires
):
    east, _ = machines
    unit, folder = "vwire-forwarder", "/etc/systemd/system/vwire-forwarder.service.d"
    east.stop("vwire-registry")
    try:
        east.sh(f"mkdir {folder}; printf '[Service]\\nTimeoutStartSec=10s\\n' >{folder}/test.conf")
        east.sh(f"systemctl daemon-reload; systemctl restart --no-block {unit}")
        wait(lambda: " waits: not registered: " in east.show(unit, "StatusText"), "why", bar=3)
        pid = str(east.main_pid(unit))
        wait(lambda: int(east.run("ps", "-o", "etimes=", "-p", pid)) > 12, "its time", bar=15)
        assert east.show(unit, "ActiveState") == "activating"
        assert all(east.pings(one) for one in SERVICES)
    finally:
        east.sh(f"rm -r {folder}; systemctl daemon-reload; systemctl start vwire-registry")
    wait(lambda: east.active(unit), "its start", bar=3)
    assert str(east.main_pid(unit)) == pid


def test_a_namespace_with_a_name_ends_when_the_name_goes(machines):
    """Services have mounts of their own, and a namespace's name is a mount."""
    east, _ = machines
    ends = len(east.links("pong"))
    east.sh("ip netns add named; ip -n named link set lo up")
    place = "NetworkNamespacePath=/run/netns/named"
    urls = "kernel://echo/nsm-1"
    east.start("extra", CLIENT, "PrivateNetwork=no", place, NSM_NETWORK_SERVICES=urls)
    assert len(east.links("pong")) == ends + 1
    east.sh("systemctl kill --signal=KILL extra; ip netns del named")
    wait(lambda: len(east.links("pong")) == ends, "the far end's death", bar=0.5)
