"""Runs a command, or a shell, in a kernel that has WireGuard, netem, VRF and VLAN.

    make lane                                            a shell
    make lane ARGS="ip link add wg0 type wireguard"      a command
    python -m tests.lane [OPTION...] [--] [COMMAND [ARG...]]

It is user-mode Linux: an ordinary program, one processor, no other machine. Its file system is
the host's, at the same paths; what is written there is gone afterwards, except in a share. It has
no network but its own. The environment goes in, with LANE_GUEST=1. The first time it is built,
from Debian's kernel source, in minutes.

Exit code: the command's; or 2 asked wrongly, 3 this machine cannot have it, 124 over the time,
125 the kernel ended before the command did, 126 it could not be built, 130 Ctrl-C.
"""

import argparse
import contextlib
import os
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

from tests.lane.guest import MEMORY, NEVER_REPORTED, Guest
from tests.lane.kernel import LaneError, built

LIMIT = 600.0  # seconds


def main() -> int:
    """Build if need be, run, and pass the exit code on."""
    asked = options()
    command = asked.command[1:] if asked.command[:1] == ["--"] else asked.command
    terminal = not command
    if terminal and not (sys.stdin.isatty() and sys.stdout.isatty()):
        complain("a shell needs a terminal; say a COMMAND")
        return 2
    if os.geteuid() != 0:
        complain("needs root, for a namespace of processes: sudo make lane")
        return 3
    try:
        kernel = built(say)
        if asked.share:
            asked.share.mkdir(parents=True, exist_ok=True)
        with (
            terminal_kept() if terminal else contextlib.nullcontext(),
            Guest(
                kernel, command or shell(), share=asked.share, memory=asked.memory,
                boot=asked.boot, terminal=terminal,
            ) as guest,
        ):  # fmt: skip
            return status_of(
                guest, asked.time or (None if terminal else LIMIT), verbose=asked.verbose
            )
    except LaneError as no:
        complain(str(no))
        return no.status
    except KeyboardInterrupt:
        return 130


def status_of(guest: Guest, limit: float | None, *, verbose: bool) -> int:
    """Wait for the guest, and say why it has no exit code of the command's."""
    status = guest.wait(limit)
    if status is None:
        complain(f"stopped after {limit:g} s")
        return 124
    if status == NEVER_REPORTED:
        complain(f"the kernel ended before the command did; it said last:\n{guest.console(40)}")
    elif verbose:
        sys.stderr.write(guest.console())
    return status


def options() -> argparse.Namespace:
    """What is asked on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lane",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-o", dest="share", metavar="DIR", type=Path, help="what is written there stays; $LANE_OUT")
    add("-t", dest="time", metavar="SECONDS", type=float, help="limit (600; none for a shell)")
    add("-m", dest="memory", metavar="MIB", type=int, default=MEMORY, help=f"memory ({MEMORY})")
    add("-b", dest="boot", metavar="ARG", action="append", default=[],
        help="for the kernel's command line, such as ipv6.disable=1")  # fmt: skip
    add("-v", dest="verbose", action="store_true", help="what the kernel said, to stderr")
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    return parser.parse_args()


def shell() -> list[str]:
    """A shell in a terminal of the size this one has."""
    size = os.get_terminal_size()
    return ["sh", "-c", f"stty rows {size.lines} columns {size.columns}; exec bash -i"]


@contextlib.contextmanager
def terminal_kept() -> Iterator[None]:
    """The terminal is afterwards as it was, also when the kernel is killed, which makes it raw."""
    before = termios.tcgetattr(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def say(line: str) -> None:
    """A line of progress; not on stdout, which is the command's."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def complain(message: str) -> None:
    """Why not."""
    say(f"lane: {message}")


if __name__ == "__main__":
    sys.exit(main())
