"""What a test, or a whole run of them, must leave as it found it."""

import fcntl
import functools
import gc
import glob
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

LOCK = "/tmp/vwire-tests.lock"
OURS = (
    "/tmp/vwire*",
    "/run/vwire",
    "/run/vwire/*",
    "/run/vwire/*/*",
    "/run/wireguard/*",
    "/etc/netns/*",
)
Things = Mapping[str, "Counter[Hashable]"]


def of_process() -> Things:
    """What this process holds: file descriptors, threads, child processes."""
    return {
        "file descriptor": Counter(_descriptors()),
        "thread": Counter(_threads()),
        "child process": Counter(_children()),
    }


def of_machine() -> Things:
    """What any process may leave on the machine: namespaces, links, files of ours."""
    return {
        "network namespace": Counter(_listed("/run/netns")),
        "link of the host": Counter(name for _, name in socket.if_nameindex()),
        "file": Counter(path for pattern in OURS for path in glob.glob(pattern) if path != LOCK),
    }


def left(look: Callable[[], Things], before: Things, *, patience: float = 2.0) -> list[str]:
    """What is there now and was not before, a line each, once patience seconds are over.

    The kernel takes namespaces and their links away in the background, and a
    thread that was told to end needs its moment; whatever they leave stays.
    """
    end = time.monotonic() + patience
    while True:
        now = look()
        more = [(what, thing) for what in now for thing in now[what] - before[what]]
        less = [(what, thing) for what in now for thing in before[what] - now[what]]
        if not more and not _matters(less):
            return []
        if time.monotonic() > end:
            return [
                *(f"left over: {what} {thing}" for what, thing in more),
                *(f"taken away: {what} {thing}" for what, thing in _matters(less)),
            ]
        gc.collect()  # what only a reference cycle keeps is not ours to count
        time.sleep(0.02)


def _matters(less: list[tuple[str, Hashable]]) -> list[tuple[str, Hashable]]:
    return [
        (what, thing) for what, thing in less if what in {"network namespace", "link of the host"}
    ]


def _listed(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []


def _descriptors() -> Iterator[str]:
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue  # the one that lists
        if "grpc" in sys.modules and target in {"anon_inode:[eventpoll]", "anon_inode:[eventfd]"}:
            continue  # grpcio keeps some from its first call to the process's end
        yield f"{number} -> {target}"


def _threads() -> Iterator[str]:
    for thread in threading.enumerate():
        if "_poll_wrapper" not in thread.name:  # grpcio's one, likewise
            yield thread.name


def _children() -> Iterator[str]:
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/children") as file:
                pids = file.read().split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile, and its children are another thread's now
        for pid in pids:
            yield f"{pid} ({_command(pid)})"


def _command(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip() or "a zombie"
    except OSError:
        return "gone"


class Alone:
    """Whether no other run of tests goes on here, whose work would look like our leak.

    One that has just ended counts too, until `anew`: it took things away meanwhile.
    """

    def __init__(self) -> None:
        self._so_far = True
        self._file = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def __bool__(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._so_far = False
        finally:
            fcntl.flock(self._file, fcntl.LOCK_SH)
        return self._so_far

    def anew(self) -> None:
        """From now on it counts; company there is at this moment counts already."""
        self._so_far = True
        bool(self)


@functools.cache
def alone() -> Alone:
    """This process's own, until it ends: a second one would be company to the first."""
    return Alone()


VOLATILE = ("valid_life_time", "preferred_life_time", "promiscuity", "num_rx_queues")


def host() -> Mapping[str, Any]:
    """The host's own network: links, addresses, routes, rules, nftables, sysctls."""
    if shutil.which("ip") is None:
        return {}  # not Linux, or nothing that could change it
    found = {
        f"ip {command}": _json("ip", "-j", *command.split())
        for command in (
            "-d link",
            "address",
            "-4 route show table all",
            "-6 route show table all",
            "-4 rule",
            "-6 rule",
            "neighbour show nud permanent",
        )
    }
    if shutil.which("nft") and os.geteuid() == 0:
        found["nft list ruleset"] = _json("nft", "-j", "list", "ruleset")
    return {**found, **_sysctls()}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, a line each; of lists what went and what came."""
    return [
        f"{key}: {_difference(before.get(key), now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _difference(was: Any, now: Any) -> str:
    if isinstance(was, list) and isinstance(now, list):
        gone = [one for one in was if one not in now]
        come = [one for one in now if one not in was]
        if gone or come:
            return f"gone {_short(gone)}, come {_short(come)}"
    return f"was {_short(was)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 2000 else f"{text[:2000]}…"


def _json(*command: str) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return _settled(json.loads(done.stdout or "[]"))


def _settled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _settled(one) for key, one in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [_settled(one) for one in value]
    return value


def _sysctls() -> Mapping[str, str]:
    found = {}
    for folder, _, files in os.walk("/proc/sys/net"):
        for name in files:
            path = os.path.join(folder, name)
            if name.endswith("_conntrack_count"):
                continue
            try:
                with open(path) as file:
                    found[path] = file.read()
            except OSError:
                continue  # write-only ones, and those of a link that goes meanwhile
    return found
