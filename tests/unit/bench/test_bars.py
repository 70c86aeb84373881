"""Samples against bars: which figure is made of what, and what the whole comes to."""

import argparse
import json

import pytest

from bench import picture
from bench.__main__ import lines, some_of, status
from bench.bars import judged, without_floors
from bench.verdict import Judged

pytestmark = pytest.mark.unit

ASKED = {
    "shape": "two nodes",
    "told": {
        "request_ms": [40.0, 42.0, 44.0],
        "close_ms": [20.0, 20.0, 20.0],
        "calls_ms": [11.0, 11.0, 11.0],
        "close_calls_ms": [7.5, 7.5, 7.5],
        "token_ms": 0.5,
        "stages": [],
    },
}
SAMPLES = {
    "same": {"veth": [], "vxlan": ["client link: mtu is 1, by hand 2"]},
    "paths": {"veth": {"rates": [(98.0, 100.0)] * 5, "trips": [(100.0, 90.0)] * 5}},
    "setup": {
        "vxlan": {
            "making": {"raw": [0.001] * 3, "ours": [0.0015] * 3},
            "closing": {"raw": [0.0005] * 3, "ours": [0.002] * 3},
        }
    },
    "requests": {"vxlan": ASKED},
    "memory": {
        "veth": {
            "idle": {"nsmgr": 35e6, "forwarder": 30e6, "files of both": 10e6},
            "wires": list(range(10, 110, 10)),
            "both": [65e6 + 25e3 * n for n in range(10, 110, 10)],
            "helpers": [0] * 10,
        }
    },
    "bringups": {"wireguard": [0.01] * 9 + [0.2]},
}


def test_each_figure_is_made_of_its_samples():
    figures = {bar.what: (bar.value, bar.verdict) for bar in judged(SAMPLES)}
    assert figures == {
        "veth: differences from the one by hand": (0, "holds"),
        "vxlan: differences from the one by hand": (1, "does not hold"),
        "veth: throughput ÷ by hand": (0.98, "holds"),
        "veth: round trip, by hand ÷ ours": (0.9, "does not hold"),
        "vxlan: making ÷ raw": (pytest.approx(1.5), "holds"),
        "vxlan: closing ÷ raw": (pytest.approx(4.0), "does not hold"),
        # calls, 14 tokens, a batch at either end; calls, 5 tokens, a delete at both ends at once
        "vxlan: request ÷ its floors": (pytest.approx(42 / (11 + 7 + 2)), "holds"),
        "vxlan: close ÷ its floors": (pytest.approx(20 / (7.5 + 2.5 + 0.5)), "holds"),
        "nsmgr and forwarder at rest": (75.0, "holds"),
        "veth: one more wire in both": (pytest.approx(25.0), "does not hold"),
        "wireguard: slowest bring-up ÷ median": (pytest.approx(20.0), "does not hold"),
    }


def test_without_the_batches_of_a_kind_nothing_is_said_of_its_requests_floors():
    alone = {"requests": SAMPLES["requests"]}
    assert judged(alone) == []
    assert without_floors(alone) == (
        ["request and close of vxlan ÷ their floors: those need the part setup of it"]
    )
    assert without_floors(SAMPLES) == []


def test_the_exit_code_is_that_of_the_worst():
    good = Judged("a", 1.0, 0.97, most=False)
    unclear = Judged("b", 0.96, 0.97, most=False, interval=(0.9, 1.0))
    bad = Judged("c", 0.9, 0.97, most=False, interval=(0.89, 0.91))
    assert status([good], []) == 0
    assert status([good, unclear], []) == 3
    assert status([good], ["wireguard: no lane"]) == 3
    assert status([bad, unclear], ["wireguard: no lane"]) == 1
    assert lines([good, unclear, bad])[-1] == "3 bars: 1 holds, 1 unclear, 1 does not hold"


def test_a_part_there_is_not_is_refused_by_name():
    assert some_of(["same", "paths"])("paths") == ["paths"]
    with pytest.raises(argparse.ArgumentTypeError, match="'path' is none of same, paths"):
        some_of(["same", "paths"])("path")


def test_the_picture_shows_every_bar_and_what_is_missing(tmp_path):
    results = {
        "machine": {
            "processor": "a", "processors": 2, "kernel": "6.1", "python": "3.11", "commit": "c",
            "when": "now", "load": [1.0, 1.0, 1.0],
        },
        "load_after": [2.0, 1.0, 1.0],
        "bars": [bar.words() for bar in judged(SAMPLES)],
        "missing": ["wireguard-go: nobody"],
        "samples": json.loads(json.dumps(SAMPLES)),
    }  # fmt: skip
    picture.draw(results, tmp_path / "all.png")
    picture.draw({**results, "missing": []}, tmp_path / "some.png")
    with (
        picture.Image.open(tmp_path / "all.png") as whole,
        picture.Image.open(tmp_path / "some.png") as some,
    ):
        assert whole.format == "PNG"
        assert whole.height - some.height == picture.ROW
        colours = {colour for _, colour in whole.convert("RGB").getcolors(1 << 20)}
    for name in ("holds", "unclear", "does not hold"):
        wanted = tuple(bytes.fromhex(picture.COLOURS[name][1:]))
        assert wanted in colours, name
