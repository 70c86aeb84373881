"""The probe hears every echo, however many come at once and however late it reads."""

import pytest

from labs.hands import Hands
from tests.support.spaces import space

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_no_echo_counts_as_lost_because_the_probe_reads_late(address):
    # all of them are sent before the first answer is read, and their requests arrive here as well
    targets = [{"address": address, "size": 9000}] * 300
    with space("probe") as alone, Hands() as hands:
        order = {"do": "ping", "targets": targets, "count": 1, "patience": 1.0}
        told = hands.ask({alone.name: order})[alone.name]
    assert [row["lost"] for row in told] == [0] * len(targets)
