"""A disk that is filled is the lab's own."""

import os
from pathlib import Path

import pytest

from labs.faults import Faults
from labs.lab import parse
from labs.paths import Paths
from nsm.errors import PreconditionError

pytestmark = pytest.mark.unit
TEXT = """\
name: x
topology:
  clusters: {c: {disk: 200kB}}
  nodes: {n1: {cluster: c}, sw: {kind: switch}}
  links: [{endpoints: ["n1:eth0", "sw:p1"]}]
  underlay: {ipv4: 198.18.0.0/24}
"""


def test_a_disk_that_is_not_mounted_here_is_not_filled(tmp_path: Path) -> None:
    """Its folder would be on the machine's own, as in another mount namespace than the lab's."""
    paths = Paths("x", str(tmp_path))
    os.makedirs(paths.disk("c"))
    os.mkfifo(paths.orders)
    with pytest.raises(PreconditionError, match="disk of c of lab x is not mounted"):
        Faults(parse(TEXT, "x.yaml"), paths).fill("c")
