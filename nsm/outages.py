"""The outages of a client's wires, kept in a file: when, why, and what ending each took.

A line of JSON for each, written when the wire is up again or given up. The file is bounded:
full, it becomes FILE.1, and what was FILE.1 is gone. `nsmctl heal report` sums files up.
"""

import asyncio
import json
import os
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, BinaryIO, Final, Self

import structlog

from nsm.errors import InvalidError, PreconditionError
from nsm.heal import Cause, Trouble

LARGEST: Final = 1 << 20  # bytes of a file: some 2000 outages
LONGEST: Final = 64 * 1024  # bytes of a line that is read
ENOUGH: Final = 300  # outages, before anybody speaks of a 99th percentile

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """One outage. Times are in seconds.

    ended       when it ended, since 1970
    noticed     from its beginning until it was known
    healed      from its beginning until the wire was up again; None: it was given up
    flowed      whether packets flowed all the same; None: nobody could tell
    """

    connection: str
    service: str
    cause: Cause
    ended: float
    noticed: float
    healed: float | None
    flowed: bool | None = None
    endpoint: str = ""
    endpoint_after: str = ""
    tries: int = 0
    stages: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, trouble: Trouble, connection: str, service: str, endpoint_after: str = "") -> Self:
        """A trouble of a wire that is over, or given up, now."""
        return cls(
            connection=connection,
            service=service,
            cause=trouble.cause,
            ended=round(time.time(), 3),
            noticed=round(trouble.noticed - trouble.began, 6),
            healed=round(trouble.seconds, 6) if trouble.healed else None,
            flowed=trouble.flowed,
            endpoint=trouble.endpoint,
            endpoint_after=endpoint_after,
            tries=trouble.tries,
            stages=dict(trouble.stages),
        )

    @classmethod
    def read(cls, line: bytes) -> Self:
        """The outage of a line; what a later version says besides is passed over.

        Raises InvalidError for a line that is none: half of one, another version's, or not ours.
        """
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            raise InvalidError("it is no JSON") from None
        if not isinstance(said, dict):
            raise InvalidError("it is no JSON object")
        found: dict[str, Any] = {}
        for one in fields(cls):
            fits, wanted = _KINDS[one.name]
            if one.name in said:
                found[one.name] = said[one.name]
                if not fits(said[one.name]):
                    what = repr(said[one.name])[:60]
                    raise InvalidError(f"`{one.name}` is {what}, and not {wanted}")
            elif one.default is MISSING and one.default_factory is MISSING:
                raise InvalidError(f"it has no `{one.name}`")
        return cls(**{**found, "cause": Cause(found["cause"])})


def _number(value: Any) -> bool:
    """But no NaN, and nothing that a sum or a table could not hold."""
    there = isinstance(value, int | float) and not isinstance(value, bool)
    return there and -_MOST <= value <= _MOST


def _seconds(value: Any) -> bool:
    return _number(value) and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


_MOST: Final = 1e12
_KINDS: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "connection": (_text, "a text"),
    "service": (_text, "a text"),
    "cause": (lambda value: _text(value) and value in [*Cause], f"one of {', '.join(Cause)}"),
    "ended": (_seconds, "a number of seconds"),
    "noticed": (_seconds, "a number of seconds"),
    "healed": (lambda value: value is None or _seconds(value), "a number of seconds, or null"),
    "flowed": (lambda value: value is None or isinstance(value, bool), "true, false or null"),
    "endpoint": (_text, "a text"),
    "endpoint_after": (_text, "a text"),
    "tries": (lambda value: isinstance(value, int) and _seconds(value), "a count"),
    "stages": (
        lambda value: isinstance(value, dict) and all(map(_number, value.values())),
        "an object of milliseconds by stage",
    ),
}


class Journal:
    """Takes outages on the event loop; a thread writes them, in their order."""

    def __init__(self, path: str, largest: int = LARGEST) -> None:
        self._path = path
        self._largest = largest
        self._waiting: list[bytes] = []
        self._writing: asyncio.Future[None] | None = None

    def add(self, outage: Outage) -> None:
        """Have it written soon; at the end of the journal's block it is."""
        if self._path:
            self._waiting.append(json.dumps(asdict(outage)).encode() + b"\n")
            self._write()

    def _write(self, _: object = None) -> None:
        if self._waiting and (self._writing is None or self._writing.done()):
            data, self._waiting = b"".join(self._waiting), []
            loop = asyncio.get_running_loop()
            self._writing = loop.run_in_executor(None, self._append, data)
            self._writing.add_done_callback(self._written)

    def _written(self, done: "asyncio.Future[None]") -> None:
        if not done.cancelled() and (error := done.exception()):
            log.warning("outages are not kept", file=self._path, why=str(error))
        self._write()

    def _append(self, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with open(os.open(self._path, flags, 0o640), "ab", buffering=0) as file:
            file.write(data)
            full = file.tell() > self._largest
        if full:
            os.replace(self._path, f"{self._path}.1")

    async def flushed(self) -> None:
        """Wait until all is written, or could not be."""
        while self._writing and not (self._writing.done() and not self._waiting):
            await asyncio.wait({self._writing})
            await asyncio.sleep(0)  # whoever follows is begun by a callback


@asynccontextmanager
async def journal(path: str) -> AsyncIterator[Journal]:
    """A journal in the file path for the block; empty: what it is told is forgotten.

    Raises PreconditionError where it cannot be written.
    """
    kept = Journal(path)
    if path:
        try:
            await asyncio.to_thread(kept._append, b"")  # noqa: SLF001 - ours
        except OSError as error:
            raise PreconditionError(
                f"NSM_OUTAGE_LOG is {path!r}, which cannot be written: {error.strerror}",
                hint="its directory must exist, and this user may write there",
            ) from error
    try:
        yield kept
    finally:
        await kept.flushed()


def read(paths: Iterable[str], refused: Callable[[str], None] = lambda _: None) -> Iterator[Outage]:
    """The outages of files, each with its older part, in the order they were written. Blocks.

    refused is told, in a sentence, of each line that is none. Raises PreconditionError for a
    file that cannot be read.
    """
    for path in paths:
        for part in (f"{path}.1", path):
            try:
                with open(part, "rb") as file:
                    for number, line in enumerate(_lines(file), 1):
                        try:
                            yield Outage.read(line)
                        except InvalidError as why:
                            refused(f"{part}, line {number} is no outage: {why.message}")
            except FileNotFoundError:
                continue
            except OSError as error:
                raise PreconditionError(
                    f"{part} cannot be read: {error.strerror}",
                    hint="name files that clients write: NSM_OUTAGE_LOG",
                ) from error


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long as much as shows that it is."""
    while line := file.readline(LONGEST):
        yield line
        while len(line) == LONGEST and not line.endswith(b"\n"):
            line = file.readline(LONGEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The outages of one cause. Seconds; None where there is nothing to say."""

    cause: Cause
    n: int
    lost: int
    """How many were given up."""
    cut: int
    """In how many no packets flowed, as far as anybody could tell."""
    noticed_median: float
    noticed_max: float
    healed_median: float | None
    healed_max: float | None
    healed_p99: float | None
    """Only of 300 outages or more: of fewer it is the longest, by another name."""


def summed(outages: Iterable[Outage]) -> list[Summary]:
    """One summary for each cause there was, in the order of causes."""
    by: dict[Cause, list[Outage]] = {}
    for one in outages:
        by.setdefault(one.cause, []).append(one)
    return [_summary(cause, by[cause]) for cause in Cause if cause in by]


def _summary(cause: Cause, some: Sequence[Outage]) -> Summary:
    noticed = [one.noticed for one in some]
    healed = sorted(one.healed for one in some if one.healed is not None)
    enough = len(healed) >= ENOUGH
    return Summary(
        cause=cause,
        n=len(some),
        lost=len(some) - len(healed),
        cut=sum(one.flowed is False for one in some),
        noticed_median=statistics.median(noticed),
        noticed_max=max(noticed),
        healed_median=statistics.median(healed) if healed else None,
        healed_max=healed[-1] if healed else None,
        healed_p99=statistics.quantiles(healed, n=100)[98] if enough else None,
    )
