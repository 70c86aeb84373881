"""What the kernel can do, and what it lets us do: each line where that is not so."""

import re
import shutil
import subprocess

import pytest

from forwarder import rights
from nsm.errors import InternalError, UnsupportedError
from nsm.kernel import trial
from nsm.kernel.namespaces import have_handles
from nsmctl.machine import kernel
from nsmctl.machine.asking import Level, Question, ask
from tests.kernel.doctor.world import ALL_USERS, AS_NOBODY, FENCE, NSMCTL, doctor, inside

WITHOUT_NET_ADMIN = "setpriv --bounding-set=-net_admin --inh-caps=-net_admin"
WITHOUT_SYS_ADMIN = "setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin"
LINKS = {"veth": "bad", "bridge": "bad", "vxlan": "bad", "macvlan": "note"}


def kernel_has(*command: str) -> bool:
    """Whether this kernel does what a stock command asks for, in a namespace of its own."""
    done = subprocess.run(["unshare", "-n", *command], capture_output=True, check=False)
    return done.returncode == 0


WIREGUARD = kernel_has("ip", "link", "add", "w", "type", "wireguard")
NETEM = kernel_has("tc", "qdisc", "add", "dev", "lo", "root", "netem")


# --- rights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lacks", rights.NEEDED)
def test_root_without_a_capability_is_told_which_and_what_it_is_for(lacks):
    name = lacks.removeprefix("CAP_").lower()
    told = doctor(rights=f"setpriv --bounding-set=-{name} --inh-caps=-{name}")
    assert told.code == 1
    spare = lacks == "CAP_SYS_PTRACE" and have_handles()
    hop = ", or set NSM_ISOLATION=hop" if spare else ""
    assert told.line("capabilities") == (
        "bad",
        f"no {lacks}: {rights.WITHOUT[lacks]}",
        f"give it to the container or service this runs in{hop}",
    )


def test_an_ordinary_user_is_told_what_was_not_tried_and_how_to_ask_again():
    # udev opens it to everybody, and not every machine has udev
    closed = "mount -t tmpfs none /dev/net; mknod -m 600 /dev/net/tun c 10 200"
    told = inside(f"{closed}; exec {AS_NOBODY} --json")
    assert told.code == 1, told.err
    assert told.err == ""
    assert told.line("capabilities") == (
        "bad",
        f"user 65534 lacks {', '.join(rights.NEEDED)}",
        "sudo /opt/x/bin/nsmctl doctor --json",
    )
    not_tried = ("note", "not tried: user 65534 may not", "ask again as root")
    for name in ("namespaces", "tun", "input", "cgroup"):
        assert told.line(name) == not_tried, name
    # these are tried in a user namespace, where this machine lets users make them
    as_nobody = ("--reuid=65534", "--regid=65534", "--clear-groups")
    opened = kernel_has(
        "setpriv", *as_nobody, "unshare", "--user", "--map-root-user", "--net", "true"
    )
    for name in ("veth", "bridge", "vxlan", "macvlan", "nft", "sysctls"):
        assert told.line(name)[0] == ("ok" if opened else "note"), name


# --- namespaces and settings -----------------------------------------------------------------


def test_no_more_namespaces_is_told_with_the_limit_to_raise():
    told = doctor("echo 0 >/proc/sys/user/max_net_namespaces", before="unshare -U -r")
    assert told.code == 1
    level, found, fix = told.line("namespaces")
    assert (level, fix) == ("bad", "raise /proc/sys/user/max_net_namespaces")
    assert "No space left on device" in found


def test_root_that_may_not_make_namespaces_is_told_so():
    level, found, fix = doctor(rights=WITHOUT_SYS_ADMIN).line("namespaces")
    assert (level, fix) == ("bad", "allow mount and unshare to the container")
    assert "unshare --mount" in found


def test_settings_that_cannot_be_set_are_told():
    read_only = "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys"
    told = doctor(read_only)
    assert told.code == 1
    level, found, fix = told.line("sysctls")
    assert (level, fix) == ("bad", "mount /proc/sys read-write")
    assert "`sysctl -w net.ipv4.conf.lo.route_localnet`" in found
    assert "Read-only file system" in found


# --- devices ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def powerless():
    return doctor(rights=WITHOUT_NET_ADMIN)


@pytest.mark.parametrize("name", LINKS)
def test_a_device_that_may_not_be_made_is_told_with_the_kernels_word(powerless, name):
    level, found, fix = powerless.line(name)
    assert (level, fix) == (LINKS[name], "give this container CAP_NET_ADMIN")
    # a macvlan's lower device is refused before it is
    made = "try-m type veth" if name == "macvlan" else f"try-{name} type {name}"
    assert re.search(rf"`ip link add {made}` .*: Operation not permitted", found), found


NOT_PERMITTED = r"`{}` .*: Operation not permitted"
MADE_BY_NETLINK = {  # what root without CAP_NET_ADMIN is told it could not do, and its level
    "wireguard": ("bad", NOT_PERMITTED.format("ip link add try-wireguard type wireguard")),
    "tun": ("note", NOT_PERMITTED.format("ip tuntap add try-tun mode tun")),
    "hop": ("note", NOT_PERMITTED.format("ip link add try-veth type veth")),
    "nft": ("note", NOT_PERMITTED.format("nft add chain inet try in")),
    "netem": ("note", NOT_PERMITTED.format("tc qdisc add dev lo root netem")),
}


@pytest.mark.parametrize("name", MADE_BY_NETLINK)
def test_what_may_not_be_tried_is_not_taken_for_missing(powerless, name):
    expected, said = MADE_BY_NETLINK[name]
    level, found, fix = powerless.line(name)
    assert (level, fix) == (expected, "give this container CAP_NET_ADMIN")
    assert re.fullmatch(said, found), found


def test_nor_is_wireguard_where_its_program_is_missing():
    no_program = "mount --bind /dev/null $(which wireguard-go)"
    told = doctor(no_program, rights=WITHOUT_NET_ADMIN)
    for name, level, before in (
        ("wireguard", "bad", ""), ("wireguard-go", "note", r"not installed; is it needed\? ")
    ):  # fmt: skip
        said, found, fix = told.line(name)
        assert (said, fix) == (level, "give this container CAP_NET_ADMIN")
        assert re.fullmatch(before + MADE_BY_NETLINK["wireguard"][1], found), found


def test_a_tun_that_may_not_be_opened_is_told():
    told = doctor(
        "mount -t tmpfs none /dev/net; mknod -m 0 /dev/net/tun c 10 200",
        rights="setpriv --bounding-set=-dac_override --inh-caps=-dac_override",
    )
    expected = ("note", "may not open /dev/net/tun", "let this container use /dev/net/tun")
    assert told.line("tun") == expected
    if not WIREGUARD:
        fix = f"modprobe wireguard, or {expected[2]}"
        assert told.line("wireguard") == ("bad", expected[1], fix)


def test_where_not_even_a_place_to_try_in_can_be_made_that_is_told():
    closed = "echo 0 >/proc/sys/user/max_user_namespaces"
    told = doctor(closed, before=ALL_USERS, rights=WITHOUT_SYS_ADMIN)
    for name, level in {**LINKS, "wireguard": "bad", "hop": "note", "sysctls": "bad"}.items():
        said, found, fix = told.line(name)
        assert (said, fix) == (level, "let this container make namespaces")
        assert "unshare --net --mount" in found


@pytest.mark.parametrize("needed", [True, False])
def test_a_kind_of_device_the_kernel_does_not_know_is_told_with_what_to_load(needed):
    def ask_for_it():
        return kernel._tried(
            lambda: trial._make("try-x", "no-such-kind"), "wires to the moon", "modprobe moon",
            needed=needed,
        )  # fmt: skip

    (line,) = ask([Question("moon", "moon", ask_for_it)])
    assert (line.level, line.found, line.fix) == (
        Level.BAD if needed else Level.NOTE,
        "the kernel has none: no wires to the moon",
        "modprobe moon",
    )


@pytest.mark.parametrize("kind", ["veth", "bridge", "vxlan", "macvlan", "wireguard"])
def test_what_is_tried_is_what_its_line_says(kind):
    def makes_it():
        trial.apart()
        try:
            getattr(trial, kind)()
        except UnsupportedError as lacking:
            return kernel.ok(lacking.message)
        return kernel.ok(subprocess.check_output(["ip", "-d", "link"], text=True))

    (line,) = ask([Question("x", "x", makes_it)])
    made = re.compile(rf"^ +{kind} |type {kind}`.* Operation not supported", re.MULTILINE)
    assert made.search(line.found), line.found


def test_nf_tables_that_the_kernel_does_not_have_is_a_note():
    fence = f"{FENCE} EPROTONOSUPPORT socket 0=16 2=12 --"
    told = doctor(rights=fence)
    assert told.line("nft") == (
        "note", "the kernel has none: no faults in labs", "modprobe nf_tables"
    )  # fmt: skip
    assert told.line("input")[0] == "ok"  # nor are there rules that could drop


def test_netem_is_there_if_stock_tc_says_so():
    expected = (
        ("ok", "for delay and loss in labs", "")
        if NETEM
        else ("note", "the kernel has none: no delay and loss in labs", "modprobe sch_netem")
    )
    assert doctor().line("netem") == expected


# --- WireGuard -------------------------------------------------------------------------------

BOTH_WAYS = "modprobe wireguard, or apt install wireguard-go"


def test_wireguard_is_the_kernels_or_else_that_of_wireguard_go():
    expected = (
        ("ok", "in the kernel", "")
        if WIREGUARD
        else ("note", "userspace (no kernel module)", "modprobe wireguard")
    )
    told = doctor()
    assert told.line("wireguard") == expected
    version = subprocess.run(
        ["wireguard-go", "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    assert told.line("wireguard-go") == ("ok", f"{version}, {shutil.which('wireguard-go')}", "")


@pytest.mark.needs_kernel("wireguard", "netem")
def test_a_kernel_that_has_it_needs_nothing_else():
    told = doctor("mount --bind /dev/null $(which wireguard-go); mount -t tmpfs none /dev/net")
    assert told.line("wireguard") == ("ok", "in the kernel", "")
    instead = ("ok", "none, and none is needed: the kernel has WireGuard", "")
    assert told.line("wireguard-go") == instead
    assert told.line("tun") == instead
    assert told.line("netem") == ("ok", "for delay and loss in labs", "")


@pytest.mark.skipif(WIREGUARD, reason="kernel has no need of wireguard-go")
def test_without_any_wireguard_there_are_two_ways_to_get_it():
    told = doctor("mount --bind /dev/null $(which wireguard-go)")
    assert told.code == 1
    assert told.line("wireguard-go") == ("note", "not installed", "apt install wireguard-go")
    assert told.line("wireguard") == (
        "bad", "neither in the kernel nor as wireguard-go: no encrypted wires", BOTH_WAYS
    )  # fmt: skip


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        ("mount -t tmpfs none /dev/net", "there is no /dev/net/tun"),
        ("mount -t tmpfs none /dev/net; mknod /dev/net/tun c 10 251", "/dev/net/tun: No such dev"),
    ],
)
@pytest.mark.skipif(WIREGUARD, reason="kernel has no need of wireguard-go")
def test_a_hidden_tun_is_told_and_what_stands_on_it_too(hidden, said):
    told = doctor(hidden)
    assert told.code == 1
    level, found, fix = told.line("tun")
    assert level == "note"
    assert found.startswith(said)
    assert fix == "modprobe tun; in a container, mount /dev/net/tun"
    level, found, fix = told.line("wireguard")
    assert (level, fix) == ("bad", BOTH_WAYS)
    assert said in found


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'it is broken here'; exit 3", "it is broken here"),
        ("exit 3", "it did not say why"),
    ],
)
@pytest.mark.skipif(WIREGUARD, reason="kernel has no need of wireguard-go")
def test_a_wireguard_go_that_makes_no_device_is_told_with_what_it_says(tmp_path, script, said):
    program = tmp_path / "wireguard-go"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    told = doctor(PATH=f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin")
    assert told.line("wireguard-go")[0] == "note"
    assert told.line("wireguard") == (
        "bad", f"no kernel module, and {program} makes no device: {said}: no encrypted wires",
        BOTH_WAYS,
    )  # fmt: skip


@pytest.mark.skipif(WIREGUARD, reason="kernel has no need of wireguard-go")
def test_a_wireguard_go_that_is_slow_is_not_taken_for_a_broken_one(tmp_path):
    program = tmp_path / "wireguard-go"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    told = doctor(PATH=f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin")
    level, found, fix = told.line("wireguard")
    assert level == "note"
    assert found == f"no kernel module, and {program} makes no device within 2 s"
    assert re.fullmatch(rf"ask again when this machine has .*\); {BOTH_WAYS}", fix), fix


# --- what joins a workload with its tunnel ---------------------------------------------------


def test_programs_for_packets_are_there_if_stock_tc_says_so():
    ingress = "tc qdisc add dev lo ingress && tc filter add dev lo ingress bpf bytecode '1,6 0 0 0'"
    there = subprocess.run(["unshare", "-n", "sh", "-c", ingress], check=False, capture_output=True)
    level, found, _ = doctor().line("hop")
    assert ("holders of CAP_NET_ADMIN" in found) == (there.returncode == 0), there.stderr
    assert level == ("ok" if there.returncode == 0 or not WIREGUARD else "note")


def test_a_kernel_that_takes_no_program_is_a_note_where_a_tunnel_would_need_it():
    level, found, fix = doctor(rights=f"{FENCE} ENOSYS bpf --").line("hop")
    if WIREGUARD:
        assert (level, "cannot join a workload" in found) == ("note", True)
        assert "CONFIG_NET_CLS_BPF" in fix
    else:
        needless = "not to be had, and not needed: wireguard-go's device shows no key"
        assert (level, found, fix) == ("ok", needless, "")


def test_a_container_that_may_load_no_program_is_told_what_to_give_it():
    assert doctor(rights=f"{FENCE} EPERM bpf --").line("hop") == (
        "note", "may not load a program for packets", "give this container CAP_BPF or CAP_SYS_ADMIN"
    )  # fmt: skip


# --- and where it must not -------------------------------------------------------------------


@pytest.mark.parametrize(
    "attempt",
    [
        trial.settings, trial.veth, trial.bridge, trial.vxlan, trial.macvlan, trial.wireguard,
        trial.netem, trial.nft, trial.tun, trial.hop, lambda: trial.wireguard_go("/bin/true"),
    ],
)  # fmt: skip
def test_nothing_is_tried_where_others_are(attempt):
    with pytest.raises(InternalError, match="nothing is tried outside"):
        attempt()


def test_a_host_that_lets_nobody_go_apart_keeps_its_run():
    told = inside(
        "echo 0 >/proc/sys/user/max_net_namespaces; touch /run/here;"
        f" {NSMCTL} doctor --json || ls /run >&2; ip -br link >&2",
        before="unshare -U -r",
    )
    for name in ("veth", "netem", "wireguard", "hop", "tun"):
        assert "no more namespaces to try in" in told.line(name)[1], name
        assert told.line(name)[2] == "raise /proc/sys/user/max_net_namespaces", name
    assert told.err.split()[0] == "here"
    assert "try" not in told.err
