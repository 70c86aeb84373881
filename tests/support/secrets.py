"""Whether anything that must stay secret was written down: tokens, and private keys."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

# What a signed token begins with ({"), and what a certificate's key is wrapped in.
_SECRET = re.compile(r"eyJ[\w-]{8,}\.|PRIVATE KEY")


def told_in(text: str) -> list[str]:
    """The lines of text with a secret in them."""
    return [line for line in text.splitlines() if _SECRET.search(line)]


def told_by(logs: Iterable[Path]) -> Mapping[str, str]:
    """The first line with a secret of each of these files that has one; all were read whole."""
    found = {}
    for log in logs:
        if lines := told_in(log.read_text(errors="replace")):
            found[str(log)] = lines[0][:400]
    return found
