"""Numbered traffic shows exactly what was lost, when, and why it did not leave."""

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from labs.paths import Paths
from labs.traffic import Traffic
from nsm.errors import DeadlineError
from tests.support.spaces import Space

NEAR, FAR = "10.9.0.1", "10.9.0.2"
ENOUGH = 30.0  # seconds for what takes one


@pytest.fixture
def paths() -> Iterator[Paths]:
    made = Paths(f"t{os.getpid() % 100_000}")
    spaces = [made.namespace("a"), made.namespace("b")]
    for name in spaces:
        subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        cable(made)
        yield made
    finally:
        for name in spaces:
            subprocess.run(["ip", "netns", "del", name], check=True)


def cable(paths: Paths) -> None:
    """A veth between the two, with its addresses."""
    a, b = Space(paths.namespace("a")), Space(paths.namespace("b"))
    a.do("link", "add", "w", "type", "veth", "peer", "name", "w", "netns", b.name)
    for space, own in ((a, NEAR), (b, FAR)):
        space.do("addr", "add", f"{own}/30", "dev", "w")
        space.do("addr", "add", f"fd09::{own[-1]}/64", "dev", "w", "nodad")
        space.do("link", "set", "w", "up")


@pytest.mark.parametrize("ends", [(NEAR, FAR), ("fd09::1", "fd09::2")], ids=["ipv4", "ipv6"])
def test_on_a_good_wire_every_number_arrives_once_in_both_directions(paths, ends):
    with Traffic(paths, "a", "b", ends) as traffic:
        traffic.arrive(100, patience=ENOUGH)
        mark = traffic.mark()
        report = traffic.arrive(100, mark, patience=ENOUGH)
        report = traffic.report(mark)
    assert report.whole, str(report)
    assert report.arrived >= 100
    assert [way.reordered for way in report.ways] == [0, 0]
    assert "all arrived" in str(report)


def test_of_a_wire_that_drops_each_seventh_exactly_those_are_missing(paths):
    done = Space(paths.namespace("b")).run(
        "nft",
        "table inet t { chain c { type filter hook input priority 0;"
        " ip protocol udp numgen inc mod 7 == 6 drop;\n }\n }",
    )
    assert done.returncode == 0, done.stderr
    with Traffic(paths, "a", "b", (NEAR, FAR)) as traffic:
        traffic.arrive(180, patience=ENOUGH)
        report = traffic.report(patience=0.3)
    sent = len(report.there.numbers)
    assert [n for gap in report.there.missing for n in gap] == [*range(6, sent, 7)]
    assert report.there.refused == {}
    assert report.back.whole, str(report)
    assert not report.whole
    assert report.outage == pytest.approx(1 / 200)
    assert f"{report.there.lost} lost (6, 13, 20, 27, 34, 41 and " in str(report)


def test_a_flow_outlives_its_wire_and_tells_what_did_not_leave(paths):
    a = Space(paths.namespace("a"))
    with Traffic(paths, "a", "b", (NEAR, FAR)) as traffic:
        traffic.arrive(50, patience=ENOUGH)
        a.do("link", "del", "w")
        away = traffic.mark()
        traffic.until(
            lambda now: len(now.there.numbers) > 50, "a quarter of a second", away,
            patience=ENOUGH,
        )  # fmt: skip
        cable(paths)
        traffic.arrive(50, traffic.mark(), patience=ENOUGH)
        report = traffic.report()
    for way in report.ways:
        assert len(way.missing) == 1, str(report)
        assert sum(way.refused.values()) > 50
        # what is in the air at either moment is lost as well
        assert way.lost - sum(way.refused.values()) < 10
        assert set(way.refused) <= {"EINVAL", "ENETUNREACH"}
        assert way.silence == pytest.approx(way.outage, abs=0.1)


def test_a_courier_that_is_stalled_sends_and_reads_later_and_loses_nothing(paths):
    with Traffic(paths, "a", "b", (NEAR, FAR)) as traffic:
        traffic.arrive(20, patience=ENOUGH)
        (courier,) = couriers(paths, "b")
        mark = traffic.mark()
        os.kill(courier, signal.SIGSTOP)
        subprocess.run(["sleep", "0.4"], check=True)
        os.kill(courier, signal.SIGCONT)
        traffic.arrive(200, mark, patience=ENOUGH)
        report = traffic.report()
    assert report.whole, str(report)
    assert report.there.silence == 0  # the kernel had them in time
    assert report.back.silence > 0.3


def test_what_a_place_told_last_is_known_after_its_end(paths):
    with Traffic(paths, "a", "b", (NEAR, FAR)) as traffic:
        traffic.arrive(50, patience=ENOUGH)
        known = traffic.mark()
        (courier,) = couriers(paths, "b")
        os.kill(courier, signal.SIGKILL)
        traffic.until(
            lambda now: len(now.there.numbers) > 50, "a quarter of a second", known,
            patience=ENOUGH,
        )  # fmt: skip
        report = traffic.report()
        assert report.back.arrived >= 49
        assert report.there.lost >= 50
        with pytest.raises(DeadlineError, match=r"waited 0.1 s for 9999 datagrams .* a -> b: "):
            traffic.arrive(9999, patience=0.1)


def couriers(paths: Paths, place: str) -> list[int]:
    """The pids of those in a place."""
    inside = subprocess.run(
        ["ip", "netns", "pids", paths.namespace(place)], capture_output=True, text=True, check=True
    )
    return [int(pid) for pid in inside.stdout.split()]
