"""What the mesh says of a wire that is broken before anybody looks at the kernel."""

import time

import pytest

from forwarder.store import Lease
from nsm.errors import UnavailableError
from nsm.identity.spiffe import SpiffeId
from nsm.model import SECOND, Connection, Destination, Endpoint, Match, Mechanism, Path, Segment
from nsm.model import Service as NetworkService
from nsmctl.machine.walk import Held, Known, Line, walk


def held(*, node: str = "one", seconds: float = 86_400.0, endpoint: str = "server") -> Held:
    segments = (Segment("app", "app-0"), Segment("nsmgr-one", "m"), Segment("forwarder-one", "f"))
    conn = Connection(
        id="f", service="db", labels={"tier": "web"}, endpoint=endpoint, path=Path(segments, 2)
    )
    lease = Lease(
        id="f",
        previous=SpiffeId.parse("spiffe://td/nsmgr"),
        origin="spiffe://td/app",
        connection=conn,
        next_url="",
        endpoint=endpoint,
        payload="IP",
        outgoing=Mechanism("LOCAL", "KERNEL", {}),
        chosen=False,
        spaces=(),
        ends=time.time_ns() + round(seconds * SECOND),
    )
    return Held(node, "", lease)


def rules(**selector: str) -> NetworkService:
    return NetworkService("db", "IP", (Match(selector, (Destination({}),)),))


SERVER = Endpoint("server", ("db",))
OTHER = Endpoint("other", ("db",))


def known(**more: object) -> Known:
    facts = {"id": "app-0", "client": "app", "service": "db", "node": "one", "held": (held(),)}
    return Known(**{**facts, "offered": (SERVER,), **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wire", "line", "found", "fix"),
    [
        (
            known(trouble=UnavailableError("nobody answers", hint="start it")),
            "registration", "cannot be asked: nobody answers", "start it",
        ),
        (known(offered=()), "registration", "nobody offers 'db'", "start its endpoint"),
        (
            known(offered=(OTHER,)),
            "registration", "server at the far end is registered no more; 'db' has other", "again",
        ),
        (
            known(held=(), told="no endpoint of 'db'"),
            "lease", "no forwarder of one holds a wire of app to 'db': no endpoint of", "running",
        ),
        (known(held=(held(node="two"),)), "lease", "no forwarder of one holds", "is app running"),
        (known(held=(held(seconds=-7),)), "lease", "s ago on one: nobody refreshed it", "clock"),
        (
            known(rules=(rules(tier="db"),)),
            "policy", "lead tier=web to nobody, and not to server", "nsmctl define",
        ),
    ],
)  # fmt: skip
def test_the_first_thing_that_is_broken_ends_the_walk_and_says_what_mends_it(
    wire: Known, line: str, found: str, fix: str
) -> None:
    *before, last = walk(wire)
    assert all(one.well for one in before)
    assert (last.name, last.well) == (line, False)
    assert found in last.found
    assert fix in last.fix


def test_domains_rules_and_several_endpoints_are_no_trouble() -> None:
    wire = known(
        offered=(OTHER, Endpoint("server@west", ("db@west",))),
        rules=(rules(tier="web"),),
        held=(held(endpoint="server"),),
    )
    lines: list[Line] = []
    for one in walk(wire):
        lines.append(one)
        if one.name == "policy":
            break
    assert [(one.name, one.well) for one in lines] == [
        ("registration", True), ("lease", True), ("policy", True),
    ]  # fmt: skip
    assert lines[1].found.startswith("on one for another ")
    assert lines[2].found == "tier=web is led to server"
