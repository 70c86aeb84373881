"""Asking: every question at once, each in a process of its own, and none for long.

In a process of its own a question may move to other namespaces and try what it likes
there, or hang, or die: what it made goes with it, and only its own line suffers.
"""

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final, NoReturn

from nsm.errors import NsmError
from nsm.kernel import trial

PATIENCE: Final = 5.0  # seconds for all of them together; a machine that is idle takes 0.2
LATE: Final = "no answer within"
FAULT: Final = "that is a fault of vwire's: please report it, with what `uname -a` says"


class Level(StrEnum):
    """How good an answer is."""

    OK = "ok"
    NOTE = "note"  # something optional is missing, or could not be looked at
    BAD = "bad"  # something is missing that labs, or the programs' defaults, stand on


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found, and what to do where that is not well."""

    level: Level
    found: str
    fix: str = ""


def ok(found: str) -> Answer:
    """As it should be."""
    return Answer(Level.OK, found)


def note(found: str, fix: str = "") -> Answer:
    """Something optional is missing."""
    return Answer(Level.NOTE, found, fix)


def bad(found: str, fix: str = "") -> Answer:
    """Something needed is missing."""
    return Answer(Level.BAD, found, fix)


def not_tried() -> Answer:
    """An ordinary user may not try it, which says nothing of the machine."""
    return Answer(Level.NOTE, f"not tried: user {os.geteuid()} may not", "ask again as root")


@dataclass(frozen=True, slots=True)
class Question:
    """One line: name is for scripts and stays as it is, title for people."""

    name: str
    title: str
    ask: Callable[[], Answer]
    needed: bool = False  # whoever cannot even tell has a bad line, and no note


@dataclass(frozen=True, slots=True)
class Line:
    """A question with its answer."""

    name: str
    title: str
    level: Level
    found: str
    fix: str


@dataclass(slots=True)
class _Asked:
    question: Question
    pid: int
    pipe: int
    said: bytes = b""


def ask(
    questions: Sequence[Question],
    *,
    patience: float = PATIENCE,
    waiting: Callable[[Sequence[str]], None] = lambda _: None,
) -> list[Line]:
    """The answers, in the order of the questions; it takes patience seconds at most.

    waiting is told every second whose answers are still to come. The calling process must
    have one thread, because it forks.
    """
    asked: list[_Asked] = []
    try:
        for question in questions:
            asked.append(_fork(question))  # noqa: PERF401 - those before a failure are ended
        _listen(asked, patience, waiting)
        return [_line(one) for one in asked]
    finally:
        for one in asked:
            _end(one)


def _fork(question: Question) -> _Asked:
    pipe, answering = os.pipe()
    parent = os.getpid()
    try:
        pid = os.fork()
        if pid == 0:
            _be_asked(question, answering, parent)
    except BaseException:
        os.close(pipe)
        raise
    finally:
        os.close(answering)
    with contextlib.suppress(OSError):  # the child does the same: whoever is first
        os.setpgid(pid, pid)
    return _Asked(question, pid, pipe)


def _be_asked(question: Question, answering: int, parent: int) -> NoReturn:
    """What the child does; it never returns into the code it was forked from."""
    try:
        # a group of its own, so that what the question starts can be ended with it
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        trial.end_with_parent()
        if os.getppid() != parent:
            os._exit(0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        answer = question.ask()
    except NsmError as failure:
        answer = _without(question, failure.message, failure.hint)
    except BaseException as failure:  # noqa: BLE001 - whatever it is, it is this line's alone
        told = f"cannot be told: {type(failure).__name__}: {failure}"
        answer = _without(question, told, FAULT)
    try:
        os.write(answering, json.dumps(asdict(answer)).encode()[: 1 << 16])
    finally:
        os._exit(0)


def _listen(
    asked: Sequence[_Asked], patience: float, waiting: Callable[[Sequence[str]], None]
) -> None:
    end = time.monotonic() + patience
    tell = time.monotonic() + 1.0
    open_ = {one.pipe: one for one in asked}
    poll = select.poll()
    for pipe in open_:
        poll.register(pipe, select.POLLIN)
    while open_ and (now := time.monotonic()) < end:
        if now >= tell:
            waiting([one.question.title for one in open_.values()])
            tell = now + 1.0
        for pipe, _ in poll.poll((min(end, tell) - now) * 1000):
            more = os.read(pipe, 1 << 16)
            open_[pipe].said += more
            if not more:
                poll.unregister(pipe)
                del open_[pipe]
    for one in open_.values():
        # which says nothing of what was asked for: this machine has much to do
        answer = note(f"{LATE} {patience:g} s", when_idle())
        one.said = json.dumps(asdict(answer)).encode()


def when_idle() -> str:
    """What to do about an answer that did not come in time."""
    return f"ask again when this machine has less to do (load {os.getloadavg()[0]:.1f})"


def _line(one: _Asked) -> Line:
    question = one.question
    try:
        said = json.loads(one.said)
        answer = Answer(Level(said["level"]), said["found"], said["fix"])
    except ValueError:
        answer = _without(
            question, "the process that looked died", "ask again; dmesg may say who killed it"
        )
    return Line(question.name, question.title, answer.level, answer.found, answer.fix)


def _without(question: Question, why: str, fix: str = "") -> Answer:
    return Answer(Level.BAD if question.needed else Level.NOTE, " ".join(why.split()), fix)


def _end(one: _Asked) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(one.pid, signal.SIGKILL)
    # one that waits for a dead disk does not obey: init reaps it some day
    if _is_left(one.pipe, 0.2):
        os.waitpid(one.pid, 0)
    os.close(one.pipe)


def _is_left(pipe: int, patience: float) -> bool:
    """Whether everybody who could write into a pipe has closed it, as who ends does."""
    end = time.monotonic() + patience
    while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
        if not os.read(pipe, 1 << 16):
            return True
    return False
