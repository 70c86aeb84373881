"""What is counted is served as Prometheus reads it, and whoever asks otherwise is refused."""

import asyncio
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nsm.errors import PreconditionError
from nsm.heal import Cause
from nsm.model import Connection, Mechanism
from nsm.process import metrics
from nsm.process.metrics import METHODS, MOST, PATIENCE, WAITING, Figures, carried, served
from tests.support.wait import until

LOCAL = "127.0.0.1"


def samples(text: str) -> Mapping[tuple[str, ...], float]:
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scraped(url: str) -> Mapping[tuple[str, ...], float]:
    def get() -> str:
        with urllib.request.urlopen(url, timeout=5) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            return answer.read().decode()

    return samples(await asyncio.to_thread(get))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Figures:
    fresh = Figures()
    monkeypatch.setattr(metrics, "figures", fresh)
    return fresh


async def test_what_was_counted_is_what_a_scrape_reads(figures: Figures) -> None:
    figures.called("a.B/Request", "OK", 0.004)
    figures.called("a.B/Request", "OK", 0.005)  # a bucket has its bound in it
    figures.called("a.B/Request", "NOT_FOUND", 40.0)
    figures.healed(Cause.DATA, 0.75)
    figures.shows("wires", lambda: {"vxlan": 3})
    async with served(LOCAL, 0, "nsmgr", lambda: True) as url:
        found = await scraped(url)
    assert found["vwire_requests_total", "OK", "a.B/Request"] == 2
    assert found["vwire_requests_total", "NOT_FOUND", "a.B/Request"] == 1
    buckets = {k[1]: v for k, v in found.items() if k[0] == "vwire_request_seconds_bucket"}
    assert (buckets["0.0025"], buckets["0.005"], buckets["30.0"], buckets["+Inf"]) == (0, 2, 2, 3)
    assert found["vwire_request_seconds_count", "a.B/Request"] == 3
    assert found["vwire_request_seconds_sum", "a.B/Request"] == pytest.approx(40.009)
    assert (found["vwire_heals_total", "data"], found["vwire_heals_total", "deleted"]) == (1, 0)
    assert found["vwire_outage_seconds_total", "data"] == 0.75
    assert (found["vwire_wires", "vxlan"], found["vwire_ready", "nsmgr"]) == (3, 1)
    assert found["vwire_tasks",] >= 1
    assert found["vwire_open_fds",] >= 3
    assert found["vwire_pss_bytes",] > 1 << 20


async def test_labels_are_bounded_whatever_is_called(figures: Figures) -> None:
    for number in range(METHODS + 50):
        figures.called(f"m{number}", "OK", 0.001)
    assert len(figures.durations) == METHODS + 1
    assert figures.calls["other", "OK"] == 50


async def test_who_asks_for_something_else_is_told_and_who_says_nothing_keeps_nobody(
    figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "PATIENCE", 0.2)
    async with served(LOCAL, 0, "nsmgr", lambda: False) as url:
        port = int(url.rpartition(":")[2].partition("/")[0])
        reader, writer = await asyncio.open_connection(LOCAL, port)
        for asked, status in (("POST /metrics", 405), ("GET /other", 404)):
            verb, path = asked.split()
            request = urllib.request.Request(f"http://{LOCAL}:{port}{path}", method=verb)
            with pytest.raises(urllib.error.HTTPError, match=str(status)) as refused:
                await asyncio.to_thread(urllib.request.urlopen, request, timeout=5)
            refused.value.close()
        assert (await scraped(url))["vwire_ready", "nsmgr"] == 0
        assert await reader.read() == b""  # what said nothing is cut
        writer.close()
        long, there = await asyncio.open_connection(LOCAL, port)
        there.write(b"GET /" + b"x" * 100_000)
        assert await long.read() == b""
        there.close()


async def test_many_that_say_nothing_keep_no_scrape_out_and_take_no_more_descriptors_than_may_be(
    figures: Figures,
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with served(LOCAL, 0, "nsmgr", lambda: True) as url:
        port = int(url.rpartition(":")[2].partition("/")[0])
        listening = len(os.listdir("/proc/self/fd")) - before
        quiet = [socket.create_connection((LOCAL, port)) for _ in range(MOST)]
        try:
            began = time.monotonic()
            assert (await scraped(url))["vwire_ready", "nsmgr"] == 1
            assert time.monotonic() - began < PATIENCE / 2
            for _ in range(2 * WAITING):
                connecting = asyncio.to_thread(socket.create_connection, (LOCAL, port), 5)
                quiet.append(await connecting)

            def theirs() -> int:
                return len(os.listdir("/proc/self/fd")) - before - listening - len(quiet)

            await until(lambda: 0 < theirs() <= WAITING, "what is too much to be cut", bar=0.5)
        finally:
            for one in quiet:
                one.close()


async def test_a_port_that_is_taken_is_told_with_what_to_set(figures: Figures) -> None:
    with socket.create_server((LOCAL, 0)) as taken:
        serving = served(LOCAL, taken.getsockname()[1], "nsmgr", lambda: True)
        with pytest.raises(PreconditionError, match="NSM_PROMETHEUS_LISTEN_ON"):
            await serving.__aenter__()


def test_a_wire_counts_by_what_carries_it() -> None:
    def conn(type_: str) -> Connection:
        return Connection(id=type_, service="s", mechanism=Mechanism("LOCAL", type_, {}))

    made = [conn("KERNEL"), conn("KERNEL"), conn("VXLAN"), conn("NEW"), None]
    assert carried(made, ["KERNEL", "WIREGUARD", "KERNEL"]) == {
        "kernel": 1,
        "wireguard": 1,
        "vxlan": 1,
        "other": 2,
    }
