"""Runs the labs of labs/parity and writes docs/parity.md from what they counted.

    python docs/parity.py            every lab, then the page; exit code 1 if one does not hold
    python docs/parity.py dns opa    these only, and no page

A lab passes if all its checks hold, nothing of it is left, and echoes were counted where they
were sent and where they arrived. As root, because wires need namespaces.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
LABS = ROOT / "labs" / "parity"
PAGE = ROOT / "docs" / "parity.md"
WITHIN = 300  # seconds for one lab
HEAD = """\
# What upstream shows by example, and what shows it here

Upstream's acceptance tests are the examples of its *deployments-k8s*. Those that a kernel's data
plane can show at all are here, by upstream's names; memif, SR-IOV, AF_XDP and OVS are out of scope.
`nsmctl lab run labs/parity/NAME.yaml` runs one, `make parity` all of them: this page is written by
that run, and by nobody.

A lab passes when every check of it holds, nothing of it is left behind, and echoes were counted at
both ends: sent and answered where they began, arrived where they were meant to. Those that had to
be refused are counted apart. While something is broken on purpose numbered datagrams flow, 200 a
second each way: lost is what was sent and did not arrive.
"""


@dataclass(frozen=True)
class Example:
    """One of upstream's: what it shows, its lab here, or why there is none."""

    id: str
    shows: str
    missing: str

    @property
    def lab(self) -> Path:
        """Where its lab is."""
        return LABS / f"{self.id}.yaml"

    @property
    def begins(self) -> str:
        """Its row on the page, as far as no run is needed for it."""
        if self.missing:
            return f"| {self.id} | {self.shows} | not yet | {self.missing} |"
        return f"| [{self.id}](../{self.lab.relative_to(ROOT)}) | {self.shows} | "


def examples(text: str) -> dict[str, list[Example]]:
    """What an index says, by its parts."""
    return {
        part: [Example(id_, item["shows"], item.get("not", "")) for id_, item in listed.items()]
        for part, listed in yaml.safe_load(text).items()
    }


def index() -> dict[str, list[Example]]:
    """Ours."""
    return examples((LABS / "index.yaml").read_text())


# --- running ---------------------------------------------------------------------------------


def run(example: Example) -> dict[str, Any]:
    """What `nsmctl lab run` says of an example's lab; an `error` where it did not come up."""
    command = [sys.executable, "-P", "-m", "nsmctl", "lab", "run", str(example.lab), "--json"]
    command += ["--name", f"parity-{os.getpid()}"]  # beside whoever runs it by its own name
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=WITHIN
    )
    try:
        told: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {"error": (done.stderr.strip() or done.stdout.strip() or "said nothing")[-500:]}
    return told


def faults(told: Mapping[str, Any]) -> list[str]:
    """Why a lab does not pass."""
    if "error" in told:
        return [str(told["error"])]
    found = [f"{one['name']}: {one['says']}" for one in told["checks"] if not one["holds"]]
    found += [f"left over: {what}" for what in told["left"]]
    sent, arrived, answered = echoes(told)
    if not 0 < sent == arrived == answered:
        found.append(f"{sent} echoes sent, {arrived} arrived, {answered} answered")
    return found


def echoes(told: Mapping[str, Any]) -> tuple[int, int, int]:
    """Sent, arrived and answered, of those that were to be answered."""
    carried = [one for one in _pings(told) if one["lost"] < one["sent"]]
    sent, arrived, lost = (
        sum(one[what] for one in carried) for what in ("sent", "arrived", "lost")
    )
    return sent, arrived, sent - lost


def refused(told: Mapping[str, Any]) -> int:
    """Echoes that were sent and arrived nowhere, as they had to."""
    return sum(one["sent"] for one in _pings(told) if one["lost"] == one["sent"])


def under_faults(told: Mapping[str, Any]) -> list[int]:
    """Of each fault during which numbered datagrams flowed: how many did not arrive."""
    figures = [one["figures"] for one in told["checks"] if one["figures"].get("flows")]
    return [one["lost_there"] + one["lost_back"] for one in figures]


def _pings(told: Mapping[str, Any]) -> list[Mapping[str, int]]:
    return [one["figures"] for one in told["checks"] if "arrived" in one["figures"]]


# --- the page --------------------------------------------------------------------------------


def page(parts: Mapping[str, Sequence[Example]], results: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page; results by id. Nothing in it is of a day or a machine."""
    lines = [HEAD]
    for part, listed in parts.items():
        lines += [f"## {part[0].upper()}{part[1:]}\n", "| example | shows | wires | result |"]
        lines += ["|---|---|---|---|"]
        lines += [one.begins + _ends(results[one.id]) if not one.missing else one.begins
                  for one in listed]  # fmt: skip
        lines.append("")
    return "\n".join(lines)


def _ends(told: Mapping[str, Any]) -> str:
    if wrong := faults(told):
        return f"| **does not pass**: {_cell('; '.join(wrong))} |"
    wires: dict[str, int] = {}
    for wire in told["wires"]:
        wires[wire["mechanism"]] = wires.get(wire["mechanism"], 0) + 1
    sent, arrived, answered = echoes(told)
    result = f"{len(told['checks'])} checks; {sent} sent, {arrived} arrived, {answered} answered"
    if none := refused(told):
        result += f"; {none} had to be refused, 0 arrived"
    if lost := under_faults(told):
        whole = sum(not one for one in lost)
        result += f"; {len(lost)} fault{'s' if lost[1:] else ''} under traffic: "
        said = [f"{whole} lost nothing"] if whole else []
        said += [f"after {len(lost) - whole} packets flow again"] if whole < len(lost) else []
        result += ", ".join(said)
    return f"{', '.join(f'{n} {kind}' for kind, n in sorted(wires.items()))} | {result} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def untrue() -> Iterator[str]:
    """Where page and index do not agree, a sentence each."""
    there = PAGE.read_text() if PAGE.exists() else ""
    rows = [line for line in there.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| example ")]
    listed = [one for part in index().values() for one in part]
    if there and not there.startswith(HEAD):
        yield "docs/parity.md: begins as no run of `make parity` begins it"
    for one, row in zip(listed, rows, strict=False):
        agrees = row == one.begins if one.missing else row.startswith(one.begins)
        if not agrees:
            yield f"docs/parity.md: expected {one.begins}, found {row}: make parity"
            return
        if not one.missing and "does not pass" in row:
            yield f"docs/parity.md: {one.id} does not pass"
    if len(rows) != len(listed):
        yield f"docs/parity.md: has {len(rows)} of {len(listed)} examples: make parity"


def main() -> int:
    """Run what is asked for; say how each ended; write the page if that was all."""
    parts = index()
    with_lab = {one.id: one for part in parts.values() for one in part if not one.missing}
    for unknown in (name for name in sys.argv[1:] if name not in with_lab):
        sys.stderr.write(f"no lab of the name {unknown}; there is {', '.join(with_lab)}\n")
        return 2
    results = {}
    for name in sys.argv[1:] or with_lab:
        results[name] = told = run(with_lab[name])
        wrong = faults(told)
        seconds = sum(told.get(what, 0.0) for what in ("up_s", "checks_s", "down_s"))
        says = "; ".join(wrong) or "{} sent, {} arrived, {} answered".format(*echoes(told))
        sys.stdout.write(f"{'RED' if wrong else 'ok '} {seconds:5.1f} s  {name}: {says}\n")
        sys.stdout.flush()
    if not sys.argv[1:]:
        PAGE.write_text(page(parts, results))
    return 1 if any(map(faults, results.values())) else 0


if __name__ == "__main__":
    sys.exit(main())
