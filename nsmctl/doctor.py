"""`nsmctl doctor`: what this machine can do, a line each, with what to do about it."""

import contextlib
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.text import Text

from nsmctl import show

if TYPE_CHECKING:  # what asks is Linux's
    from nsmctl.machine.asking import Line

Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
STYLES: Final = {"ok": "green", "note": "yellow", "bad": "red"}
LEVEL: Final = 6  # columns


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog="Example: sudo nsmctl doctor")(doctor)


def doctor(json_: Json = False) -> None:
    """What this machine can do, each line with what to do where something is missing.

    Kernel features are tried, in namespaces of their own; nothing stays. A line is ok, or a
    note where something optional is missing, or bad: then the exit code is 1. Without root
    it tries what it may and says what it could not.
    """
    if sys.platform != "linux":
        raise show.MachineCannotError("this asks a Linux machine", hint="run it in a Linux VM")
    from labs.units import count
    from nsmctl.machine import asking, questions
    from nsmctl.machine.asking import Level

    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        telling: list[Callable[[str], None]] = []

        def waiting(titles: Sequence[str]) -> None:
            # not before all questions are forked: what shows progress may be a thread
            if not telling:
                telling.append(stack.enter_context(show.progress()))
            telling[0](f"no answer yet: {', '.join(titles)}")

        lines = asking.ask(questions.ALL, waiting=waiting)
    took = time.monotonic() - start
    bad, notes = (sum(line.level is one for line in lines) for one in (Level.BAD, Level.NOTE))
    if json_:
        show.as_json(
            {
                "ready": not bad,
                "bad": bad,
                "notes": notes,
                "seconds": round(took, 3),
                "lines": lines,
            }
        )
    else:
        _print(lines)
        told = f"{bad} bad" if bad else "everything needed is here"
        if not bad and any(line.found.startswith(asking.LATE) for line in lines):
            told = "nothing bad among what was answered in time"
        show.line(f"{told}, {count(notes, 'note')}" if notes else told)
    show.finish(show.FAILED if bad else show.OK)


def _print(lines: "Sequence[Line]") -> None:
    out = show.console()
    first = max(len(line.title) for line in lines)
    indent = " " * (LEVEL + first + 2)
    for line in lines:
        whole = f"{line.found}  fix: {line.fix}" if line.fix else line.found
        if len(indent) + len(whole) <= out.width:
            parts = [whole]
        else:
            parts = [line.found, f"fix: {line.fix}"] if line.fix else [line.found]
        # what is to be typed stays whole as far as a line is long
        text = "\n".join(
            textwrap.fill(
                part, max(out.width, len(indent) + 20), initial_indent=indent,
                subsequent_indent=indent, break_long_words=False, break_on_hyphens=False,
            )
            for part in parts
        )  # fmt: skip
        head = Text(f"{line.level:<{LEVEL}}", style=STYLES[line.level])
        out.print(head + f"{line.title:<{first}}  {text[len(indent) :]}", soft_wrap=True)
