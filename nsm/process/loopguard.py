"""Tells on whatever can block the event loop's thread. For tests: NSM_LOOP_GUARD=FILE.

Everything that may wait for a disk, the kernel's routing lock or another
process belongs in a thread. While the guard is armed, each such call on the
loop's thread is written to the file, one JSON object a line with what and the
stack; a test asserts that the file is empty.

It sees what Python audits: open files, directories, SQLite, netlink sockets
made, bound or sent on, processes started, names resolved. It cannot see a C
function called through ctypes, setns among them. But whoever enters a namespace
opens its file or makes a socket in it, and both are seen: the first as `open`,
the second because the thread is not in the namespace it was armed in. Nor can
it see SQLite statements: Python ties a connection to the thread that opened it.
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

BLOCKING = frozenset(
    (
        "ctypes.dlopen",
        "fcntl.flock",
        "fcntl.lockf",
        "open",
        "os.chmod",
        "os.chown",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.link",
        "os.listdir",
        "os.mkdir",
        "os.posix_spawn",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.scandir",
        "os.symlink",
        "os.system",
        "os.truncate",
        "os.utime",
        "socket.getaddrinfo",
        "socket.gethostbyaddr",
        "socket.gethostbyname",
        "sqlite3.connect",
        "subprocess.Popen",
    )
)
NETLINK = frozenset(("socket.bind", "socket.connect", "socket.sendmsg", "socket.sendto"))
NAMESPACE = "/proc/thread-self/ns/net"

# Python itself reads files to import a module late and to show the lines of a traceback.
PYTHONS_OWN = ("<frozen importlib", "/linecache.py", "/tokenize.py")


class LoopGuard:
    """Watches the thread that makes it, from `arm` to `disarm`, and writes into path.

    An audit hook cannot be taken away again, so a process makes at most one.
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._thread = threading.get_ident()
        self._armed = False
        self._home = os.stat(NAMESPACE).st_ino
        sys.addaudithook(self._heard)

    def arm(self) -> None:
        """Start to watch; before, a process may read what it needs to start."""
        self._armed = True

    def disarm(self) -> None:
        """Stop to watch; a process that ends may clean up."""
        self._armed = False

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._armed or threading.get_ident() != self._thread:
            return
        if event in BLOCKING:
            what = f"{event} {arguments[0]!r}" if arguments else event
        elif event == "socket.__new__":
            _, family, *_ = arguments
            if family == socket.AF_NETLINK:
                what = "a netlink socket was made"
            elif os.stat(NAMESPACE).st_ino != self._home:
                what = "a socket was made in another network namespace"
            else:
                return
        elif event in NETLINK and arguments[0].family == socket.AF_NETLINK:
            what = f"{event} on a netlink socket"
        else:
            return
        stack = list(_stack(sys._getframe(1)))  # noqa: SLF001 - traceback would read files
        if not any(own in line for line in stack for own in PYTHONS_OWN):
            line = json.dumps({"what": what[:500], "stack": stack})
            os.write(self._file, line.encode() + b"\n")


def _stack(frame: FrameType | None) -> Iterator[str]:
    """Where we are, innermost first, without reading any source."""
    while frame is not None:
        code = frame.f_code
        yield f"{code.co_filename}:{frame.f_lineno} {code.co_qualname}"
        frame = frame.f_back
