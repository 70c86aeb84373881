"""What people see: tables on a terminal, plain lines in a pipe, JSON for scripts.

Results go to standard output, progress and errors to standard error, so that a
pipe holds results only. Without a terminal, or with NO_COLOR, nothing but text.
"""

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, is_dataclass
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from nsm.errors import NsmError

OK, FAILED, MACHINE_CANNOT = 0, 1, 3  # exit codes; the rest follow from errors

# control characters but for lines and tabs, and what turns the direction of reading
_STEERING = {
    number: f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
    for number in (*range(9), *range(11, 32), *range(127, 160), *range(0x2028, 0x202F),
                   *range(0x2066, 0x206A))
}  # fmt: skip
NEEDED = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}  # cables; namespaces


class MachineCannotError(NsmError):
    """This machine, or this user on it, cannot do what was asked."""


class _Aside(Console):
    """Standard error, on which what is being done is told and never depends."""

    def on_broken_pipe(self) -> None:
        """Nobody reads on: say no more. Rich's own would end the program, in the midst of it."""
        self.quiet = True


def console(*, stderr: bool = False) -> Console:
    """Where to write; styles only where somebody can see them."""
    kind = _Aside if stderr else Console
    # an address with `:1234:` in it is no emoji, and `[x]` no style
    made = kind(stderr=stderr, highlight=False, emoji=False, markup=False)
    if made.no_color or not made.is_terminal:
        return kind(
            stderr=stderr, highlight=False, emoji=False, markup=False,
            force_terminal=False, no_color=True,
        )  # fmt: skip
    return made


def line(text: str) -> None:
    """One line of result."""
    console().print(visible(text), soft_wrap=True)


def warning(text: str) -> None:
    """A line on stderr, beside what was asked for."""
    console(stderr=True).print(visible(text), soft_wrap=True)


def visible(text: str) -> str:
    """The text with what would steer a terminal as it is written: names and reasons come from
    others, of other domains too.
    """
    return text.translate(_STEERING)


def as_json(value: object) -> None:
    """The result for a script."""
    sys.stdout.write(json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON has them; not what of a message nobody here
    can read, which is bytes."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table; columns that start with `>` are numbers."""
    # as narrow as can be: ten columns are to fit into 80
    made = Table(
        title=title or None,
        title_justify="left",
        box=None,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        right = column.startswith(">")
        name = column.removeprefix(">")
        made.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(visible(str(cell))) for cell in row))
    console().print(made)


def refusal(failure: NsmError) -> dict[str, str]:
    """An error for a script."""
    notes = {"notes": "; ".join(noted)} if (noted := _notes(failure)) else {}
    return {"error": failure.message, "hint": failure.hint, "code": failure.code.name, **notes}


def _notes(failure: NsmError) -> list[str]:
    """What could not be taken back."""
    return list(getattr(failure, "__notes__", ()))


def error(failure: NsmError, *, json_wanted: bool) -> None:
    """What went wrong and what to do, in the form the caller reads."""
    if json_wanted:
        as_json(refusal(failure))
        return
    out = console(stderr=True)
    out.print(visible(failure.message), style="red", soft_wrap=True)
    for note in _notes(failure):
        out.print(f"  {visible(note)}", style="red", soft_wrap=True)
    if failure.hint:
        out.print(f"  {visible(failure.hint)}", soft_wrap=True)


def exit_code(failure: NsmError) -> int:
    """0 ok, 1 no, 2 asked wrongly, 3 this machine cannot, 4 not running, 130 Ctrl-C."""
    if isinstance(failure, MachineCannotError):
        return MACHINE_CANNOT
    from nsm.process.run import exit_code as of_error  # costs a tenth of a second

    return of_error(failure)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Say what is being done while it takes time: a moving line, or lines where nothing moves.

    A terminal that is closed meanwhile takes nothing more; what is being done goes on.
    """
    out = console(stderr=True)
    start = time.monotonic()
    with ExitStack() as stack:
        status: Status | None = None
        if out.is_terminal:
            with suppress(OSError):
                status = out.status("...")
                status.start()
                stack.callback(_stopped, status)

        def tell(text: str) -> None:
            with suppress(OSError):
                if status:
                    status.update(Text(text))  # a string it would take for markup
                else:
                    seconds = time.monotonic() - start
                    out.print(f"{seconds:5.1f} s  {text}", soft_wrap=True)

        yield tell


def _stopped(status: Status) -> None:
    with suppress(OSError):
        status.stop()


@contextmanager
def taking_back() -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or closed terminal ends the block; later ones only say wait.

    What the block has to take back on its way out is taken back in full.
    """
    heard = 0

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal heard
        heard += 1
        if heard == 1:
            raise KeyboardInterrupt
        os.write(2, b"still taking everything back, a moment\n")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def need_root() -> None:
    """Raises MachineCannotError with the line to type instead."""
    if sys.platform != "linux":
        raise MachineCannotError(
            "this needs Linux's network namespaces", hint="run it in a Linux VM"
        )
    with open("/proc/self/status") as file:
        held = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    missing = [name for name, bit in NEEDED.items() if not held >> bit & 1]
    if os.geteuid() == 0 and missing:
        raise MachineCannotError(
            f"this root lacks {' and '.join(missing)}",
            hint="give them to the container or service it runs in",
        )
    if os.geteuid() != 0:
        raise MachineCannotError(f"needs CAP_NET_ADMIN and CAP_SYS_ADMIN: {again_as_root()}")


def again_as_root() -> str:
    """This very command, as root has to type it."""
    return shlex.join(["sudo", *_typed(), *sys.argv[1:]])


def _typed() -> list[str]:
    """The words by which this command is found again, whatever another user's PATH is."""
    program = sys.argv[0]
    if os.path.basename(program) == "__main__.py":
        return [sys.executable, "-P", "-m", "nsmctl"]
    return [program if os.path.dirname(program) else "nsmctl"]


def finish(code: int) -> None:
    """End the command with an exit code."""
    raise typer.Exit(code)
