"""The doctor where the mesh runs: what is the mesh's own is no fault."""

import json
import re

from tests.e2e.labs.test_labs import COMMAND, nsmctl, up


def test_on_a_node_with_its_mesh_ports_and_wires_are_the_meshs_own():
    with up("two-nodes") as lab:
        asked = nsmctl("lab", "exec", "east-1", "--lab", lab, "--", *COMMAND, "doctor", "--json")
        assert asked.returncode == 0, f"{asked.stdout}{asked.stderr}"
        lines = {line["name"]: line for line in json.loads(asked.stdout)["lines"]}
        found = {name: f"{line['level']} {line['found']}" for name, line in lines.items()}
        assert re.fullmatch(r"ok held by nsmgr, pid \d+", found["tcp-5001"])
        assert re.fullmatch(r"ok held by registry, pid \d+", found["tcp-5002"])
        assert found["udp-4789"] == "ok held by VXLAN devices, which share it"
        assert lab in found["labs"]
        # other labs' forwarders may be just starting, and say nothing of themselves yet
        owned = r"ok \d+ devices( of running forwarders|, and a forwarder runs)"
        assert re.fullmatch(owned, found["wires"]), found["wires"]
