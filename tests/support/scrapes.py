"""What the programs of a lab tell Prometheus, read as it reads it."""

import http.client
import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from labs import engine, processes
from nsm.kernel.namespaces import NAMED, Home

SERVED = re.compile(r"\bhttp://[^ \"]+/metrics\b")
SETTINGS = {"PROMETHEUS": "true", "NSM_PROMETHEUS_LISTEN_ON": "127.0.0.1:0"}
Samples = Mapping[tuple[str, ...], float]


def samples(text: str) -> Samples:
    """Each sample by its name and its labels' values, in the order of the labels' names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of_lab(name: str) -> dict[str, Samples]:
    """What each process of a lab says that was brought up with SETTINGS, by NODE/PROC."""
    lab, paths = engine.running(name)
    plan = processes.plan(lab, paths)
    found = {}
    with Home() as home:
        for one in (*plan.processes, *plan.on_demand):
            with open(one.log) as log:
                if not (served := SERVED.findall(log.read())):
                    continue
            fd = home.opened_path(f"{NAMED}/{one.namespace}", one.name)
            try:
                with home.inside(fd):
                    found[one.name] = _scraped(served[-1])
            finally:
                os.close(fd)
    return found


def _scraped(url: str) -> Samples:
    where = urlsplit(url)
    asking = http.client.HTTPConnection(where.hostname or "", where.port, timeout=5)
    try:
        asking.request("GET", where.path)
        answer = asking.getresponse()
        text = answer.read().decode()
        assert answer.status == 200, text
        return samples(text)
    finally:
        asking.close()
