"""What a program said last, for whoever has to say why it ended."""

import contextlib
import json
import os

MOST = 4096  # bytes that are looked at


def last_words(log: str, lines: int = 3, *, after: int = 0) -> str:
    """The end of a log on one line; after is how many bytes of it are an earlier life's."""
    try:
        with open(log, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - MOST, after if after <= size else 0))
            text = file.read(MOST).decode(errors="replace")
    except FileNotFoundError:
        return "(no log)"
    return " | ".join(map(_said, text.strip().splitlines()[-lines:])) or "(empty log)"


def _said(line: str) -> str:
    """What a line of a log says to people."""
    with contextlib.suppress(ValueError):
        told = json.loads(line)
        if isinstance(told, dict) and "event" in told:
            return ": ".join(str(told[key]) for key in ("event", "why") if key in told)
    return line.strip()
