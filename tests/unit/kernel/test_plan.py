"""Whatever is there, the plan leads to what is wanted, and each of its prefixes leads back."""

import base64
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm.kernel import owner
from nsm.kernel.keys import Key
from nsm.kernel.plan import Step, plan
from nsm.kernel.state import (
    Address,
    Hop,
    Interface,
    Item,
    LocalWire,
    Macvlan,
    Namespace,
    Neighbour,
    OnTop,
    Policy,
    RemoteWire,
    Route,
    Rule,
    Selector,
    Splice,
    State,
    Stub,
    Sysctl,
    Veth,
    Vxlan,
    VxlanTunnel,
    Wire,
    Wireguard,
    WireguardTunnel,
    items,
    member_of,
    policies,
)

pytestmark = pytest.mark.unit

CLIENT, SERVER, UNDERLAY = (
    Namespace(cookie, cookie, cookie, name)
    for cookie, name in ((1, "client"), (2, "server"), (3, "underlay"))
)
GROUP = owner.group("test")
LINKS = (Veth, Vxlan, Wireguard, Macvlan, Splice, Stub)


class Model:
    """As much of a kernel as a plan can offend."""

    def __init__(self, state: State) -> None:
        self.state: set[Item] = set(state)

    def take(self, step: Step) -> None:
        item = step.item
        if step.verb == "set":
            assert step.before in self.state, f"{step}: {step.before} is not there"
            self.state.remove(step.before)
            if not isinstance(item, Sysctl):
                assert item.core == step.before.core, f"{step} changes what cannot be changed"
            self.state.add(item)
        elif step.verb == "add":
            self.add(step, item)
        else:
            assert item in self.state, f"{step}: not there"
            if isinstance(item, LINKS):
                seats = {end.seat for end in item.ends}
                on_it = [other for other in self.state if member_of(other) in seats]
                on_it += [o for o in self.state if isinstance(o, OnTop) and o.lower in seats]
                assert not on_it, f"{step} takes {on_it} away, and nobody could bring it back"
            self.state.remove(item)
        tables = {(i.namespace, i.table) for i in self.state if isinstance(i, Route)}
        for rule in self.rules():
            assert (rule.namespace, rule.table) in tables, (
                f"after {step} the rule {rule} leads nowhere"
            )

    def add(self, step: Step, item: Item) -> None:
        assert item not in self.state, f"{step}: there already"
        if isinstance(item, LINKS):
            seats = {end.seat for end in item.ends}
            assert not seats & self.seats(), f"{step}: the name is taken"
            if isinstance(item, Vxlan):
                claims = {i.claim for i in self.state if isinstance(i, Vxlan)}
                assert item.claim not in claims, f"{step}: the VNI is taken"
            if isinstance(item, Wireguard):
                ports = {i.claim for i in self.state if isinstance(i, Wireguard)}
                assert item.claim not in ports, f"{step}: the port is taken"
            if isinstance(item, OnTop):
                cores = {i.core for i in self.state if isinstance(i, Vxlan | Wireguard)}
                assert item.on in cores, f"{step}: there is no such tunnel"
        elif member_of(item):
            assert member_of(item) in self.seats(), f"{step}: no such device"
        self.state.add(item)

    def rules(self) -> list[Rule]:
        return [item for item in self.state if isinstance(item, Rule)]

    def seats(self) -> set[object]:
        return {end.seat for item in self.state if isinstance(item, LINKS) for end in item.ends}


ADDRESSES = ["10.0.0.1/32", "10.0.0.2/24", "10.1.0.1/31", "2001:db8::1/128", "2001:db8::2/64"]
HOPS = [
    Hop(ip_network("10.9.0.0/16")),
    Hop(ip_network("10.9.0.0/16"), ip_address("10.0.0.9")),
    Hop(ip_network("10.9.0.0/16"), metric=7),
    Hop(ip_network("2001:db8:9::/48"), ip_address("2001:db8::9")),
]
POLICIES = [
    Policy(Selector(ip_network("10.0.0.1/32"))),
    Policy(Selector(None, 6, None, (443, 443)), (HOPS[0],)),
    Policy(Selector(ip_network("2001:db8::1/128"))),
]
NEIGHBOURS = [
    (ip_address("10.0.0.9"), "02:00:00:00:00:09"),
    (ip_address("10.0.0.9"), "02:00:00:00:00:0a"),
    (ip_address("2001:db8::9"), "02:00:00:00:00:09"),
]


def some(values: list[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(st.sampled_from(values), unique=True).map(tuple)


def interfaces(namespace: Namespace) -> st.SearchStrategy[Interface]:
    return st.builds(
        Interface,
        namespace=st.just(namespace),
        name=st.sampled_from(["nsm-1", "nsm-2"]),
        mtu=st.sampled_from([1400, 1500]),
        mac=st.sampled_from(["", "02:00:00:00:00:01"]),
        addresses=some([ip_interface(a) for a in ADDRESSES]),
        routes=some(HOPS),
        neighbours=some(NEIGHBOURS),
        policies=some(POLICIES),
        route_localnet=st.booleans(),
        ping=st.booleans(),
    )


TUNNELS = st.builds(
    VxlanTunnel,
    vni=st.sampled_from([42, 43]),
    local=st.sampled_from([ip_address("192.0.2.1"), ip_address("192.0.2.3")]),
    remote=st.just(ip_address("192.0.2.2")),
    underlay=st.just(UNDERLAY),
    port=st.sampled_from([4789, 4790]),
)
KEYS = [Key(bytes([n]) * 32) for n in (1, 2)]
FAR = [Key(bytes([n]) * 32).public for n in (3, 4, 5)]
ENCRYPTED = st.builds(
    WireguardTunnel,
    key=st.sampled_from(KEYS),
    peer=st.sampled_from(FAR[:2]),
    local=st.just(ip_address("192.0.2.1")),
    remote=st.sampled_from([ip_address("192.0.2.2"), ip_address("192.0.2.4")]),
    remote_port=st.sampled_from([51820, 51821]),
    underlay=st.just(UNDERLAY),
    port=st.sampled_from([51820, 51821]),
    engine=st.sampled_from(["kernel", "userspace"]),
    keepalive=st.sampled_from([0, 10]),
)
WIRES = st.one_of(
    st.builds(LocalWire, st.just("id"), interfaces(CLIENT), interfaces(SERVER)),
    st.builds(
        RemoteWire, st.just("id"), st.just("src"), interfaces(CLIENT), TUNNELS, st.booleans()
    ),
    st.builds(
        RemoteWire, st.just("id"), st.just("src"), interfaces(CLIENT), ENCRYPTED, st.booleans()
    ),
)


def whole(wire: Wire, found: State = frozenset()) -> State:
    """What a wire is in the kernel, tables chosen by what is found there."""
    made: set[Item] = set(items(wire, GROUP))
    for _, interface in wire.sides:
        rules = [i for i in found if isinstance(i, Rule) and i.namespace == interface.namespace]
        mine = [rule for rule in rules if rule.link == interface.name]
        busy = {254, 255} | {rule.table for rule in rules}
        made |= policies(interface, mine, busy, {0, 32766} | {rule.priority for rule in rules})
    return frozenset(made)


def down(item: Veth | Vxlan | Wireguard) -> Item:
    """A device as whoever made it left it who died before it was up."""
    if isinstance(item, Veth):
        return replace(item, src=replace(item.src, up=False, alias=""))
    end = replace(item.end, up=False)
    if isinstance(item, Wireguard):
        return replace(item, end=end, key=None, port=0)
    return replace(item, end=end)


@st.composite
def observed(draw: st.DrawFn, wire: Wire) -> State:
    """What may be found: nothing, or another life of the wire with parts missing or changed."""
    state = set(whole(draw(WIRES) if draw(st.booleans()) else wire))
    state = {item for item in state if not isinstance(item, Sysctl)}
    for item in sorted(state, key=str):
        if item not in state or isinstance(item, Route) or not draw(st.booleans()):
            continue
        if isinstance(item, OnTop):
            state.discard(item)  # somebody deleted it
            state -= {other for other in state if member_of(other) == item.end.seat}
        elif isinstance(item, Veth | Vxlan | Wireguard):
            state.remove(item)
            seats = {end.seat for end in item.ends}
            end = item.ends[0]
            match draw(st.sampled_from(["down", "half", "gone"])):
                case "down":
                    state.add(down(item))
                    continue
                case "half" if isinstance(item, Wireguard):
                    state.add(replace(item, peer="", far="", keepalive=0, strangers=(FAR[2],)))
                    continue
                case "half":
                    state.add(Stub(end, "veth"))
                    seats.remove(end.seat)
            on_top = {o for o in state if isinstance(o, OnTop) and o.lower == end.seat}
            state -= on_top
            seats |= {one.end.seat for one in on_top}
            state -= {other for other in state if member_of(other) in seats}
        else:
            state.discard(item)
    tables = {(item.namespace, item.table) for item in state if isinstance(item, Route)}
    state = {i for i in state if not isinstance(i, Rule) or (i.namespace, i.table) in tables}
    for setting in (item for item in items(wire, GROUP) if isinstance(item, Sysctl)):
        state.add(replace(setting, value=draw(st.sampled_from([setting.value, "other"]))))
    return frozenset(state)


@st.composite
def situations(draw: st.DrawFn) -> tuple[State, State]:
    wire = draw(WIRES)
    found = draw(observed(wire))
    return whole(wire, found), found


@given(situations())
@settings(max_examples=400, deadline=None)
def test_a_plan_leads_from_anything_to_what_is_wanted(situation: tuple[State, State]) -> None:
    desired, found = situation
    model = Model(found)
    for step in plan(desired, found):
        model.take(step)
    assert model.state == desired


@given(situations(), st.data())
@settings(max_examples=400, deadline=None)
def test_every_prefix_of_a_plan_can_be_taken_back(
    situation: tuple[State, State], data: st.DataObject
) -> None:
    desired, found = situation
    steps = plan(desired, found)
    prefix = steps[: data.draw(st.integers(0, len(steps)))]
    model = Model(found)
    for step in prefix:
        model.take(step)
    for step in reversed(prefix):
        model.take(step.reversed())
    assert model.state == found


@given(interfaces(CLIENT), interfaces(CLIENT), TUNNELS)
@settings(max_examples=200, deadline=None)
def test_a_wire_that_stays_is_never_without_an_address(
    before: Interface, after: Interface, tunnel: VxlanTunnel
) -> None:
    after = replace(after, name=before.name, mac=before.mac)
    found = whole(RemoteWire("id", "src", before, tunnel))
    desired = whole(RemoteWire("id", "src", after, tunnel), found)
    steps = plan(desired, found)
    remade = {
        end.seat
        for step in steps
        if isinstance(step.item, LINKS) and step.verb != "set"
        for end in step.item.ends
    }
    kept = {member_of(i) for i in addresses(found)} & {member_of(i) for i in addresses(desired)}
    model = Model(found)
    for step in steps:
        model.take(step)
        addressed = {member_of(item) for item in addresses(frozenset(model.state))}
        assert kept - remade <= addressed, f"{step} leaves {kept - remade - addressed} bare"


def addresses(state: State) -> list[Address]:
    return [item for item in state if isinstance(item, Address)]


@given(WIRES)
def test_what_is_there_needs_no_step(wire: Wire) -> None:
    assert plan(whole(wire), whole(wire)) == ()


def test_steps_read_as_ip_commands_new_before_old() -> None:
    def wire(address: str, via: str, mtu: int) -> State:
        end = Interface(
            CLIENT,
            "nsm-1",
            mtu=mtu,
            mac="02:00:00:00:00:01",
            addresses=(ip_interface(address),),
            routes=(Hop(ip_network("10.9.0.0/16"), ip_address(via)),),
            ping=False,
        )
        tunnel = VxlanTunnel(42, ip_address("192.0.2.1"), ip_address("192.0.2.2"), UNDERLAY)
        return items(RemoteWire("id", "src", end, tunnel), 78)

    before, after = wire("10.0.0.1/32", "10.0.0.8", 1500), wire("10.0.0.3/32", "10.0.0.9", 1450)
    assert [str(step) for step in plan(after, before)] == [
        "ip link set nsm-1 mtu 1450",
        "ip addr add 10.0.0.3/32 dev nsm-1",
        "ip route add 10.9.0.0/16 via 10.0.0.9 dev nsm-1 onlink proto 78",
        "ip route del 10.9.0.0/16 via 10.0.0.8 dev nsm-1 onlink proto 78",
        "ip addr del 10.0.0.1/32 dev nsm-1",
    ]
    assert str(plan(before, frozenset())[0]) == (
        "ip link add nsm-1 address 02:00:00:00:00:01 mtu 1500 group 78 netns client"
        " type vxlan id 42 local 192.0.2.1 remote 192.0.2.2 dstport 4789 nolearning"
    )


def test_a_device_in_the_way_goes_first_and_another_vni_makes_a_new_device() -> None:
    end = Interface(CLIENT, "nsm-1", addresses=(ip_interface("10.0.0.1/32"),), ping=False)
    near, far = ip_address("192.0.2.1"), ip_address("192.0.2.2")
    old, new = (
        items(RemoteWire("id", "src", end, VxlanTunnel(vni, near, far, UNDERLAY)), GROUP)
        for vni in (42, 44)
    )
    verbs = [(step.verb, type(step.item).__name__) for step in plan(new, old)]
    assert verbs == [("del", "Address"), ("del", "Vxlan"), ("add", "Vxlan"), ("add", "Address")]


def test_a_tunnel_is_moved_out_of_a_workload_and_back() -> None:
    end = Interface(CLIENT, "nsm-1", addresses=(ip_interface("10.0.0.1/32"),), ping=False)
    tunnel = VxlanTunnel(42, ip_address("192.0.2.1"), ip_address("192.0.2.2"), UNDERLAY)
    plain = items(RemoteWire("id", "src", end, tunnel), GROUP)
    hop = items(RemoteWire("id", "src", end, tunnel, hop=True), GROUP)
    assert [(step.verb, type(step.item).__name__) for step in plan(hop, plain)] == [
        ("del", "Address"),
        ("del", "Vxlan"),
        ("add", "Vxlan"),
        ("add", "Macvlan"),
        ("add", "Address"),
    ]
    assert [(step.verb, type(step.item).__name__) for step in plan(plain, hop)] == [
        ("del", "Address"),
        ("del", "Macvlan"),
        ("del", "Vxlan"),
        ("add", "Vxlan"),
        ("add", "Address"),
    ]
    name = owner.tunnel_name("id", "src")
    assert [str(step).split(" address ")[0] for step in plan(hop, frozenset())][:2] == [
        f"ip link add {name}",
        "ip link add nsm-1",
    ]
    assert str(plan(hop, frozenset())[1]).endswith(
        f"netns client link {name} type macvlan mode passthru"
    )


def test_an_encrypted_tunnel_reads_as_ip_and_wg_commands_and_its_key_is_not_shown() -> None:
    end = Interface(CLIENT, "nsm-1", mtu=1440, ping=False)
    tunnel = WireguardTunnel(
        KEYS[0], FAR[0], *map(ip_address, ("192.0.2.1", "192.0.2.2")), 51821, UNDERLAY, 51820,
        "kernel", 10,
    )  # fmt: skip
    desired = items(RemoteWire("id", "src", end, tunnel), 78)
    (step,) = plan(desired, frozenset())
    assert str(step) == (
        "ip link add nsm-1 mtu 1440 group 78 netns client type wireguard;"
        f" wg set nsm-1 private-key … listen-port 51820 peer {FAR[0]} endpoint 192.0.2.2:51821"
        " persistent-keepalive 10 allowed-ips 0.0.0.0/0,::/0"
    )
    moved = replace(tunnel, key=KEYS[1], peer=FAR[1], remote=ip_address("192.0.2.4"), port=7)
    (step,) = plan(items(RemoteWire("id", "src", end, moved), 78), desired)
    assert str(step) == (
        f"wg set nsm-1 private-key … listen-port 7 peer {FAR[1]} endpoint 192.0.2.4:51821"
        f" persistent-keepalive 10 allowed-ips 0.0.0.0/0,::/0 peer {FAR[0]} remove;"
        " ip link set nsm-1 alias nsm:id:src:on=3:to=192.0.2.4%3A51821"
    )
    for said in (repr(desired), repr(step), repr(tunnel), str(tunnel)):
        for key in KEYS:
            assert key.secret.hex() not in said
            assert repr(key.secret) not in said
            assert base64.b64encode(key.secret).decode() not in said


def test_an_encrypted_tunnel_on_the_node_is_made_before_what_leads_to_it_and_goes_after() -> None:
    end = Interface(CLIENT, "nsm-1", addresses=(ip_interface("10.0.0.1/32"),), ping=False)
    tunnel = WireguardTunnel(
        KEYS[0], FAR[0], *map(ip_address, ("192.0.2.1", "192.0.2.2")), 51820, UNDERLAY, 51820,
        "kernel",
    )  # fmt: skip
    plain, apart = (
        items(RemoteWire("id", "src", end, tunnel, hop), GROUP) for hop in (False, True)
    )
    assert [(step.verb, type(step.item).__name__) for step in plan(apart, plain)] == [
        ("del", "Address"),
        ("del", "Wireguard"),
        ("add", "Wireguard"),
        ("add", "Splice"),
        ("add", "Address"),
    ]
    assert [(step.verb, type(step.item).__name__) for step in plan(plain, apart)] == [
        ("del", "Address"),
        ("del", "Splice"),
        ("del", "Wireguard"),
        ("add", "Wireguard"),
        ("add", "Address"),
    ]
    below, lead = owner.tunnel_name("id", "src"), owner.lead_name("id", "src")
    commands = str(plan(apart, frozenset())[1]).split("; ")
    assert commands[0].startswith("ip link add nsm-1 address ")
    assert commands[0].endswith(f"group {GROUP} netns underlay")
    assert f"tc filter add dev {lead} ingress bpf direct-action, redirecting to {below}" in commands
    assert f"tc filter add dev {below} ingress bpf direct-action, redirecting to {lead}" in commands
    userspace = replace(tunnel, engine="userspace")
    there = {items(RemoteWire("id", "src", end, userspace, hop), GROUP) for hop in (False, True)}
    assert len(there) == 1  # its device is none that could be misused


def test_what_is_the_same_about_a_far_end_is_not_told_again() -> None:
    end = Interface(CLIENT, "nsm-1", ping=False)
    tunnel = WireguardTunnel(
        KEYS[0], FAR[0], *map(ip_address, ("2001:db8::1", "2001:db8::2")), 51820, UNDERLAY, 51820,
        "userspace",
    )  # fmt: skip

    def told(**changes: object) -> list[str]:
        before, after = (
            items(RemoteWire("id", "src", end, replace(tunnel, **some)), 78)
            for some in ({}, changes)
        )
        return [word for step in plan(after, before) for word in str(step).split("; ")]

    name = owner.tunnel_name("id", "src")
    assert told() == []
    assert told(port=9) == [f"wg set {name} listen-port 9"]
    assert told(keepalive=7) == [f"wg set {name} peer {FAR[0]} persistent-keepalive 7"]
    assert told(key=KEYS[1]) == [f"wg set {name} private-key …"]
    assert told(remote_port=9) == [
        f"wg set {name} peer {FAR[0]} endpoint [2001:db8::2]:9",
        "ip link set nsm-1 alias nsm:id:src:on=3:to=%5B2001%3Adb8%3A%3A2%5D%3A9",
    ]


def test_another_engine_or_underlay_is_another_device_and_the_old_one_goes_first() -> None:
    end = Interface(CLIENT, "nsm-1", addresses=(ip_interface("10.0.0.1/32"),), ping=False)
    tunnel = WireguardTunnel(
        KEYS[0], FAR[0], *map(ip_address, ("192.0.2.1", "192.0.2.2")), 51820, UNDERLAY, 51820,
        "kernel",
    )  # fmt: skip
    old = items(RemoteWire("id", "src", end, tunnel), GROUP)
    for other in (replace(tunnel, engine="userspace"), replace(tunnel, underlay=SERVER)):
        new = items(RemoteWire("id", "src", end, other), GROUP)
        verbs = [(step.verb, type(step.item).__name__) for step in plan(new, old)]
        assert verbs == [
            ("del", "Address"),
            ("del", "Wireguard"),
            ("add", "Wireguard"),
            ("add", "Address"),
        ]


def test_the_models_complaints_are_real() -> None:
    lonely = Neighbour(CLIENT, "nsm-1", ip_address("10.0.0.9"), "02:00:00:00:00:09")
    with pytest.raises(AssertionError, match="no such device"):
        Model(frozenset()).take(Step("add", lonely))
