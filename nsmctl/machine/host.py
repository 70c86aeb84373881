"""The machine around the mesh: its Python, its clock, its disks, its fences."""

import contextlib
import ctypes
import os
import platform
import re
import struct
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Final

from labs.units import people, since
from nsm.errors import NsmError
from nsm.kernel import trial
from nsmctl.machine.asking import Answer, bad, not_tried, note, ok

STATE: Final = "/var/lib/vwire"
RUN: Final = "/run"
ROOM: Final = {STATE: 5_000_000, RUN: 20_000_000}  # bytes; a lab has 0.2 MB, and its logs grow
FILES: Final = 1000  # which there must be room for; a lab has 70
SKEW: Final = 300.0  # seconds a file may be ahead of the clock that was set right since
NOBODY: Final = 65534
WITHOUT: Final = "without root, nothing can be tried here"
_GATES: Final = (  # setting, how it shuts them out, how it lets them in
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
    ("kernel/unprivileged_userns_clone", "0", "1"),
    ("user/max_user_namespaces", "0", "10000"),
)
_STA_UNSYNC: Final = 0x40
_TIMEX: Final = 208  # bytes of struct timex
_TIMEX_STATUS: Final = struct.Struct("=I4xqqqqi")
_REQUIREMENT: Final = re.compile(r"([A-Za-z0-9._-]+)\s*([^;]*)(;.*)?")
_BOUND: Final = re.compile(r"(==|>=|<)\s*([0-9.]+)")
_libc = ctypes.CDLL(None, use_errno=True)


def python() -> Answer:
    """This Python, and the packages it has to have."""
    version = platform.python_version()
    try:
        wanted = metadata.requires("vwire") or []
    except metadata.PackageNotFoundError:
        return note(f"{version}; vwire is not installed, so what it needs is not known",
                    "make setup, or pip install vwire")  # fmt: skip
    own = [match for one in wanted if (match := _REQUIREMENT.fullmatch(one)) and not match[3]]
    wrong = [told for match in own if (told := _unfit(match[1], match[2]))]
    if wrong:
        return bad(f"{version}, but {'; '.join(wrong)}", "install vwire again: make setup, or pip")
    return ok(f"{version}, and the {len(own)} packages it needs")


def _unfit(name: str, bounds: str) -> str:
    """What is wrong with an installed package; empty if nothing."""
    try:
        there = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is missing"
    for sign, bound in _BOUND.findall(bounds):
        have, want = _numbers(there), _numbers(bound)
        fits = {"==": have == want, ">=": have >= want, "<": have < want}[sign]
        if not fits:
            return f"{name} is {there}, not {sign}{bound}"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    found = [int(part) for part in re.match(r"[0-9.]*", version)[0].split(".") if part]  # type: ignore[index]
    return (*found, *[0] * (6 - len(found)))


def kernel() -> Answer:
    """This kernel, and whether it lets processes be held, which labs and wires stand on."""
    release = platform.release()
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as failure:
        return bad(
            f"{release}, which has no pidfd for us: {failure.strerror}",
            "Linux 5.3 or newer; in a container, a seccomp profile that lets pidfd_open pass",
        )
    return ok(release)


def clock() -> Answer:
    """Whether the clock can be right, and whether somebody keeps it right."""
    now = time.time()
    for path in _witnesses():
        with contextlib.suppress(OSError):
            ahead = os.stat(path).st_mtime - now
            if ahead > SKEW:
                return bad(
                    f"behind by {since(ahead)} or more: {path} was written later",
                    "timedatectl set-ntp true; certificates are not valid before their time",
                )
    status = _kernel_clock()
    if status is None:
        return note("whether it is kept right cannot be asked here", "on the host: timedatectl")
    if status & _STA_UNSYNC:
        return note(
            f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime(now))} UTC, and nobody keeps it right",
            "timedatectl set-ntp true, or install chrony",
        )
    return ok("kept right")


def _witnesses() -> Iterator[str]:
    """Files that were written in the past: our own code, and what the issuer and registry keep."""
    yield __file__
    for folder, _, names in os.walk(STATE):
        yield from (os.path.join(folder, name) for name in sorted(names)[:100])


def _kernel_clock() -> int | None:
    """The kernel's status bits of its clock; None if it does not say."""
    buffer = ctypes.create_string_buffer(_TIMEX)
    if _libc.adjtimex(buffer) < 0:
        return None
    return int(_TIMEX_STATUS.unpack_from(buffer.raw)[-1])


def state_disk() -> Answer:
    """Where the issuer keeps its authority."""
    return _disk(STATE)


def run_disk() -> Answer:
    """Where labs and sockets are."""
    return _disk(RUN)


def _disk(path: str) -> Answer:
    there = path
    while not os.path.exists(there):
        there = os.path.dirname(there)
    found = os.statvfs(there)
    free = found.f_bavail * found.f_frsize
    if found.f_flag & os.ST_RDONLY:
        return bad(f"{there} cannot be written", "mount -o remount,rw its file system")
    if free < ROOM[path]:
        return bad(f"{people(free)} free, {people(ROOM[path])} needed", f"make room below {there}")
    if found.f_files and found.f_favail < FILES:
        return bad(
            f"room for {found.f_favail} more files, {FILES} needed", f"remove some in {there}"
        )
    return ok(f"{people(free)} free")


def cgroup() -> Answer:
    """Whether a process can be moved to the root of the cgroups; this one is, and ends soon."""
    with open("/proc/self/mounts") as file:
        mounts = [line.split() for line in file]
    place = next((where for _, where, kind, *_ in mounts if kind == "cgroup2"), None)
    if place is None:
        return note("no cgroup v2: what a service starts ends with it", "boot with cgroup v2")
    try:
        with open(f"{place}/cgroup.procs", "w") as members:
            members.write("0")
    except OSError as failure:
        if os.geteuid() != 0:
            return not_tried()
        return note(
            f"nothing can be moved to {place}: {failure.strerror}",
            "in a container, mount cgroups read-write",
        )
    return ok(f"wireguard-go goes to {place}")


def user_namespaces() -> Answer:
    """Whether an ordinary user may make namespaces, in which this command tries without root."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    try:
        trial.apart()
        trial.veth()
    except NsmError as refusal:
        for setting, shut, opened in _GATES:
            with contextlib.suppress(OSError), open(f"/proc/sys/{setting}") as file:
                if file.read().strip() == shut:
                    name = setting.replace("/", ".")
                    return note(
                        f"closed to ordinary users ({name}): {WITHOUT}",
                        f"sysctl -w {name}={opened}",
                    )
        return note(
            f"closed to ordinary users: {WITHOUT}; {refusal.message}",
            "let this container make user namespaces",
        )
    return ok("open to ordinary users")
