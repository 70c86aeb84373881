"""What is asked for is checked before the kernel is touched; marks survive being read back."""

from dataclasses import replace
from fnmatch import fnmatch
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm.errors import InvalidError
from nsm.kernel import owner
from nsm.kernel.keys import Key
from nsm.kernel.state import (
    Hop,
    Interface,
    LocalWire,
    Namespace,
    Neighbour,
    Policy,
    RemoteWire,
    Route,
    Rule,
    Selector,
    VxlanTunnel,
    Wireguard,
    WireguardTunnel,
    check_mac,
    check_name,
    items,
    policies,
)

pytestmark = pytest.mark.unit

DEPLOY = Path(__file__).parents[3] / "deploy"

HERE = Namespace(1, 1, 1, "client")
END = Interface(HERE, "nsm-1")


@pytest.mark.parametrize("name", ["nsm-1", "a", "fifteen-bytes-x", "eth0.7", "x@y"])
def test_good_names_pass(name: str) -> None:
    assert check_name(name, "wire") == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "has no name"),
        ("sixteen-bytes-xx", "has 16 bytes, Linux allows 15"),
        ("äöüäöüäö", "has 16 bytes"),
        ("a/b", "cannot be the name"),
        ("a b", "cannot be the name"),
        ("a%d", "cannot be the name"),
        (".", "cannot be the name"),
        ("..", "cannot be the name"),
        ("a\n", "cannot be the name"),
        ("a\x00b", "cannot be the name"),
        ("all", "cannot be the name"),
        ("default", "cannot be the name"),
    ],
)
def test_bad_names_are_refused_with_the_reason(name: str, said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        check_name(name, "wire id-1")


@pytest.mark.parametrize("mac", ["", "02:00", "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "zz:" * 6])
def test_macs_that_no_interface_can_have_are_refused(mac: str) -> None:
    with pytest.raises(InvalidError):
        check_mac(mac)


@pytest.mark.parametrize(
    ("wire", "said"),
    [
        (LocalWire("id", END, END), "both ends of wire id are to be called nsm-1 in client"),
        (LocalWire("id", replace(END, mtu=10), END), "an MTU of 10"),
        (
            LocalWire("id", replace(END, mtu=1279, addresses=(ip_interface("::1/128"),)), END),
            "not within 1280",
        ),
        (LocalWire("", END, replace(END, name="b")), "needs a connection id"),
        (LocalWire("ä" * 60, END, replace(END, name="b")), "does not fit into a link alias"),
    ],
)
def test_impossible_wires_are_refused_with_the_reason(wire: LocalWire, said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        items(wire, 1)


@pytest.mark.parametrize(
    ("tunnel", "said"),
    [
        ((0, "1.1.1.1", "2.2.2.2", 4789), "VNI 0"),
        ((1 << 24, "1.1.1.1", "2.2.2.2", 4789), "VNI 16777216"),
        ((1, "1.1.1.1", "::2", 4789), "mixes IPv4 and IPv6"),
        ((1, "1.1.1.1", "2.2.2.2", 65536), "UDP port 65536"),
    ],
)
def test_impossible_tunnels_are_refused(tunnel: tuple[int, str, str, int], said: str) -> None:
    vni, local, remote, port = tunnel
    made = VxlanTunnel(vni, ip_address(local), ip_address(remote), HERE, port)
    with pytest.raises(InvalidError, match=said):
        items(RemoteWire("id", "src", END, made), 1)


def test_the_kernels_own_connected_route_is_not_asked_for() -> None:
    end = replace(
        END,
        addresses=(ip_interface("10.0.0.1/24"),),
        routes=(Hop(ip_network("10.0.0.0/24")), Hop(ip_network("10.1.0.0/24"))),
    )
    made = items(LocalWire("id", end, replace(END, name="b")), 1)
    assert [str(i.to) for i in made if isinstance(i, Route)] == ["10.1.0.0/24"]


def test_policies_take_the_lowest_free_table_and_keep_the_one_they_have() -> None:
    one = Policy(Selector(ip_network("10.0.0.1/32"), 6, None, (443, 443)))
    two = Policy(Selector(ip_network("2001:db8::1/128")))
    end = replace(END, policies=(one, two))
    made = policies(end, [], {1, 3, 254}, {7800})
    rules = sorted((r for r in made if isinstance(r, Rule)), key=lambda r: r.priority)
    assert [(r.table, r.priority, r.family) for r in rules] == [(2, 7801, 4), (4, 7802, 6)]
    assert {str(r.to) for r in made if isinstance(r, Route)} == {"0.0.0.0/0", "::/0"}
    again = policies(replace(END, policies=(two, one)), rules, {1, 2, 3, 4}, {7800, 7801, 7802})
    assert again == made


@given(
    st.text(min_size=1, max_size=20),
    st.sampled_from(["src", "dst"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, (1 << 64) - 1),
    st.text(max_size=8),
    st.booleans(),
)
def test_a_mark_read_back_is_the_mark_written(
    connection: str,
    side: owner.SideName,
    rules: bool,
    hop: bool,
    underlay: int,
    far: str,
    lead: bool,
) -> None:
    made = owner.mark(connection, side, rules=rules, hop=hop, underlay=underlay, far=far, lead=lead)
    assert owner.Mark.parse(str(made)) == made
    assert str(made).isascii()


def test_the_longest_id_that_is_promised_fits_with_all_there_is_to_say() -> None:
    ipv6 = "[2001:db8:1111:2222:3333:4444:5555:6666]:65535"
    owner.mark("i" * 80, "src", rules=True, hop=True, underlay=(1 << 64) - 1, far=ipv6)


@pytest.mark.parametrize("said", ["on=x", "on=-1", "on=" + "9" * 30, "on=\u0661", "to", "=", "on="])
def test_garbage_in_a_mark_says_nothing(said: str) -> None:
    assert owner.Mark.parse(f"nsm:id:src:{said}") == owner.Mark("id", "src")


TUNNEL = WireguardTunnel(
    Key(b"\1" * 32),
    Key(b"\2" * 32).public,
    ip_address("192.0.2.1"),
    ip_address("192.0.2.2"),
    51820,
    HERE,
    51820,
    "kernel",
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peer": "x"}, "the far end's key 'x' is not a WireGuard public key"),
        ({"peer": Key(b"\1" * 32).public}, "both ends have the key"),
        ({"remote": ip_address("::2")}, "mixes IPv4 and IPv6"),
        ({"port": 0}, "UDP port 0 is not within 1 and 65535"),
        ({"remote_port": 65536}, "UDP port 65536"),
        ({"keepalive": -1}, "a keepalive of -1 s"),
    ],
)
def test_impossible_encrypted_tunnels_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        items(RemoteWire("id", "src", END, replace(TUNNEL, **change)), 1)


def test_an_encrypted_tunnel_has_no_mac_and_no_neighbours_and_says_where_it_belongs() -> None:
    end = replace(
        END, mac="02:00:00:00:00:01", neighbours=((ip_address("::9"), "02:00:00:00:00:09"),)
    )
    made = items(RemoteWire("id", "src", end, TUNNEL), 1)
    assert not [item for item in made if isinstance(item, Neighbour)]
    (tunnel,) = (item for item in made if isinstance(item, Wireguard))
    assert tunnel.end.mac == ""
    mark = owner.Mark.parse(tunnel.end.alias)
    assert mark == owner.Mark("id", "src", underlay=1, far="192.0.2.2:51820")


@given(st.text(max_size=40))
def test_foreign_aliases_are_nobodys_marks(alias: str) -> None:
    mark = owner.Mark.parse(alias)
    assert mark is None or alias.startswith("nsm:")


def test_derived_macs_are_stable_local_and_differ_by_side() -> None:
    src, dst = owner.mac("id", "src"), owner.mac("id", "dst")
    assert src == owner.mac("id", "src") != dst
    assert check_mac(src) == src
    assert int(src[:2], 16) & 3 == 2


def test_names_of_the_underlays_devices_differ_and_are_what_managers_of_links_are_told() -> None:
    pairs = [(name, side) for name in ("id", "another") for side in owner.SIDES]
    names = {make(*pair) for make in (owner.tunnel_name, owner.lead_name) for pair in pairs}
    assert len(names) == 2 * len(pairs)
    for file in ("networkd/10-vwire.network", "NetworkManager/vwire.conf"):
        assert "nsm*" in (DEPLOY / file).read_text()
    assert {len(name) for name in names} == {15}
    assert not [name for name in names if not fnmatch(name, "nsm*")]
