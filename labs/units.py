"""Quantities with their units, as lab files and options write them.

A bare number is nobody's unit, so it is refused.
"""

import re
from typing import Final

from nsm.errors import InvalidError

_BYTES: Final = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3}
_BITS: Final = {"kbit": 1000, "Mbit": 1000**2, "Gbit": 1000**3}
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "min": 60.0}


def octets(text: str) -> int:
    """Bytes in `64kB`, `50MB`, `1GB` (powers of 1000)."""
    number, unit = _split(text, tuple(_BYTES))
    return number * _BYTES[unit]


def seconds(text: str) -> float:
    """Seconds in `200ms`, `30s`, `2min`."""
    number, unit = _split(text, tuple(_SECONDS))
    return number * _SECONDS[unit]


def bits(text: str) -> int:
    """Bits (a second) in `500kbit`, `200Mbit`, `1Gbit` (powers of 1000)."""
    number, unit = _split(text, tuple(_BITS))
    return number * _BITS[unit]


def _split(text: str, units: tuple[str, ...]) -> tuple[int, str]:
    found = re.fullmatch(r"([0-9]{1,12})([A-Za-z]+)", text)
    if not found or found[2] not in units:
        hint = f"write a number and {', '.join(units)}"
        raise InvalidError(f"{text!r} is no quantity", hint=hint)
    return int(found[1]), found[2]


def people(size: int) -> str:
    """Bytes as people read them: `50 MB`."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size} {unit}"
        size //= 1000
    return f"{size} GB"


def since(seconds_: float) -> str:
    """A span as people read it: `42 s`, `3 min`, `5 h`, `2 d`."""
    for unit, span in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds_ >= span:
            return f"{int(seconds_ // span)} {unit}"
    return f"{int(seconds_)} s"


def count(number: int, what: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
