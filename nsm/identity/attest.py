"""Which process is at the other end of a unix socket, as the kernel tells it.

The kernel says who connected (SO_PEERCRED) and hands out a handle to that very
process (SO_PEERPIDFD), both taken when the connection is accepted. What /proc says
about it is believed only if the process was alive after it was read: then its
number cannot have gone to another one meanwhile.
"""

import errno
import hashlib
import os
import re
import select
import socket
import struct
from dataclasses import dataclass, replace

from nsm.errors import DeniedError

SO_PEERPIDFD = getattr(socket, "SO_PEERPIDFD", 77)  # Linux 6.5; asm-generic
MAX_PROC = 64 * 1024  # bytes of a file in /proc
MAX_PROGRAM = 2 * 1024 * 1024 * 1024  # bytes of a program whose digest is taken

# Programs that run other programs' text: their digest says nothing about who calls.
_INTERPRETERS = re.compile(
    r"(python|pypy|perl|ruby|lua|luajit|node|nodejs|deno|bun|php|java|jshell|guile|tclsh|wish|"
    r"(ba|da|k|mk|z|c|tc|fi|a)?sh|busybox|toybox|gawk|mawk|awk|sed|emacs|vim|gdb|erl|beam\.smp|"
    r"ld-linux.*|ld-musl.*|qemu-.*|wine.*|dotnet|mono|R|julia|ghci|ocaml|scala|env|sudo|strace)"
    r"(-?[0-9][.0-9a-z]*)?(-dbg|-static)?",
    re.ASCII,
)

_MAX_DIGESTS = 256
_digests: dict[tuple[int, int, int, int], str] = {}  # device, inode, size, ctime -> sha256


@dataclass(frozen=True, slots=True)
class Connected:
    """Who connected, as the kernel noted it then. `pidfd` is closed with the connection."""

    pid: int
    uid: int
    gid: int
    pidfd: int  # -1 where the kernel has none to give


@dataclass(frozen=True, slots=True)
class Process:
    """What was seen of the process that connected; what could not be read is None."""

    pid: int
    uid: int
    gid: int
    netns: tuple[int, int] | None  # device, inode
    cgroups: tuple[str, ...] | None  # one path for each hierarchy
    program: str | None
    digest: str | None = None  # sha256 in hex, of a compiled program, if it was wanted
    why_no_digest: str = ""

    def __str__(self) -> str:
        """For people: what a registration entry could say."""
        netns = f"net:[{self.netns[1]}]" if self.netns else "one that cannot be read"
        paths = [path for path in self.cgroups or () if path != "/"]
        return (
            f"pid {self.pid}, uid {self.uid}, gid {self.gid}, network namespace {netns}, "
            f"cgroup {', '.join(dict.fromkeys(paths))[:512] or '/'}, "
            f"program {(self.program or 'that cannot be read')[:512]!r}"
            + (f", sha256 {self.digest}" if self.digest else "")
            + (f" ({self.why_no_digest})" if self.why_no_digest else "")
        )


def connected(sock: socket.socket) -> Connected:
    """Who connected to sock, an accepted unix socket. The caller closes `pidfd`."""
    size = struct.calcsize("3i")
    pid, uid, gid = struct.unpack(
        "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as why:  # before Linux 6.5 there is none; else the process is already gone
        pidfd = _opened(pid) if why.errno == errno.ENOPROTOOPT else -1
    return Connected(pid, uid, gid, pidfd)


def attest(who: Connected, *, digest: bool) -> Process:
    """What /proc says about who, proven to be about that process. Blocks.

    digest: whether to read the whole program too. Raises DeniedError if the
    process is gone or cannot be seen from here.
    """
    if who.pid <= 0:
        raise DeniedError(
            "the process that connected is in a process namespace that cannot be seen from here",
            hint="run the issuer in the host's process namespace",
        )
    gone = DeniedError(f"the process that connected (pid {who.pid}) has ended")
    try:
        proc = os.open(f"/proc/{who.pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise gone from None
    try:
        status = _text(proc, "status")
        program = _program(proc)
        process = Process(
            pid=who.pid,
            uid=who.uid,
            gid=who.gid,
            netns=_netns(proc),
            cgroups=_cgroups(proc),
            program=program,
        )
        if digest:
            found, why = _digest(proc, program)
            process = replace(process, digest=found, why_no_digest=why)
    finally:
        os.close(proc)
    if _ended(who):
        raise gone
    if not _is_of(status, who.uid):
        raise DeniedError(
            f"the process that connected (pid {who.pid}) did so as user {who.uid} and is another's",
            hint="ask for an identity before or after changing the user, not in between",
        )
    return process


def _opened(pid: int) -> int:
    try:
        return os.pidfd_open(pid) if pid > 0 else -1
    except OSError:
        return -1


def _ended(who: Connected) -> bool:
    """Whether the process has ended; a pidfd becomes readable then."""
    if who.pidfd < 0:
        return True  # nothing proves that the number is still that process's
    poll = select.poll()
    try:
        poll.register(who.pidfd, select.POLLIN)
        return bool(poll.poll(0))
    except OSError:
        return True


def _is_of(status: str | None, uid: int) -> bool:
    """Whether one of a process's user ids is uid: where the handle was taken after accepting,
    a process of somebody else that got the number before is found out by this."""
    found = re.search(r"^Uid:\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)$", status or "", re.MULTILINE)
    return found is not None and str(uid) in found.groups()


def _netns(proc: int) -> tuple[int, int] | None:
    try:
        status = os.stat("ns/net", dir_fd=proc)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _cgroups(proc: int) -> tuple[str, ...] | None:
    text = _text(proc, "cgroup")
    if text is None:
        return None
    return tuple(dict.fromkeys(line.split(":", 2)[2] for line in text.splitlines() if ":" in line))


def _program(proc: int) -> str | None:
    try:
        return os.readlink("exe", dir_fd=proc)
    except OSError:
        return None


def _digest(proc: int, program: str | None) -> tuple[str | None, str]:
    name = os.path.basename((program or "").removesuffix(" (deleted)"))
    if _INTERPRETERS.fullmatch(name):
        return None, f"{name} runs what others wrote: its digest would say nothing"
    try:
        fd = os.open("exe", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    except OSError as why:
        return None, f"its program cannot be read: {why.strerror}"
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if file.read(4) != b"\x7fELF":
            return None, "its program is not a compiled one"
        if status.st_size > MAX_PROGRAM:
            return None, f"its program has over {MAX_PROGRAM} bytes"
        version = (status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)
        if version not in _digests:
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if len(_digests) >= _MAX_DIGESTS:
                _digests.clear()
            _digests[version] = found
        return _digests[version], ""


def _text(proc: int, name: str) -> str | None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        with os.fdopen(fd, "rb") as file:
            return file.read(MAX_PROC).decode(errors="replace")
    except OSError:
        return None
