"""How a setting's value is written, as upstream's processes read it (`wire.md` §11.1)."""

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal, get_args

from nsm.domains import server, show_server


@dataclass(frozen=True, slots=True)
class Form:
    """How a value is written: `Annotated[T, Form(parse, "what is expected")]`.

    parse raises ValueError, or an NsmError whose sentence is then shown;
    show is its inverse.
    """

    parse: Callable[[str], Any]
    expected: str
    show: Callable[[Any], str] = str


_UNITS = {  # nanoseconds
    "ns": 1,
    "us": 10**3,
    "\N{MICRO SIGN}s": 10**3,
    "\N{GREEK SMALL LETTER MU}s": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_PART = re.compile(rf"([0-9]+\.?[0-9]*|\.[0-9]+)({'|'.join(_UNITS)})")
_DURATION = re.compile(rf"([-+]?)((?:{_PART.pattern})+|0)")
_LONGEST = 1 << 63  # nanoseconds, because Go counts them in 64 bits


def duration(text: str) -> float:
    """Seconds of a Go duration: `750ms`, `10m`, `1h30m`, `0`."""
    match = _DURATION.fullmatch(text)
    if match is None or len(text) > 64:
        raise ValueError(text)
    spent = sum(Decimal(number) * _UNITS[unit] for number, unit in _PART.findall(match[2]))
    if spent >= _LONGEST:
        raise ValueError(text)
    seconds = float(Decimal(spent) / 10**9)  # exact up to here: 0.1s + 0.2s is 0.3s
    return -seconds if match[1] == "-" else seconds


def positive_duration(text: str) -> float:
    """A duration above zero, in seconds."""
    seconds = duration(text)
    if seconds <= 0:
        raise ValueError(text)
    return seconds


def show_duration(seconds: float) -> str:
    """A number of seconds, to the nanosecond, as Go writes it but without parts that are zero."""
    left, text = abs(round(Decimal(repr(seconds)) * 10**9)), ""  # as it is written, not in binary
    for unit, size in (
        ("h", 3600 * 10**9),
        ("m", 60 * 10**9),
        ("s", 10**9),
        ("ms", 10**6),
        ("us", 10**3),
        ("ns", 1),
    ):
        whole, left = divmod(left, size)
        if whole:
            text += f"{whole}{unit}"
    return "-" * (seconds < 0) + text if text else "0s"


def boolean(text: str) -> bool:
    """A truth value as Go's strconv.ParseBool reads it."""
    if text in {"1", "t", "T", "TRUE", "true", "True"}:
        return True
    if text in {"0", "f", "F", "FALSE", "false", "False"}:
        return False
    raise ValueError(text)


def integer(low: int, high: int) -> Callable[[str], int]:
    """A reader of whole decimal numbers from low to high."""

    def parse(text: str) -> int:
        if re.fullmatch(r"[-+]?[0-9]{1,19}", text) is None or not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    return parse


def url(text: str) -> str:
    """`tcp://host:port`, `tcp://:port`, `unix:///path`, any other scheme, or `host:port`."""
    if len(text) > 2048 or any(ord(sign) <= 32 or ord(sign) == 127 for sign in text):
        raise ValueError(text)
    scheme, mark, rest = text.partition("://")
    if not mark:
        fine = text == "" or _ends_in_port(text)
    elif scheme == "tcp":
        fine = _ends_in_port(rest)
    elif scheme == "unix":
        fine = rest.startswith("/")
    else:
        fine = bool(scheme and rest)
    if not fine:
        raise ValueError(text)
    return text


def _ends_in_port(authority: str) -> bool:
    port = authority.rpartition(":")[2] if ":" in authority else ""
    return re.fullmatch("[0-9]{1,5}", port) is not None and int(port) < 65536


def listening(text: str) -> tuple[str, int]:
    """Where to listen: `127.0.0.1:8081`, `[::1]:8081`, `:8081` (everywhere); port 0: a free one."""
    host, mark, port = text.rpartition(":")
    if not mark or re.fullmatch("[0-9]{1,5}", port) is None or int(port) > 65535:
        raise ValueError(text)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return (str(ipaddress.ip_address(host)) if host else ""), int(port)


LogLevel = Literal["TRACE", "DEBUG", "INFO", "WARN", "ERROR"]
_OTHER_LEVELS = {"WARNING": "WARN", "FATAL": "ERROR", "PANIC": "ERROR"}  # logrus has these too


def log_level(text: str) -> LogLevel:
    """A level's name, in either case."""
    name = _OTHER_LEVELS.get(text.upper(), text.upper())
    for level in get_args(LogLevel):
        if level == name:
            found: LogLevel = level
            return found
    raise ValueError(text)


Duration = Annotated[float, Form(duration, "a duration such as 750ms, 10m or 1h30m", show_duration)]
PositiveDuration = Annotated[
    float, Form(positive_duration, "a duration above zero such as 750ms or 10m", show_duration)
]
Url = Annotated[str, Form(url, "a URL: tcp://host:port, unix:///path or host:port")]
Count = Annotated[int, Form(integer(1, 1_000_000_000), "a whole number above zero")]
Port = Annotated[int, Form(integer(0, 65535), "a port: 0 to 65535")]
Listening = Annotated[
    tuple[str, int], Form(listening, "ADDRESS:PORT, as 127.0.0.1:8081 or :8081", show_server)
]
Level = Annotated[LogLevel, Form(log_level, "TRACE, DEBUG, INFO, WARN or ERROR")]
DnsServer = Annotated[
    tuple[str, int],
    Form(server, "a DNS server: 10.0.0.53, 10.0.0.53:5353 or [fd00::53]:5353", show_server),
]
