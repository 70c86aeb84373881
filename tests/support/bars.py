"""Judges out/times.json: how long tests waited, against how long that should take.

    make bars

Apart from the tests, because a slow machine makes a slow figure, not a wrong program.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

Times = dict[str, list[tuple[float, float]]]


def read(path: Path) -> Times:
    """Seconds and bar of every wait, by what was waited for."""
    times: Times = defaultdict(list)
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        times[entry["what"]].append((entry["seconds"], entry["bar"]))
    return times


def table(times: Times) -> tuple[list[str], int]:
    """A line for each wait, the one nearest its bar first; and how many went over."""
    rows = []
    for what, waits in times.items():
        seconds, bar = max(waits, key=lambda wait: wait[0] / wait[1])
        rows.append((seconds / bar, what, seconds, bar, len(waits)))
    rows.sort(reverse=True)
    lines = [
        f"{'over' if ratio > 1 else 'ok':4}  {seconds:8.3f} s  of {bar:6.2f} s  {count:4} x  {what}"
        for ratio, what, seconds, bar, count in rows
    ]
    return lines, sum(ratio > 1 for ratio, *_ in rows)


def main() -> int:
    """Print the table; exit 1 where a bar was missed, 2 where there is nothing to judge."""
    path = Path(sys.argv[1])
    if not path.exists():
        sys.stderr.write(f"{path} is not there: make test writes it\n")
        return 2
    lines, over = table(read(path))
    sys.stdout.write("\n".join([*lines, f"{len(lines)} waits, {over} over their bar", ""]))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
