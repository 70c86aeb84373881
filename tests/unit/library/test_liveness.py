"""When a far end is called silent: pings and answers on paper, so that hours take no time."""

import asyncio
import ipaddress
import random
import time

import pytest

from nsm import liveness
from nsm.liveness import MOST_PAIRS, Pair, Pulse, Rhythm, pairs
from tests.support.wait import until

CLIENTS, ROUTERS = Rhythm(), Rhythm(interval=1.2, timeout=1.0)


class Line:
    """A far end that answers after some time until it is dead, on a line that loses some."""

    def __init__(self, rhythm: Rhythm, *, takes=0.001, dead=1e9, loss=0.0, refuses=False) -> None:
        self.pair, self.now, self.pings = Pair(rhythm), 1000.0, 0
        self._takes, self._dead, self._loss, self._refuses = takes, dead, loss, refuses
        self._coming: list[tuple[float, int]] = []
        self._chance = random.Random(7)

    def until(self, end: float, stalls=()) -> float:
        """Look until then; when it was called silent, 0.0 if never. In stalls nobody looks."""
        stalls = list(stalls)
        while self.now < end:
            due = self.now + self.pair.pause(self.now)
            late = next((b for a, b in stalls if a < due < b), 0.0)
            self.now = max(due, late)
            for at, number in self._coming:
                if at <= self.now:
                    self.pair.answered(self.now, number)
            self._coming = [one for one in self._coming if one[0] > self.now]
            if late:
                self.pair.anew()
            if self.pair.silent(self.now):
                return self.now
            if self.pair.due(self.now):
                self._ping()
        return 0.0

    def _ping(self) -> None:
        self.pings += 1
        dead = self.now >= self._dead
        self.pair.sent(self.now, self.pings % 65536, refused=dead and self._refuses)
        if not dead and self._chance.random() >= self._loss:
            self._coming.append((self.now + self._takes, self.pings % 65536))


@pytest.mark.parametrize("takes", [0.0005, 0.04, 0.1])
@pytest.mark.parametrize(("rhythm", "bound"), [(CLIENTS, 1.0), (ROUTERS, 2.2)])
def test_a_death_is_known_within_the_timeout_whenever_it_comes(rhythm, bound, takes):
    took = []
    for phase in range(100):
        dead = 1010 + phase * rhythm.interval / 100
        line = Line(rhythm, takes=takes, dead=dead)
        took.append(line.until(1020) - dead)
    assert min(took) > 0.6
    assert max(took) < bound + takes


def test_where_nothing_can_be_sent_it_is_known_sooner():
    line = Line(CLIENTS, dead=1010.1, refuses=True)
    assert 0.2 < line.until(1020) - 1010.1 < 0.7


@pytest.mark.parametrize(("takes", "sooner"), [(0.001, True), (0.15, False)])
def test_in_haste_a_third_of_a_second_is_enough_but_four_answers_times_are_waited_for(
    takes, sooner
):
    line = Line(CLIENTS, takes=takes, dead=1010.0)
    line.until(1010.5)
    assert not line.pair.silent(line.now)
    assert line.pair.silent(line.now, hasty=True) is sooner


def test_who_never_answered_is_not_called_silent_and_asked_rarely():
    line = Line(CLIENTS, dead=0.0)
    assert line.until(1600) == 0.0
    assert line.pings < 15 + 600 / 3


@pytest.mark.parametrize("takes", [0.0005, 0.1, 0.2, 0.35, 1.5])
def test_an_hour_of_lost_pings_and_slow_answers_is_no_silence(takes):
    line = Line(CLIENTS, takes=takes, loss=0.0975)  # 5 % each way
    assert line.until(1000 + 3600) == 0.0
    assert line.pair.heard > 1000 + 3590


def test_a_loop_that_did_not_run_knows_nothing_of_what_was_not_answered():
    """The far end is dead for 0.7 s each time, and we are stopped in the middle of it."""
    line = Line(CLIENTS, dead=1010.0)
    stops = [(1010.55 + n * 0.6, 1010.85 + n * 0.6) for n in range(20)]
    assert line.until(1020, stops) == 0.0
    assert line.until(1024) < 1024


async def test_where_every_look_comes_late_nobody_waits_for_what_it_cannot_tell(monkeypatch):
    monkeypatch.setattr(liveness, "HASTY", 0.2)
    ends = [ipaddress.ip_interface(one) for one in ("127.0.0.1/8", "127.0.0.2/8")]
    pulse = Pulse(ends[:1], ends[1:], CLIENTS, lambda: None)
    for pair in pulse._pairs.values():
        pair.answered(time.monotonic(), 0)

    async def late() -> None:
        while True:
            pulse.anew()
            pulse.judge(time.monotonic())
            await asyncio.sleep(0.01)

    looking = asyncio.create_task(late())
    async with asyncio.timeout(5):
        assert await pulse.flows() is None
    looking.cancel()


def test_pairs_are_of_one_family_and_bounded():
    own = [ipaddress.ip_interface(one) for one in ("10.0.0.1/32", "fd00::1/128")]
    others = [ipaddress.ip_interface(f"10.1.0.{n}/32") for n in range(100)]
    others += [ipaddress.ip_interface("fd00::2/128")]
    found = pairs(own, others)
    assert len(found) == MOST_PAIRS
    assert found[:2] == [("10.0.0.1", "10.1.0.0"), ("fd00::1", "fd00::2")]
    assert pairs(own[:1], others[-1:]) == []


async def test_the_first_ping_of_a_wire_leaves_at_once():
    """Who never answered is never called dead: until then a death goes unnoticed."""
    home, rhythm = ipaddress.ip_interface("127.0.0.1/8"), Rhythm(interval=600.0, timeout=3000.0)
    live, pulse = liveness.Liveness(rhythm), Pulse([home], [home], rhythm, lambda: None)
    live._pulses.add(pulse)  # `watch` takes none where no pings may be sent
    running = asyncio.create_task(live.run())
    try:
        (pair,) = pulse._pairs.values()
        await until(lambda: not pair.due(time.monotonic()), "a ping to be sent, or tried", bar=0.1)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
