"""Labs of upstream's examples pass, as `make parity` runs them."""

import pytest

from tests.support.examples import SHOWN, parity

SAMPLE = (  # quick, like no other lab
    "change-nse-dynamically", "policy-based-routing",
    "heal/remote-forwarder-death", "heal/local-nse-death",
)  # fmt: skip


@pytest.mark.parametrize(
    "one",
    [
        pytest.param(one, id=one.id, marks=() if one.id in SAMPLE else pytest.mark.long)
        for one in SHOWN
    ],
)
def test_the_lab_of_an_example_passes(one):
    assert parity.faults(parity.run(one)) == []


def test_the_sample_is_of_labs_that_are_there():
    assert set(SAMPLE) <= {one.id for one in SHOWN}
