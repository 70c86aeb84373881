"""A database in one cluster, its replica in another: PostgreSQL's own, over a flat network."""

import json
import os
import re
import time

import pytest

from tests.e2e.labs.test_labs import names, nsmctl
from tests.support.wait import write

POSTGRES = "/usr/lib/postgresql/15/bin/postgres"
# a database server is not for everybody's machine: make matrix installs it where it is not
pytestmark = [] if os.path.exists(POSTGRES) else [pytest.mark.long]


def test_a_replica_in_another_cluster_catches_up_and_keeps_its_connection_while_routers_die():
    start = time.monotonic()
    done = nsmctl("lab", "run", "db-replication", "--json", "--name", names("db"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    told = json.loads(done.stdout)
    write("db-replication: the whole run", time.monotonic() - start, 30.0)
    assert told["failed"] == 0
    assert told["held"] == len(told["checks"]) == 16
    says = {check["name"]: check["says"] for check in told["checks"]}
    frames, sealed = re.search(
        r"^(\d+) frames:.* (\d+) wireguard-data", says["and nothing of that to read"]
    ).groups()
    assert int(frames) >= int(sealed) > 300  # ten thousand changed rows take some hundred
    # a router was killed, and then died with its namespace: the same sessions went on
    assert "nobody had to connect again" in says
    assert told["left"] == []
