import time
from contextvars import ContextVar

import pytest

from nsm.errors import InvalidError
from nsm.leases import Leases, until_when
from nsm.model import SECOND, Connection, Path, Segment
from tests.support.wait import until

ASKED_BY = ContextVar("asked_by", default="nobody")


def conn(*left: int | None) -> Connection:
    """A connection at a hop whose left segments expire at these instants."""
    segments = (
        *(Segment(f"s{i}", f"i{i}", "", at) for i, at in enumerate(left)),
        Segment("me", "c"),
    )
    return Connection(id="c", path=Path(segments, len(left)))


def test_a_lease_ends_at_the_earliest_expiry_on_the_left_less_the_requests_time_left():
    now = time.time_ns()
    assert until_when(conn(now + 50 * SECOND, now + 40 * SECOND), 3.0) == now + 37 * SECOND


def test_a_callers_patience_takes_at_most_half_of_its_lease():
    now = time.time_ns()
    until = until_when(conn(now + 4 * SECOND), 15.0)
    assert now + 2 * SECOND <= until < now + 2.1 * SECOND
    assert until_when(conn(now - SECOND), 15.0) == now - SECOND


def test_what_lies_to_the_right_and_the_hops_own_segment_do_not_count():
    held = conn(50 * SECOND)
    later = (Segment("me", "c", "", SECOND), Segment("next", "n", "", 2 * SECOND))
    assert (
        until_when(Connection(id="c", path=Path((held.segments[0], *later), 1)), 0) == 50 * SECOND
    )


def test_without_an_expiry_there_is_no_lease_and_upstreams_words_say_so():
    with pytest.raises(
        InvalidError, match="expiration for the previous path segment cannot be nil"
    ):
        until_when(conn(None), 0.0)


async def test_a_lease_nobody_renews_is_reported_once():
    expired = []
    leases = Leases(expired.append)
    leases.renew(conn(time.time_ns() + SECOND // 20), 0.0)
    await until(lambda: expired == ["c"] and len(leases) == 0, "a lease to end", bar=0.1)


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_clock_that_is_set_ends_no_lease_and_lengthens_none(hours, monkeypatch):
    expired = []
    leases = Leases(expired.append)
    leases.renew(conn(time.time_ns() + SECOND // 5), 0.0)
    began, right = time.monotonic(), time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: right() + hours * 3600 * SECOND)
    await until(lambda: expired, "a lease to end after the clock was set", bar=0.4)
    assert time.monotonic() - began > 0.15


async def test_a_lease_keeps_nothing_of_the_request_it_came_with():
    ended = []
    leases = Leases(lambda _: ended.append(ASKED_BY.get()))
    ASKED_BY.set("a request")
    leases.renew(conn(time.time_ns() + SECOND // 50), 0.0)
    await until(lambda: ended == ["nobody"], "a lease to end", bar=0.1)


async def test_a_renewed_lease_is_the_later_one_and_a_released_one_is_none():
    expired = []
    leases = Leases(expired.append)
    leases.renew(conn(time.time_ns() + SECOND // 50), 0.0)
    leases.renew(conn(time.time_ns() + 600 * SECOND), 0.0)
    other = conn(time.time_ns() + SECOND // 20)
    leases.renew(
        Connection(id="later", path=Path((*other.segments[:1], Segment("me", "later")), 1)), 0
    )
    await until(lambda: expired, "the later of two leases to end", bar=0.1)
    assert expired == ["later"]
    leases.release("c")
    leases.release("c")
    assert len(leases) == 0
