"""Whoever is killed: what must live on a wire lives on, what must heal heals, nothing is left.

`matrix.yaml` says which number must be 0 where. One lab has a wire of each kind and a flow on it,
so a row of the matrix is struck once and judged three times; what arrives after a row has arrived
before the next. All rows run one after the other before the first cell is judged.
`make test` has single victims and some pairs, drawn by a seed, the same one each time, that
VWIRE_KILL_SEED sets; `make matrix` has all pairs.
"""

import faulthandler
import json
import os
import random
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Final, cast

import pytest
import yaml

from tests.e2e.kills.kept import Said
from tests.e2e.kills.stand import KINDS, VICTIMS, Cell, Row, Stand
from tests.support.spaces import Space
from tests.support.wait import PATIENCE, write

MATRIX: Final[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("matrix.yaml").read_text())
SEED: Final = int(os.environ.get("VWIRE_KILL_SEED", "7"))
DRAWN: Final = 12
LONGEST: Final = 200  # seconds of a row, whatever goes wrong in it
SINGLES: Final[tuple[Row, ...]] = tuple((name,) for name in MATRIX["victims"])
PAIRS: Final[tuple[Row, ...]] = tuple(combinations(MATRIX["victims"], 2))
_LATER: Final = {frozenset(one["row"]) for one in MATRIX["not yet"]}  # each costs a lab, or waits
_SOME: Final = [row for row in PAIRS if not any(one <= {*row} for one in _LATER)]
OF_TEST: Final = {*SINGLES, *random.Random(SEED).sample(_SOME, DRAWN)}
ALL_LONG: Final = bool(os.environ.get("VWIRE_MATRIX"))  # of all rows what is long
DROP: Final = (
    "table inet t { chain c { type filter hook input priority 0;"
    " ip protocol udp numgen inc mod 7 == 6 drop;\n }\n }"
)
BLOCKED: Final = ("a call that may block a loop",)
TOLD: Final = Path(__file__).parents[2] / "out" / "kill-matrix.json"
LOGS: Final = TOLD.with_suffix("")  # a file of each row that is red


def kinds(row: Row) -> dict[str, str]:
    """What must become of each wire: what the worse victim does to it."""
    found: dict[str, str] = {}
    for name in row:
        for wire, kind in MATRIX["victims"][name].items():
            found[wire] = max(kind, found.get(wire, KINDS[0]), key=KINDS.index)
    return found


def cells() -> Iterator[Any]:
    for row in (*SINGLES, *PAIRS):
        marks = () if row in OF_TEST and not ALL_LONG else (pytest.mark.long,)
        for wire in kinds(row):
            yield pytest.param(row, wire, marks=marks, id=f"{' + '.join(row)}-{wire}")


class Summary:
    """What a run of the matrix says at its end, also where all is well."""

    def __init__(self) -> None:
        self.rows: dict[Row, dict[str, Cell]] = {}
        self.broken: dict[Row, str] = {}
        self.not_yet: list[str] = []
        self.holds: list[str] = []

    def write(self) -> None:
        """What is known so far, for whoever wants all figures."""
        rows = {
            " + ".join(row): {w: asdict(c) for w, c in of.items()} for row, of in self.rows.items()
        }
        broken = {" + ".join(row): why for row, why in self.broken.items()}
        TOLD.parent.mkdir(exist_ok=True)
        TOLD.write_text(json.dumps({"seed": SEED, "rows": rows, "broken": broken}, indent=1))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"kill matrix, VWIRE_KILL_SEED={SEED}")
        for row, judged in self.rows.items():
            told = [f"{wire} {_figures(cell)}" for wire, cell in judged.items()]
            terminalreporter.write_line(f"{' + '.join(row):36} {' | '.join(told)}")
        for row, why in self.broken.items():
            terminalreporter.write_line(f"{' + '.join(row):36} {why.splitlines()[-1]}")
        for line in self.not_yet:
            terminalreporter.write_line(f"not yet: {line}")
        for line in self.holds:
            terminalreporter.write_line(f"holds by now, and is to go from matrix.yaml: {line}")


def _figures(cell: Cell) -> str:
    """A cell in some words."""
    found = [f"{number} {name}" for name, number in cell.numbers.items() if number]
    times = [f"{name} {cell.times[name]:.2f} s" for name in bars(cell) if name in cell.times]
    return f"{cell.kind}: {', '.join([*found, *times]) or 'all 0'}"


def bars(cell: Cell) -> Mapping[str, float]:
    """The times of a cell that are judged."""
    found: Mapping[str, float] = MATRIX["kinds"][cell.kind].get("bars", {})
    return found


@pytest.fixture(scope="module")
def summary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """All rows that were asked for, struck and counted."""
    told = Summary()
    request.config.pluginmanager.register(told)
    asked: Sequence[pytest.Item] = request.session.items
    params = [
        item.callspec.params for item in asked
        if isinstance(item, pytest.Function) and item.path == request.path
        and hasattr(item, "callspec") and not item.get_closest_marker("skip")
    ]  # fmt: skip
    rows = list(dict.fromkeys(cast("Row", one["row"]) for one in params))
    guard = tmp_path_factory.mktemp("guard") / "calls"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSM_LOOP_GUARD", str(guard))
        while rows:
            name = f"kills{os.getpid() % 100_000}"
            with Stand(name, str(tmp_path_factory.mktemp("labs"))) as stand:
                while rows:
                    row = rows.pop(0)
                    # as of a test of its own, because a row is as long as one
                    faulthandler.dump_traceback_later(LONGEST, exit=True, file=sys.__stderr__)
                    said, kept = Said(stand.paths), LOGS / f"{' + '.join(row)}.txt"
                    kept.unlink(missing_ok=True)
                    try:
                        judged = told.rows[row] = stand.judge(row, kinds(row))
                    except Exception:  # noqa: BLE001 - its cells tell, and the others go on
                        told.broken[row] = traceback.format_exc()
                        said.keep(kept, told.broken[row])
                        break  # in a lab of their own
                    else:
                        if wrong := _all_wrong(row, judged):
                            said.keep(kept, wrong)
                    finally:
                        told.write()
    if guard.exists() and (calls := guard.read_text()):
        told.broken[BLOCKED] = calls
    return told


@pytest.mark.parametrize(("row", "wire"), [*cells()])
def test_a_wire_is_as_the_matrix_says_when_somebody_is_struck(
    summary: Summary, row: Row, wire: str
) -> None:
    if row in summary.broken:
        if excuse := _excuse(row, wire, "row"):
            summary.not_yet.append(excuse)
            pytest.xfail(excuse)
        pytest.fail(summary.broken[row], pytrace=False)
    verdict = _verdict(row, wire, summary.rows[row][wire])
    summary.holds += verdict.holds
    for name, (seconds, bar) in verdict.times.items():
        write(f"{' and '.join(row)} struck: a {wire} {name}", seconds, bar)
    assert not verdict.wrong, "\n".join(verdict.wrong)
    if verdict.later:
        summary.not_yet += verdict.later
        pytest.xfail("; ".join(verdict.later))


@dataclass(slots=True)
class Verdict:
    """What is to be said of a cell."""

    wrong: list[str] = field(default_factory=list)
    later: list[str] = field(default_factory=list)  # wrong too, as is known
    holds: list[str] = field(default_factory=list)  # that is said not to
    times: dict[str, tuple[float, float]] = field(default_factory=dict)  # with their bars


def _verdict(row: Row, wire: str, cell: Cell) -> Verdict:
    told = Verdict()
    for number in MATRIX["kinds"][cell.kind]["zero"]:
        excuse = _excuse(row, wire, number)
        if cell.numbers.get(number) == 0:
            told.holds += [excuse] if excuse else []
        elif excuse:
            told.later.append(f"{excuse} ({cell.numbers.get(number)})")
        else:
            told.wrong.append(f"{number} is {cell.numbers.get(number)}: {cell.notes.get(number)}")
    for name, bar in bars(cell).items():
        if name not in cell.times or (name == "gone" and cell.numbers.get("left behind")):
            continue  # the number that says so is not 0
        seconds = cell.times[name]
        told.times[name] = seconds, bar
        if seconds > PATIENCE * bar:
            told.wrong.append(f"{name} after {seconds:.1f} s, and the bar is {bar:g} s")
    return told


def _all_wrong(row: Row, judged: Mapping[str, Cell]) -> str:
    """Of a row what is not as it must be, excused or not; "" if all is well."""
    verdicts = {wire: _verdict(row, wire, cell) for wire, cell in judged.items()}
    found = [f"{wire}: {line}" for wire, v in verdicts.items() for line in (*v.wrong, *v.later)]
    return "\n".join(found)


def _excuse(row: Row, wire: str, number: str) -> str:
    """Why a number need not be 0 yet; "" if it must."""
    for one in MATRIX["not yet"]:
        if set(one["row"]) <= set(row) and one["wire"] in (wire, "all") and one["number"] == number:
            return f"{' + '.join(row)}, {wire}, {number}: {one['because']}"
    return ""


@pytest.mark.long
def test_what_is_lost_changed_or_left_by_others_is_counted(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A matrix that is all 0 says something only if it can be otherwise."""
    name = f"kills{os.getpid() % 100_000}"
    with Stand(name, str(tmp_path_factory.mktemp("labs"))) as stand:
        wires = stand.wires()
        spaces = {place: Space(stand.paths.namespace(place)) for place in stand.lab.places}

        def meddle() -> None:
            drop = spaces["vxlan"].run("nft", DROP)
            assert drop.returncode == 0, drop.stderr
            spaces[wires["veth"].endpoint].do("link", "add", "stray", "type", "bridge")
            spaces["near"].do("rule", "add", "pref", "7801", "table", "main")
            spaces["caller"].do("address", "add", "192.0.2.9/32", "dev", "lo")
            spaces["wireguard"].do("link", "set", "nsm-1", "mtu", "1300")

        cells = stand.judge(("registry",), kinds(("registry",)), meddle)
    assert [cells[wire].numbers["lost"] for wire in ("veth", "wireguard")] == [0, 0]
    assert cells["vxlan"].numbers["lost"] > 10, cells["vxlan"]
    assert [cells[wire].numbers["changed"] for wire in ("veth", "vxlan")] == [0, 0]
    assert "1300" in cells["wireguard"].notes["changed"]
    for cell in cells.values():
        assert cell.numbers["left"] == 4, cell  # the address has a route
        for what in ("device stray", "rule priority 7801", "address 192.0.2.9/32 on lo"):
            assert what in cell.notes["left"], cell.notes["left"]


def test_no_process_did_on_its_loop_what_may_block(summary: Summary) -> None:
    assert BLOCKED not in summary.broken, summary.broken[BLOCKED]


def test_the_matrix_names_every_victim_that_there_is() -> None:
    assert {*MATRIX["victims"]} == {*VICTIMS}
    assert {*MATRIX["kinds"]} == {*KINDS}
