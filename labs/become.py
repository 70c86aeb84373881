"""Turning a forked child into what an exec'd program of another group would be.

Used between fork and the program's first line, in a process with one thread.
What is set here is what exec would have reset, and what a service manager would
have set before it.
"""

import ctypes
import os
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

from nsm.names.resolvconf import NETNS

_CLONE_NEWNS = 0x0002_0000
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x8_0000
_PR_SET_DUMPABLE, _PR_SET_NAME, _PR_CAPBSET_DROP = 4, 15, 24
_CAPABILITY_VERSION_3: Final = 0x2008_0522
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


def at_home(namespace: str) -> None:
    """See the files of a named namespace as the system's, as `ip netns exec` has it: those in

    /etc/netns/NAME over those in /etc. What is mounted elsewhere meanwhile is seen as well.
    """
    try:
        own = os.listdir(f"{NETNS}/{namespace}")
    except FileNotFoundError:
        return
    _checked(_libc.unshare(_CLONE_NEWNS), "unshare")
    _checked(_libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None), "mount --make-rslave /")
    for name in own:
        path = f"/etc/{name}"
        if os.path.exists(path):  # nobody reads it where there is none
            source = f"{NETNS}/{namespace}/{name}".encode()
            _checked(_libc.mount(source, path.encode(), None, _MS_BIND, None), f"mount {path}")


def default_signals() -> None:
    """Every signal as Python's start leaves it, none blocked.

    A shell's background job ignores SIGINT, nohup SIGHUP; a process of a lab must not
    inherit that.
    """
    for number in signal.valid_signals():
        if number in (signal.SIGKILL, signal.SIGSTOP) or 32 <= number <= 33:
            continue
        if number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_IGN)
        elif number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        elif signal.getsignal(number) != signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def group(gid: int) -> None:
    """Be of that group and no other; the user stays."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    # the change made our /proc files unreadable for others; exec would have undone that
    _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def powerless() -> None:
    """Give up every capability, also for whatever is started later."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for capability in range(last + 1):
        dropped = _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        _checked(dropped, f"PR_CAPBSET_DROP {capability}")
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, struct.pack("=6I", *[0] * 6)), "capset")
    _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def environment(variables: Mapping[str, str]) -> None:
    """These variables and no others."""
    os.environ.clear()  # noqa: TID251 - written for the program that is to come, not read
    os.environ.update(variables)  # noqa: TID251


def told(variables: Mapping[str, str]) -> None:
    """These variables besides those that are there."""
    os.environ.update(variables)  # noqa: TID251 - written for the program that is to come


def program(argv: Sequence[str], variables: Mapping[str, str], name: str) -> NoReturn:
    """Become another program; ends with a sentence in the log if there is none."""
    os.set_inheritable(3, False)  # it does not know of readiness
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvpe(argv[0], list(argv), dict(variables))  # noqa: S606 - the lab's author wrote it
    except OSError as failure:
        sys.stderr.write(f"{name}: {argv[0]}: {failure.strerror}\n")
        sys.stderr.flush()
        os._exit(127)


def titled(module: str, what: str) -> None:
    """Show in `ps` as what it is: `python -P -m MODULE LAB/NODE/PROC`.

    A fork inherits the words of its parent; they are overwritten where they stand,
    as far as there is room.
    """
    short = what.rpartition("/")[2]
    _libc.prctl(_PR_SET_NAME, short.encode()[:15], 0, 0, 0)
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end
    if not 0 < start < end:
        return
    text = f"{os.path.basename(sys.executable)}\0-P\0-m\0{module}\0{what}".encode()
    room = end - start - 1
    ctypes.memmove(start, text[:room].ljust(room + 1, b"\0"), room + 1)
