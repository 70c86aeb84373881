"""Each of upstream's examples that a kernel can show has a lab, or a sentence on what lacks."""

from pathlib import Path

import pytest

from labs import lab
from tests.support.examples import LISTED, SHOWN, parity

ROOT = Path(__file__).parents[3]
LABS = ROOT / "labs" / "parity"


def test_every_example_that_a_kernel_can_show_is_listed_once():
    lines = (ROOT / "tests/data/upstream-examples.tsv").read_text().splitlines()
    known = [line.split("\t")[1] for line in lines if not line.startswith("#")]
    assert len(set(known)) == len(known) == 81
    assert [one.id for one in LISTED if not one.id.startswith("faults/")] == known


def test_so_is_every_fault_that_upstream_has_no_example_of():
    ours = ("node-reboot", "partition", "disk-full", "certificate-source-gone", "clock-step")
    assert [one.id for one in LISTED if one.id.startswith("faults/")] == [
        f"faults/{name}" for name in ours
    ]


@pytest.mark.parametrize(
    "one", [one for one in SHOWN if "/" in one.id and one.id[:4] in ("heal", "faul")],
    ids=lambda one: one.id,
)  # fmt: skip
def test_a_lab_of_healing_breaks_something_and_asks_for_echoes_afterwards(one):
    kinds = [type(check.what) for check in lab.read(one.lab).checks]
    broken = [i for i, kind in enumerate(kinds) if kind is lab.Faulty]
    assert broken
    assert lab.Ping in kinds[broken[-1] :]


@pytest.mark.parametrize("one", LISTED, ids=lambda one: one.id)
def test_it_has_a_lab_of_its_own_or_says_in_a_sentence_what_is_missing(one):
    assert one.shows
    assert one.lab.exists() != bool(one.missing)
    if one.missing:
        assert one.missing.endswith(".")
        assert len(one.missing.split()) > 4


def test_no_lab_is_beside_those_that_are_listed():
    there = {path for path in LABS.rglob("*.yaml") if path.name != "index.yaml"}
    assert there == {one.lab for one in SHOWN}


@pytest.mark.parametrize("one", SHOWN, ids=lambda one: one.id)
def test_its_lab_asks_for_echoes_that_are_answered(one):
    asked = lab.read(one.lab)
    assert any(isinstance(c.what, lab.Ping) and c.what.lost == 0 for c in asked.checks)
    assert not asked.must_be_red


def test_no_two_labs_have_one_name():
    names = [lab.read(one.lab).name for one in SHOWN]
    assert len(set(names)) == len(names)


# --- what a run counts as passed -------------------------------------------------------------

GOOD = {
    "checks": [
        {"name": "all", "holds": True, "says": "",
         "figures": {"sent": 4, "arrived": 4, "lost": 0, "best_ms": 0.1}},
        {"name": "none", "holds": True, "says": "",
         "figures": {"sent": 2, "arrived": 0, "lost": 2, "best_ms": None}},
        {"name": "other", "holds": True, "says": "", "figures": {}},
        {"name": "fault", "holds": True, "says": "",
         "figures": {"flows": 1, "sent_there": 9, "lost_there": 0, "sent_back": 9, "lost_back": 0}},
        {"name": "cut", "holds": True, "says": "",
         "figures": {"flows": 1, "sent_there": 9, "lost_there": 4, "sent_back": 9, "lost_back": 0}},
    ],
    "wires": [{"mechanism": "veth"}],
    "left": [],
}  # fmt: skip


def test_a_lab_passes_by_what_was_counted_at_both_ends():
    assert parity.faults(GOOD) == []
    assert parity.echoes(GOOD) == (4, 4, 4)
    assert parity.refused(GOOD) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"error": "it did not come up"}, "it did not come up"),
        ({"left": ["namespace x"]}, "left over: namespace x"),
        ({"checks": GOOD["checks"][1:]}, "0 echoes sent, 0 arrived, 0 answered"),
        (
            {"checks": [{**GOOD["checks"][0], "holds": False, "says": "1 of 4 lost"}]},
            "all: 1 of 4 lost",
        ),
        (
            {"checks": [{**GOOD["checks"][0], "figures": {"sent": 4, "arrived": 3, "lost": 0}}]},
            "4 echoes sent, 3 arrived, 4 answered",
        ),
    ],
)
def test_what_does_not_pass_says_why(change, says):
    assert parity.faults(GOOD | change) == [says]


def test_the_page_has_a_row_for_each_and_nothing_of_a_day_or_a_machine():
    parts = parity.examples(
        "one part:\n  x: {shows: this}\n  y: {shows: that, not: There is no such thing.}\n"
    )
    text = parity.page(parts, {"x": GOOD})
    counted = "5 checks; 4 sent, 4 arrived, 4 answered; 2 had to be refused, 0 arrived"
    counted += "; 2 faults under traffic: 1 lost nothing, after 1 packets flow again"
    assert text.splitlines()[-4:] == [
        "| example | shows | wires | result |",
        "|---|---|---|---|",
        f"| [x](../labs/parity/x.yaml) | this | 1 veth | {counted} |",
        "| y | that | not yet | There is no such thing. |",
    ]


def test_the_page_is_of_the_examples_that_are_listed():
    assert list(parity.untrue()) == []
