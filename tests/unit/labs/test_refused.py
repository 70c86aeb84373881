"""Lab files that cannot come up are refused by `lab check`, with the line; none ends in a trace."""

import pytest

from labs import lab
from nsm.errors import InvalidError

BASE = """\
name: x
topology:
  clusters: {east: {trust-domain: east.test}}
  nodes:
    n1: {cluster: east}
    n2: {cluster: east}
    sw: {kind: switch}
  links:
    - {endpoints: ["n1:eth0", "sw:p1"]}
    - {endpoints: ["n2:eth0", "sw:p2"], mtu: 1400}
  underlay: {ipv4: 198.18.0.0/24, ipv6: "fd00:18::/64"}
services:
  y:
    endpoints:
      r: {on: n2, prefixes: [172.16.1.0/24]}
clients:
  app:
    on: n1
    connect: ["kernel://y/nsm-1"]
    run: [{name: web, exec: "serve it"}]
checks:
  - {name: a, ping: {from: app, to: r, count: 5, size: 64B}, expect: {lost: 0}}
  - {name: b, exec: {in: app, command: "ip link", timeout: 30s}}
  - {name: c, tcp: {from: app, to: r, bytes: 1MB}}
"""


def refused(old: str, new: str) -> str:
    assert BASE.count(old) == 1
    with pytest.raises(InvalidError) as caught:
        lab.parse(BASE.replace(old, new), "x.yaml")
    return caught.value.message


def test_what_the_others_differ_from_is_right():
    lab.parse(BASE, "x.yaml")


@pytest.mark.parametrize("text", ["[" * 20_000, "{a: " * 20_000, "- " * 20_000, "\n" + "[" * 31])
def test_a_file_of_too_many_levels_is_refused(text):
    with pytest.raises(InvalidError, match=f"x.yaml:{text.count(chr(10)) + 1}: .*30 levels"):
        lab.parse(text, "x.yaml")


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        pytest.param("test}", "test, disk: 1GB}", 3, "disk: 1GB: 64kB to 256MB", id="a large disk"),
        pytest.param("test}", "test, disk: 0MB}", 3, "disk: 0MB: 64kB to 256MB", id="no disk"),
        pytest.param("{name: a, ping", "3\n  - {name: a, ping", 22, "found 3", id="check"),
        pytest.param("serve it", "sh -c 'x", 20, "run[0].exec: No closing", id="exec's quote"),
        pytest.param("serve it", "  ", 20, "run[0].exec: there is no command", id="exec blank"),
        pytest.param("serve it", r"a\0b", 20, "run[0].exec: a NUL", id="exec with NUL"),
        pytest.param("ip link", "echo it's", 23, "exec.command: No closing", id="check's quote"),
        pytest.param("ip link", " ", 23, "exec.command: there is no", id="check's blank"),
        pytest.param('it"}]', 'it"}, {name: web, exec: b}]', 20, "run[1].name: ", id="run twice"),
        pytest.param("name: b, exec", "name: up, exec", 23, "the lab's coming up", id="a check up"),
        pytest.param("mtu: 1400", "mtu: 1400.0", 10, "mtu: found 1400.0", id="float mtu"),
        pytest.param("mtu: 1400", "rate: 5", 10, "rate: found 5, expected text: how", id="no unit"),
        pytest.param("mtu: 1400", "rate: 9kbit", 10, "found 9kbit, expected 100kbit", id="slow"),
        pytest.param("mtu: 1400", "rate: 31Gbit", 10, "expected 100kbit to 30Gbit", id="fast"),
        pytest.param("mtu: 1400", f"rate: {'9' * 13}kbit", 10, "is no quantity", id="very fast"),
        pytest.param("count: 5", "count: 5.0", 22, "found 5.0, expected a whole", id="float"),
        pytest.param("64B", "0B", 22, "size: found 0B, expected 28B to 65535B", id="no size"),
        pytest.param("64B", "65536B", 22, "size: found 65536B", id="too large"),
        pytest.param("64B", "9999999999999B", 22, "is no quantity", id="far too large"),
        pytest.param("1MB", "9999999999999GB", 24, "is no quantity", id="too many bytes"),
        pytest.param("30s", "61min", 23, "found 61min, expected up to 60min", id="too long"),
        pytest.param("172.16.1.0/24", "172.16.1.0", 15, "172.16.1.0 has no length", id="bare"),
        pytest.param("172.16.1.0/24", "172.16.1.0/32", 15, "two addresses", id="one address"),
        pytest.param(
            "172.16.1.0/24", "172.16.1.0/24, 172.16.0.0/16", 15, "overlaps 172.16.1.0/24",
            id="overlapping",
        ),
        pytest.param("172.16.1.0/24", "224.0.0.0/8", 15, "224.0.0.0/8 holds", id="multicast"),
        pytest.param("172.16.1.0/24", "0.0.0.0/0", 15, "0.0.0.0/0 holds", id="everything"),
        pytest.param("172.16.1.0/24", '"ff02::/16"', 15, "ff02::/16 holds", id="multicast 6"),
        pytest.param("198.18.0.0/24", "127.0.0.0/8", 11, "127.0.0.0/8 holds", id="loopback"),
        pytest.param("198.18.0.0/24", "198.18.0.0", 11, "198.18.0.0 has no length", id="underlay"),
        pytest.param(
            "n2: {cluster: east}", "n2: {cluster: east, ipv4: 198.18.0.0}", 6,
            "198.18.0.0 is the network's own address", id="network address",
        ),
        pytest.param(
            "n2: {cluster: east}", "n2: {cluster: east, ipv4: 198.18.0.255}", 6,
            "198.18.0.255 is the network's broadcast", id="broadcast address",
        ),
        pytest.param(
            "kernel://", "memif://", 19, "a lab's wires are kernel://", id="another mechanism"
        ),
        pytest.param("nsm-1", "lo", 19, "lo is there already", id="client's lo"),
        pytest.param("n1:eth0", "n1:lo", 9, "lo is there already", id="node's lo"),
        pytest.param("sw:p1", "sw:bridge", 9, "bridge is there already", id="switch's bridge"),
        pytest.param("east.test", '"east.test\\n"', 3, "expected Name its", id="domain"),
        pytest.param("name: x", 'name: "x\\n"', 1, "expected a name of", id="name with newline"),
    ],
)  # fmt: skip
def test_what_cannot_come_up_is_refused_with_its_line(old, new, line, says):
    text = refused(old, new)
    assert f"x.yaml:{line}: " in text
    assert says in text


def test_an_interfaces_name_is_that_of_no_bridge_only_on_a_switch():
    lab.parse(BASE.replace("n1:eth0", "n1:bridge"), "x.yaml")


def test_point_to_point_prefixes_have_no_network_address():
    two = BASE.replace("198.18.0.0/24", "198.18.0.0/31").replace(
        "n2: {cluster: east}", "n2: {cluster: east, ipv4: 198.18.0.0}"
    )
    assert lab.parse(two, "x.yaml").nodes["n2"].address("ipv4") == "198.18.0.0"


# --- faults ----------------------------------------------------------------------------------


def faulty(text: str) -> lab.Faulty:
    asked = lab.parse(f"{BASE}  - {{name: d, {text}}}\n", "x.yaml").checks[-1].what
    assert isinstance(asked, lab.Faulty)
    return asked


def test_a_fault_is_of_somebody_for_some_time_over_wires():
    asked = faulty(
        "fault: {kill: [forwarder@n1, r], for: 500ms, over: {from: app, to: r}},"
        " expect: {lost: 0, healed: 2s}"
    )
    assert asked.broken == lab.Broken("kill", ("forwarder@n1", "r"), seconds=0.5)
    assert asked.over == lab.Over("app", "r", "*")
    assert (asked.lost, asked.healed) == (0, 2.0)
    for text, what in {
        "kill: n1/nsmgr": lab.Broken("kill", ("n1/nsmgr",), seconds=0.0),
        "stop: registry@east": lab.Broken("stop", ("registry@east",)),
        "kill: r, for: ever": lab.Broken("kill", ("r",)),
        "reboot: n2": lab.Broken("reboot", ("n2",), seconds=0.0),
        "link-down: 'app:nsm-1'": lab.Broken("link-down", ("app:nsm-1",)),
        "rate: n2, to: 10Mbit": lab.Broken("rate", ("n2",), rate=10_000_000),
        "partition: [[n1], [n2]]": lab.Broken("partition", groups=(("n1",), ("n2",))),
        "mend: all": lab.Broken("mend"),
    }.items():
        assert faulty(f"fault: {{{text}}}") == lab.Faulty(what)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fault: {kill: forwader@n1}", "no process 'forwader@n1'; did you mean \"forwarder@n1\""),
        ("fault: {kill: sw}", "no process 'sw'"),
        ("fault: {reboot: sw}", "no node 'sw'"),
        ("fault: {partition: [[n1], [n3]]}", "no node 'n3'"),
        ("fault: {partition: [[n1]]}", "expected 2 to 20 items"),
        ("fault: {end: n1}", "no client or endpoint 'n1'"),
        ("fault: {link-down: 'ap:nsm-1'}", "no client or endpoint 'ap'; did you mean \"app\""),
        ("fault: {start: nobody}", "no process or place 'nobody'"),
        ("fault: {kil: r}", 'unknown key "kil"; did you mean "kill"?'),
        ("fault: {kill: r, stop: r}", "found kill and stop, expected exactly one of kill, stop"),
        ("fault: {kill: r, for: 5}", "for: found 5"),
        ("fault: {kill: r, for: 61min}", "found 61min, expected up to 60min"),
        ("fault: {start: r, for: 1s}", "means nothing for start"),
        ("fault: {rate: n1}", "a rate and what it is lowered `to` go together"),
        ("fault: {kill: r}, expect: {lost: 0}", "nothing flows: name the wires in fault.over"),
        ("fault: {kill: r, over: {from: app, to: r}}, expect: {lost: all}", "expected a number"),
        ("fault: {kill: r, over: {from: app, to: x}}", "nobody is called like 'x'"),
        ("fault: {kill: r, over: {from: app, to: r}}, expect: {exit: 0}", "known: lost, healed"),
    ],
)
def test_a_fault_of_nobody_or_of_too_much_is_refused_with_its_line(text, says):
    with pytest.raises(InvalidError) as caught:
        lab.parse(f"{BASE}  - {{name: d, {text}}}\n", "x.yaml")
    assert "x.yaml:25: " in caught.value.message
    assert says in caught.value.message
