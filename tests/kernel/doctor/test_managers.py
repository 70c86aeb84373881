"""Other managers of links: their own files say whether they would take ours."""

from pathlib import Path

import pytest

from tests.kernel.doctor.world import ROOT, doctor, inside

pytestmark = pytest.mark.long

NETWORKD = Path("/lib/systemd/systemd-networkd")
SNIPPET = ROOT / "deploy/networkd/10-vwire.network"
ALL = "[Match]\\nName=*\\n[Network]\\nAddress=10.7.7.7/24\\n"
LEAVES = ("ok", "leaves ours alone", "")


def runs(name: str) -> str:
    """A process of that name; it does nothing, and is not asked to."""
    there = f"while ! grep -q ^{name[:15]} /proc/$!/comm; do sleep 0.01; done"
    return f"mkdir -p /run/bin; cp /bin/sleep /run/bin/{name}; /run/bin/{name} 600 & {there}"


def networkd_with(**files: str) -> str:
    lines = [f"mkdir -p /run/systemd/network; {runs('systemd-networkd')}"]
    for name, text in files.items():
        lines.append(f"printf '{text}' >/run/systemd/network/{name.replace('__', '.')}")
    return "\n".join(lines)


def test_who_does_not_run_takes_nothing():
    told = doctor(f"mkdir -p /run/systemd/network; printf '{ALL}' >/run/systemd/network/1.network")
    for name in ("udev", "networkd", "network-manager"):
        assert told.line(name) == ("ok", "does not run here", "")


# --- systemd-networkd ------------------------------------------------------------------------


def test_networkd_that_takes_every_device_is_told_with_the_file():
    told = doctor(networkd_with(all__network=ALL))
    assert told.code == 0
    assert told.line("networkd") == (
        "note",
        "/run/systemd/network/all.network takes veth nsm-1",
        "before it, a file with [Match] Name=nsm* [Link] Unmanaged=yes; networkctl reload",
    )


def test_what_we_ship_for_networkd_is_what_it_needs():
    both = f"{networkd_with(z__network=ALL)}\ncp {SNIPPET} /run/systemd/network"
    assert doctor(both).line("networkd") == LEAVES


@pytest.mark.parametrize("ours", [True, False])
def test_networkd_itself_does_what_the_line_says_of_it(ours):
    """Its word against ours: where there is none on this machine, only ours."""
    if not NETWORKD.exists():
        return
    told = inside(
        "mount -t sysfs -o ro none /sys; mkdir -p /run/systemd/network;"  # no udev to wait for
        f" printf '{ALL}' >/run/systemd/network/50-all.network;"
        + (f" cp {SNIPPET} /run/systemd/network/;" if ours else "")
        # a device is configured once it has a carrier, which its peer has to be managed for
        + " ip link add nsm-1 type veth peer name nsm-2; ip link add other type veth peer name far;"
        f" {NETWORKD} 2>/dev/null &\n"
        f" for n in $(seq 500); do ip -br addr show {'other' if ours else 'nsm-1'} |"
        " grep -q 10.7.7.7 && break; sleep 0.02;"
        " done; ip -br addr show nsm-1; ip -br addr show other"
    )
    devices = dict(line.split(maxsplit=1) for line in told.out.splitlines())
    if ours:  # it did what it does, though not to ours
        assert "10.7.7.7/24" in devices["other@far"], told.out
    assert ("10.7.7.7/24" in devices["nsm-1@nsm-2"]) is not ours, told.out


def test_the_first_file_decides_and_one_in_etc_hides_its_namesake():
    unmanaged = "[Match]\\nName=nsm*\\n[Link]\\nUnmanaged=yes\\n"
    first = networkd_with(**{"5__network": unmanaged, "9__network": ALL})
    assert doctor(first).line("networkd") == LEAVES
    last = networkd_with(**{"5__network": ALL, "9__network": unmanaged})
    assert "5.network takes" in doctor(last).line("networkd")[1]
    etc = "mount -t tmpfs none /etc/systemd; mkdir /etc/systemd/network"
    hidden = f"{etc}; ln -s /dev/null /etc/systemd/network/5.network; {last}"
    assert doctor(hidden).line("networkd") == LEAVES
    more = "mkdir /run/systemd/network/5.network.d; printf '[Link]\\nUnmanaged=yes\\n'"
    drop_in = (
        f"{networkd_with(**{'5__network': ALL})}\n{more} >/run/systemd/network/5.network.d/a.conf"
    )
    assert doctor(drop_in).line("networkd") == LEAVES


# --- udev ------------------------------------------------------------------------------------


def udev_with(text: str) -> str:
    folder = "/run/systemd/network"
    return f"mkdir -p {folder}; {runs('systemd-udevd')}\nprintf '{text}' >{folder}/50-x.link"


def test_udev_leaves_a_mac_alone_that_was_given():
    policy = "[Match]\\nOriginalName=*\\n[Link]\\nNamePolicy=path\\nMACAddressPolicy=persistent\\n"
    assert doctor(udev_with(policy)).line("udev") == (
        "ok", "leaves names and given MACs alone", ""
    )  # fmt: skip


def test_udev_that_changes_ours_is_told_with_the_file_and_what_it_sets():
    changes = "[Match]\\nKind=vxlan\\n[Link]\\nMACAddress=02:00:00:00:00:01\\nMTUBytes=900\\n"
    told = doctor(udev_with(changes))
    assert told.code == 0
    level, found, fix = told.line("udev")
    assert level == "note"
    start = "/run/systemd/network/50-x.link sets MACAddress, MTUBytes of vxlan nsm"
    assert found.startswith(start)
    assert "OriginalName=!nsm*" in fix


def test_udev_that_writes_over_our_mark_is_told():
    """The alias, by which a forwarder that starts again finds its wires."""
    level, found, _ = doctor(udev_with("[Match]\\nDriver=veth\\n[Link]\\nAlias=mine\\n")).line(
        "udev"
    )
    assert (level, found) == ("note", "/run/systemd/network/50-x.link sets Alias of veth nsm-1")


# --- NetworkManager --------------------------------------------------------------------------


def manager_with(**files: str) -> str:
    lines = [
        "mkdir -p /run/NetworkManager/conf.d; mkdir -p /run/x/conf.d",
        "if [ -d /etc/NetworkManager ]; then mount --bind /run/x /etc/NetworkManager; fi",
        runs("NetworkManager"),
    ]
    for name, text in files.items():
        lines.append(f"printf '{text}' >/run/NetworkManager/conf.d/{name}.conf")
    return "\n".join(lines)


LINE = "[keyfile] unmanaged-devices+=interface-name:nsm*"
MAY = (
    "note",
    "may take veth nsm-1 for its own",
    f"{LINE} in /etc/NetworkManager/conf.d; nmcli general reload",
)


def test_networkmanager_that_was_told_nothing_is_a_note():
    told = doctor(manager_with())
    assert told.code == 0
    assert told.line("network-manager") == MAY


def test_what_we_ship_for_networkmanager_is_enough():
    shipped = ROOT / "deploy/NetworkManager/vwire.conf"
    told = doctor(f"{manager_with()}\ncp {shipped} /run/NetworkManager/conf.d")
    assert told.line("network-manager") == LEAVES


def test_a_later_file_replaces_what_an_earlier_one_said_or_adds_to_it():
    one = "[keyfile]\\nunmanaged-devices=interface-name:nsm*\\n"
    other = "[keyfile]\\nunmanaged-devices%s=type:bridge\\n"
    assert doctor(manager_with(a=one, b=other % "")).line("network-manager") == MAY
    assert doctor(manager_with(a=one, b=other % "+")).line("network-manager") == LEAVES
    taken_back = "[keyfile]\\nunmanaged-devices-=interface-name:nsm*\\n"
    assert doctor(manager_with(a=one, b=taken_back)).line("network-manager") == MAY


def test_a_device_section_leaves_ours_alone_too():
    section = "[device-x]\\nmatch-device=interface-name:nsm*\\nmanaged=0\\n"
    assert doctor(manager_with(a=section)).line("network-manager") == LEAVES


def test_a_file_in_etc_hides_its_namesake():
    leaves = "[keyfile]\\nunmanaged-devices=interface-name:nsm*\\n"
    etc = "mount -t tmpfs none /etc; mkdir -p /etc/NetworkManager/conf.d; touch {}"
    hides = f"{manager_with(a=leaves)}\n{etc.format('/etc/NetworkManager/conf.d/a.conf')}"
    assert doctor(hides).line("network-manager") == MAY
    beside = f"{manager_with(a=leaves)}\n{etc.format('/etc/NetworkManager/conf.d/b.conf')}"
    assert doctor(beside).line("network-manager") == LEAVES
