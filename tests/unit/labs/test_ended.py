"""Whoever a fault killed is gone when it says so."""

from pathlib import Path

import pytest

from labs.faults import Faults
from labs.lab import parse
from labs.paths import Paths

pytestmark = pytest.mark.unit
TEXT = """\
name: x
topology:
  clusters: {c: {}}
  nodes: {n1: {cluster: c}, sw: {kind: switch}}
  links: [{endpoints: ["n1:eth0", "sw:p1"]}]
  underlay: {ipv4: 198.18.0.0/24}
"""


class Dying:
    """A process that ends between two looks at it."""

    def __init__(self) -> None:
        self._looks = iter([True])

    @property
    def alive(self) -> bool:
        return next(self._looks, False)


def test_who_dies_while_it_is_looked_at_has_not_been_reaped(tmp_path: Path) -> None:
    """Its end is not written down yet: the nursery would not start it again."""
    faults = Faults(parse(TEXT, "x.yaml"), Paths("x", str(tmp_path)))
    assert not faults._has_ended("n1/nsmgr", Dying())  # type: ignore[arg-type]
