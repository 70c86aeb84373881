"""The bench sees what a wire should not have on its way: a bar that nothing misses is none."""

import statistics
from dataclasses import replace

import pytest

from bench import paths, wires

pytestmark = pytest.mark.kernel


async def test_one_device_more_on_the_way_makes_round_trips_longer_than_by_hand(monkeypatch):
    as_asked = wires.Ours._half

    def with_a_device_on_top(self, plan, side):
        return replace(as_asked(self, plan, side), hop=True)

    plain = await paths.measure("vxlan", 3, print)
    monkeypatch.setattr(wires.Ours, "_half", with_a_device_on_top)
    longer = await paths.measure("vxlan", 3, print)
    assert statistics.median(longer.quickness) < 0.98 < statistics.median(plain.quickness)
