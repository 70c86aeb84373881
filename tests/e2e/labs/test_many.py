"""Thirty clients that ask at once: every kind of wire, all of them usable, none of them late."""

import json
import time
from collections import Counter

import pytest

from tests.e2e.labs.test_labs import names, nsmctl
from tests.support.wait import write

WIRES = {  # kind and nodes, of how many clients
    ("veth", "node-1", "node-1"): 5,
    ("veth", "node-2", "node-2"): 5,
    ("vxlan", "node-2", "node-1"): 5,
    ("vxlan", "node-3", "node-1"): 5,
    ("wireguard", "node-1", "node-2"): 5,
    ("wireguard", "node-3", "node-2"): 5,
}


@pytest.mark.long
def test_thirty_clients_that_ask_at_once_all_have_their_wire_and_nothing_is_lost():
    start = time.monotonic()
    done = nsmctl("lab", "run", "many-clients", "--json", "--name", names("many"), patience=150)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    told = json.loads(done.stdout)
    write("many-clients: the whole run", time.monotonic() - start, 20.0)
    write("many-clients: thirty wires asked for at once", told["up"]["clients"], 4.0)
    wires = told["wires"]
    assert Counter((wire["mechanism"], *wire["nodes"]) for wire in wires) == WIRES
    assert [(wire["client"], wire["lost"]) for wire in wires if wire["lost"]] == []
    assert told["failed"] == 0
    assert told["held"] == len(told["checks"]) == 9
    assert told["left"] == []
    # asked at once: together they waited for much longer than all of it took
    together = sum(wire["ms"] for wire in wires) / 1000
    assert together > 3 * told["up"]["clients"], f"{together:.1f} s of waiting"
    slowest = max(wire["ms"] for wire in wires) / 1000
    write("many-clients: the slowest of thirty requests at once", slowest, 3.0)
