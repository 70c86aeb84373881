"""What a guest in the lane is given time for."""

import os
from pathlib import Path

from tests.lane.beside import LOOK, Patience, waited


def test_a_guest_that_is_let_run_spends_what_passes() -> None:
    patience = Patience()
    patience.look(now := patience._looked + LOOK, {7: 0.0})
    patience.look(now + LOOK, {7: 0.0, 8: 0.25})
    assert round(patience.spent, 6) == 2 * LOOK - 0.25


def test_what_it_waits_for_a_processor_is_not_of_its_time() -> None:
    patience = Patience()
    patience.look(now := patience._looked + LOOK, {7: 5.0, 8: 1.0})
    assert patience.spent == 0.0
    patience.look(now + LOOK, {7: 5.5})  # 8 has ended
    assert round(patience.spent, 6) == LOOK - 0.5


def test_a_machine_that_stood_still_has_not_been_silent() -> None:
    patience = Patience()
    patience.look(patience._looked + 3600, {7: 0.0})
    assert patience.spent == 2 * LOOK


def test_the_host_tells_what_a_process_has_waited() -> None:
    of_us = waited({os.getpid(): Path("/proc/self"), 0: Path("/proc/none")})
    assert [*of_us] in ([os.getpid()], [])  # not every kernel counts it
    assert all(seconds > 0 for seconds in of_us.values())
