"""Ours and raw by turns: it must not count who of them comes first."""

import statistics

import pytest

from bench.raw import measured
from bench.wires import stage

pytestmark = pytest.mark.kernel


async def test_who_is_closed_last_of_two_vxlan_waits_no_longer_than_the_other():
    with stage() as where:
        turns = await measured("vxlan", 16, where)
    first = statistics.median(s for n, s in enumerate(turns.closing.raw) if n % 4 < 2)
    last = statistics.median(s for n, s in enumerate(turns.closing.raw) if n % 4 >= 2)
    assert last < 4 * first, f"{first * 1000:.2f} ms and {last * 1000:.2f} ms"  # else it is 14
