"""The file that says which routers may be started, and how."""

import json

import pytest

from endpoints.supplier.recipes import Recipe, parse
from nsm.errors import InvalidError

GOOD = """
orders-db@meet:
  name: orders-n1@meet
  namespace: /run/netns/orders
  gid: 61050
  uid: 0
  log: /var/log/orders.log
  environment: {NSM_POOL: orders-db, NSM_IDLE_TIMEOUT: 30s, NSM_FAMILIES: 4}
other:
  name: other-n1
  argv: [/usr/bin/router, --of, "it's one; $(id)"]
"""


def test_each_service_has_a_router_and_all_of_its_command_is_in_the_file() -> None:
    orders, other = parse(GOOD, "routers.yaml")
    assert orders == Recipe(
        service="orders-db@meet",
        name="orders-n1@meet",
        namespace="/run/netns/orders",
        gid=61050,
        uid=0,
        log="/var/log/orders.log",
        environment={"NSM_POOL": "orders-db", "NSM_IDLE_TIMEOUT": "30s", "NSM_FAMILIES": "4"},
        where="routers.yaml:2",
    )
    assert (orders.module, orders.argv) == ("endpoints.vl3", ())
    assert other.argv == ("/usr/bin/router", "--of", "it's one; $(id)")
    assert "30s" not in repr(orders), "an environment may hold what is not for a log"


def test_json_will_do() -> None:
    (one,) = parse(json.dumps({"net": {"name": "r", "gid": 7}}), "r.json")
    assert (one.service, one.name, one.gid) == ("net", "r", 7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "f names no router"),
        ("{}", "f names no router"),
        ("- net", "f:1: a service's router is no mapping, KEY: VALUE"),
        ("net: r", "f:1: the router of 'net' is no mapping, KEY"),
        ("net:\n  nam: r", "f:2: 'nam' is nothing a router has; it has name"),
        ("net:\n  gid: 1", "f:1: the router of 'net' has no name"),
        ("net: {name: r}\nnet: {name: s}", "f:2: 'net' is there twice"),
        ("net:\n  name: r\n  name: s", "f:3: 'name' is there twice"),
        ("net: {name: ../r}", "f:1: name: '../r' is no router's name"),
        ("net: {name: r s}", "no router's name"),
        ("net: {name: }", "f:1: name: one value is expected"),
        ('net: {name: r, log: "/a\\0b"}', "zero byte"),
        ("net: {name: r@meet}\nnet@x: {name: r@y}", "'r@y' and 'net@x' are of two domains"),
        ("a@x: {name: r}\nb@y: {name: r}", "f:2: name 'r' is the router's of 'a@x' as well"),
        ("a: {name: r, namespace: /n}\nb: {name: s, namespace: /n}", "f:2: namespace '/n' is"),
        ("net b: {name: r}", "'net b' is no service's name"),
        ("net: {name: r, namespace: here}", "namespace: 'here' is no path from the root"),
        ("net: {name: r, argv: [router]}", "argv: 'router' is no path from the root"),
        ("net: {name: r, argv: []}", "argv: a list is expected"),
        ("net: {name: r, argv: /bin/true}", "argv: a list is expected"),
        ("net: {name: r, module: a-b}", "module: 'a-b' is no module's name"),
        ("net: {name: r, module: m, argv: [/m]}", "has a module and an argv; give one"),
        ("net: {name: r, gid: wheel}", "gid: 'wheel' is no user's or group's number"),
        ("net: {name: r, uid: 4294967295}", "uid: '4294967295' is no"),
        ("net: {name: r, environment: {A-B: 1}}", "environment: 'A-B' is no variable's name"),
        ("net: {name: r, environment: {A: [1]}}", "environment: A: one value is expected"),
        ("net: {name: r, environment: {NSM_NAME: x}}", "NSM_NAME is what .* say it by name"),
        ("net: {name: r, environment: {NSM_HEALTH_FILE: /x}}", "NSM_HEALTH_FILE is what the"),
        ("net: {name: [", "f:1: "),
        ("a: &a [*a]", "f:1"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, words: str) -> None:
    with pytest.raises(InvalidError, match=words):
        parse(text, "f")
