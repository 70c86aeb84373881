"""A namespace that routes for one domain: what passes it, and what does not."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from ipaddress import ip_network

import pytest

from nsm.errors import NotFoundError, PreconditionError
from nsm.kernel import routing
from nsm.kernel.routing import Routing
from nsm.rpc.prefixes import MOST_TOLD
from tests.support.spaces import Space, space
from tests.support.wait import until

DOMAIN = [ip_network("172.16.0.0/16"), ip_network("2001:db8:10::/64")]
OWN = ("172.16.1.0/32", "2001:db8:10::1:0/128")
A, B, OUTSIDE = ("172.16.1.1", "2001:db8:10::1:1"), ("172.16.1.2", "2001:db8:10::1:2"), "10.9.9.9"


@pytest.fixture
def spaces() -> Iterator[tuple[Space, Space, Space]]:
    """A router, and two that are joined to it by wires as members have them."""
    with ExitStack() as stack:
        router, a, b = (stack.enter_context(space(hint)) for hint in ("r", "a", "b"))
        for name, member, addresses in (("wa", a, A), ("wb", b, B)):
            router.do("link", "add", name, "type", "veth", "peer", "w0", "netns", member.name)
            member.do("link", "set", "w0", "up")
            router.do("link", "set", name, "up")
            for address in addresses:
                long = "128" if ":" in address else "32"
                member.do("addr", "add", f"{address}/{long}", "dev", "w0", "nodad")
                router.do("route", "add", f"{address}/{long}", "dev", name)
            for own in OWN:
                member.do("route", "add", own, "dev", "w0")
                default = "::/0" if ":" in own else "0.0.0.0/0"
                member.do("route", "add", default, "via", own.split("/")[0], "dev", "w0", "onlink")
                router.do("addr", "add", own, "dev", name, "nodad")
        yield router, a, b


async def test_members_reach_each_other_and_the_router_in_both_families(spaces) -> None:
    router, a, b = spaces
    made = Routing(router.path)
    made.prepare()
    assert not await a.pings(B[0], "-W1")  # of no domain yet
    made.admit(DOMAIN)
    made.own(OWN, DOMAIN)
    for source, target in ((a, B), (b, A)):
        for address in (*target, "172.16.1.0", "2001:db8:10::1:0"):
            assert await source.pings(address), address


async def test_a_member_cannot_speak_for_another(spaces) -> None:
    router, a, b = spaces
    made = Routing(router.path)
    made.prepare()
    made.admit(DOMAIN)
    for stolen, long in ((B[0], 32), ("2001:db8:10::1:2", 128), ("172.16.7.7", 32)):
        a.do("addr", "add", f"{stolen}/{long}", "dev", "w0", "nodad")
    b.do("addr", "add", "172.16.1.3/32", "dev", "w0")
    router.do("route", "add", "172.16.1.3/32", "dev", "wb")
    before = received(b)
    assert not await a.pings("172.16.1.3", "-I", B[0], "-W1")
    assert not await a.pings("172.16.1.3", "-I", "172.16.7.7", "-W1")
    assert received(b) == before
    assert await a.pings("172.16.1.3", "-I", A[0])
    assert received(b) == before + 1
    # nor to the router itself
    before = received(router)
    assert not await a.pings("172.16.1.0", "-I", B[0], "-W1")
    assert received(router) == before
    assert await a.pings("172.16.1.0", "-I", A[0])
    assert received(router) == before + 1


async def test_nothing_leaves_the_domain(spaces) -> None:
    """Not to what the namespace is joined to besides, and not from there."""
    router, a, b = spaces
    made = Routing(router.path)
    made.prepare()
    made.admit(DOMAIN)
    b.do("addr", "add", f"{OUTSIDE}/32", "dev", "w0")
    router.do("route", "add", f"{OUTSIDE}/32", "dev", "wb")
    assert await b.pings("172.16.1.0", "-I", B[0])
    assert not await a.pings(OUTSIDE, "-W1")
    assert not await b.pings(A[0], "-I", OUTSIDE, "-W1")


async def test_a_domain_may_have_as_many_prefixes_as_an_address_plan_tells(spaces) -> None:
    router, a, _ = spaces
    made = Routing(router.path)
    made.prepare()
    some = [f"10.{n}.0.0/16" if n % 2 else f"2001:db8:{n + 256:x}::/64" for n in range(MOST_TOLD)]
    made.admit([*map(ip_network, some[2:]), *DOMAIN])
    for address in B:  # in IPv6 once the router's own addresses are sure to be nobody else's
        await until(partial(a.pings, address), f"{address} beside {MOST_TOLD} prefixes", bar=3.0)


async def test_what_is_set_up_stands_and_is_found_again(spaces) -> None:
    router, a, _ = spaces
    first = Routing(router.path)
    first.prepare()
    first.admit(DOMAIN)
    first.own(OWN, DOMAIN)
    rules = router.run("nft", "list", "ruleset").stdout
    again = Routing(router.path)
    again.prepare()
    assert router.run("nft", "list", "ruleset").stdout == rules
    assert await a.pings(B[0])
    again.admit(DOMAIN[:1])
    assert "2001" not in router.run("nft", "list", "ruleset").stdout
    again.own(["172.16.2.0/32"], DOMAIN)
    (lo,) = router.ip("addr", "show", "lo")
    assert {one["local"] for one in lo["addr_info"]} == {"127.0.0.1", "::1", "172.16.2.0"}


def test_in_a_namespace_of_its_own_a_process_needs_cap_net_admin_alone(spaces) -> None:
    """As in a pod, whose settings somebody made before, and are files it may not write."""
    router, _, _ = spaces
    for key, value in routing.SETTINGS:
        router.run("sysctl", "-w", f"{key.replace('/', '.')}={value}")
    code = (
        "from ipaddress import ip_network; from nsm.kernel.routing import Routing;"
        " made = Routing('/proc/self/ns/net'); made.prepare();"
        f" domain = [ip_network('{DOMAIN[0]}')]; made.admit(domain); made.own(['{OWN[0]}'], domain)"
    )
    script = 'mount -o bind,ro /proc/sys /proc/sys && exec "$@"'
    least = ["setpriv", "--inh-caps=-all", "--bounding-set=-all,+net_admin", "--no-new-privs"]
    as_in_a_pod = ["unshare", "--mount", "sh", "-c", script, "sh", *least]
    done = router.run(*as_in_a_pod, sys.executable, "-P", "-c", code)
    assert done.returncode == 0, done.stderr
    assert str(DOMAIN[0]) in router.run("nft", "list", "ruleset").stdout
    (lo,) = router.ip("addr", "show", "lo")
    assert OWN[0].split("/")[0] in {one["local"] for one in lo["addr_info"]}


def test_ways_over_a_wire_that_leads_nowhere_any_more_are_forgotten(spaces) -> None:
    """Ours, and those named only."""
    router, _, _ = spaces
    for family, to in (("-4", "172.16.2.0/24"), ("-6", "2001:db8:10::2:0/112")):
        for device in ("wa", "wb"):
            for protocol, metric in (("78", "1024"), ("static", "2048")):
                way = (to, "dev", device, "proto", protocol, "metric", metric)
                router.do(family, "route", "append", *way)
        Routing(router.path).forget([ip_network(to)], ["wa", "gone"])
        left = router.ip(family, "route", "show", to)
        assert sorted((one["dev"], one["protocol"]) for one in left) == [
            ("wa", "static"), ("wb", "78"), ("wb", "static"),
        ]  # fmt: skip


def test_a_namespace_that_is_not_there_is_named() -> None:
    with pytest.raises(NotFoundError, match="/run/netns/vw-nowhere"):
        Routing("/run/netns/vw-nowhere").prepare()


def test_a_machines_own_namespace_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other packets would not pass any more: containers', guests'."""
    with space() as own:
        monkeypatch.setattr(routing, "cookie_here", lambda: 1)
        with pytest.raises(PreconditionError, match="this machine's own network namespace"):
            Routing(own.path).prepare()
        assert own.run("nft", "list", "ruleset").stdout == ""
        assert own.run("sysctl", "-n", "net.ipv6.conf.all.forwarding").stdout == "0\n"


def received(member: Space) -> int:
    """Echo requests that came to a member."""
    lines = member.run("cat", "/proc/net/snmp").stdout.splitlines()
    heads, values = (line.split() for line in lines if line.startswith("Icmp:"))
    return int(values[heads.index("InEchos")])
