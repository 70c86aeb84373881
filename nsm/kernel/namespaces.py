"""Working in somebody's network namespace without keeping it alive.

A namespace lives as long as anything refers to it: a process, an open
/proc/PID/ns/net, a socket made inside, a thread left behind. A workload that dies
must take its wires with it, so whatever we open in its namespace is closed with
the batch it was opened for. Between batches a `Namespace` value knows it by number
(nsid, which holds nothing), by cookie (its identity) and by its file handle or inode
(how to find a door again). Inode numbers are reused within seconds: what they find
is believed only if the cookie is the same.

Entering means: a worker thread moves itself, makes a socket there, moves back. The
socket stays where it was made. No fork, which threads would not survive.
"""

import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from typing import Self, TypeVar

from nsm.errors import (
    DeniedError,
    InternalError,
    InvalidError,
    NotFoundError,
    RightsError,
    TakenError,
)
from nsm.kernel import netlink
from nsm.kernel.netlink import NamespaceGoneError, Refusal, Socket
from nsm.kernel.state import OWN, Namespace

NAMED = "/run/netns"
"""Where `ip netns` keeps namespaces that have names."""

_CLONE_NEWNET = 0x4000_0000
_NS_GET_NSTYPE = 0xB703
_SO_NETNS_COOKIE = 71
_AT_EMPTY_PATH = 0x1000
_FD_NSFS_ROOT = -10003  # Linux 6.18: open_by_handle_at without a mount
_MS_BIND, _MS_REC, _MS_SHARED, _MNT_DETACH = 0x1000, 0x4000, 0x100000, 2
_NETNSA_NSID, _NETNSA_FD = 1, 3
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


def _checked(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


class Home:
    """The namespace this process runs in, and the way back to it.

    Opened when the kernel room opens, by one file of our own namespace: that
    pins nobody but ourselves. All methods block and run in worker threads.
    """

    def __init__(self) -> None:
        self.fd = -1
        self.namespace = Namespace(0, OWN)
        self._device = -1

    def __enter__(self) -> Self:
        self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(self.fd)
        self._device = found.st_dev
        self.namespace = Namespace(cookie_here(), OWN, found.st_ino, "this node's namespace")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        self.fd = -1

    def opened(self, fd: int, whose: str) -> int:
        """A new fd, usable for entering, of the namespace fd refers to; the caller closes both.

        fd may be O_PATH, as peers send them, and may be hostile: what is not a network
        namespace is never opened (opening a FIFO hangs, opening a device acts), InvalidError.
        """
        if os.fstat(fd).st_dev != self._device:
            raise InvalidError(
                f"the file {whose} sent is not a network namespace", hint="send /proc/self/ns/net"
            )
        return self._open(f"/proc/self/fd/{fd}", whose)

    def _open(self, path: str, whose: str) -> int:
        made = _opened(path, os.O_RDONLY, whose)
        try:
            network = fcntl.ioctl(made, _NS_GET_NSTYPE) == _CLONE_NEWNET
        except OSError:
            network = False
        if not network:
            os.close(made)
            raise InvalidError(f"what {whose} names is not a network namespace")
        return made

    def opened_pid(self, pid: int, whose: str) -> int:
        """A new fd of the namespace that process is in."""
        return self._open(f"/proc/{pid}/ns/net", whose)

    def opened_path(self, path: str, whose: str) -> int:
        """A new fd of the namespace mounted at path."""
        fd = _opened(path, os.O_PATH, whose)  # looked at before it is really opened
        try:
            return self.opened(fd, whose)
        finally:
            os.close(fd)

    @contextmanager
    def inside(self, fd: int) -> Iterator[None]:
        """The calling thread is in that namespace for as long as the block lasts."""
        _checked(_libc.setns(fd, _CLONE_NEWNET), "setns")
        try:
            yield
        finally:
            try:
                _checked(_libc.setns(self.fd, _CLONE_NEWNET), "setns")
            except OSError as failure:
                raise InternalError(
                    f"a thread cannot leave a workload's namespace: {failure}"
                ) from failure

    def socket(self, fd: int, protocol: int = netlink.ROUTE) -> Socket:
        """A netlink socket in that namespace; the caller closes it within its batch."""
        with self.inside(fd):
            return Socket.here(protocol)

    def known(self, fd: int, name: str) -> Namespace:
        """The value for the namespace behind fd; numbers it if it has no number yet."""
        with self.inside(fd):
            cookie = cookie_here()
        if cookie == self.namespace.cookie:
            return self.namespace
        with Socket.here() as own:
            nsid = number(own, fd, assign=True)
        return Namespace(cookie, nsid, os.fstat(fd).st_ino, name, _handle(fd))

    def find(self, namespace: Namespace) -> int:
        """A fresh fd of a namespace known from earlier; NamespaceGoneError if there is none.

        By its file handle where the kernel can (6.18). Else whoever is in it leads there:
        processes, then names below /run/netns.
        """
        if namespace.own:
            return os.dup(self.fd)
        made = _by_handle(namespace.handle) if namespace.handle else None
        if made is not None:
            return made
        for path in self._doors(namespace.inode):
            with suppress(OSError, InvalidError, NotFoundError, DeniedError), ExitStack() as closes:
                made = self._open(path, str(namespace))
                closes.callback(os.close, made)
                with self.inside(made):
                    found = cookie_here()
                if found == namespace.cookie:
                    closes.pop_all()
                    return made
        raise NamespaceGoneError(
            f"the network namespace of {namespace} is gone, or nothing visible is left in it"
        )

    def find_number(self, nsid: int, name: str = "") -> int:
        """A fresh fd of the namespace with that nsid; NamespaceGoneError if nothing leads there."""
        seen: set[int] = set()
        with Socket.here() as own:
            for path in self._doors(0):
                with (
                    suppress(OSError, InvalidError, NotFoundError, DeniedError, Refusal),
                    ExitStack() as closes,
                ):
                    inode = os.stat(path).st_ino
                    if inode in seen:
                        continue
                    seen.add(inode)
                    made = self._open(path, path)
                    closes.callback(os.close, made)
                    if number(own, made, assign=False) == nsid:
                        closes.pop_all()
                        return made
        raise NamespaceGoneError(
            f"network namespace {name or nsid} is gone, or nothing is left in it"
        )

    def _doors(self, inode: int) -> Iterator[str]:
        """Paths that lead into the namespace with that inode; for 0 into any."""
        try:
            named = os.listdir(NAMED)
        except FileNotFoundError:
            named = []
        paths = [f"{NAMED}/{name}" for name in named]
        paths += [f"/proc/{pid}/ns/net" for pid in os.listdir("/proc") if pid.isdigit()]
        for path in paths:
            with suppress(OSError):
                found = os.stat(path)
                if inode in (0, found.st_ino) and found.st_dev == self._device:
                    yield path


def _opened(path: str, flags: int, whose: str) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except PermissionError:
        raise RightsError(
            f"may not open the network namespace of {whose}", hint="it needs CAP_SYS_PTRACE"
        ) from None
    except (FileNotFoundError, ProcessLookupError):
        raise NamespaceGoneError(f"the network namespace of {whose} is gone") from None


def in_new(function: Callable[[], T]) -> T:
    """Run function in a namespace made for it, which goes when nothing of it is left there."""
    done: Future[T] = Future()

    def work() -> None:  # the thread ends in there
        try:
            _checked(_libc.unshare(_CLONE_NEWNET), "unshare")
            done.set_result(function())
        except OSError as failure:
            done.set_exception(netlink.explain(failure, "unshare --net", "a thread"))
        except BaseException as failure:  # noqa: BLE001 - the caller's to handle
            done.set_exception(failure)

    thread = threading.Thread(target=work, name="in a new namespace")
    thread.start()
    thread.join()
    return done.result()


def cookie_here() -> int:
    """The cookie of the namespace the calling thread is in: never given twice."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        raw = probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    return int(struct.unpack("=Q", raw)[0])


def number(own: Socket, fd: int, *, assign: bool) -> int:
    """The nsid under which own's namespace knows the one behind fd; OWN if it has none.

    assign gives it one. Others number namespaces too, so get first and keep what is there.
    """
    question = b"\0\0\0\0" + netlink.u32(_NETNSA_FD, fd)
    answer = own.ask(netlink.message(netlink.GETNSID, 0, question))
    nsid = netlink.signed(netlink.table(answer, 4)[_NETNSA_NSID])
    if nsid >= 0 or not assign:
        return nsid
    wish = question + struct.pack("=HHi", 8, _NETNSA_NSID, -1)
    (refused,) = own.do([netlink.message(netlink.NEWNSID, 0, wish)])
    if refused and refused.errno != errno.EEXIST:  # somebody numbered it this moment
        raise netlink.explain(refused, "ip netns set … auto", "this node's namespace")
    return number(own, fd, assign=False)


def own_number(own: Socket) -> int:
    """The nsid under which the calling thread's namespace, which is own's, knows itself.

    OWN until it has one: the kernel gives it one with the first look at a device elsewhere
    that stands on it.
    """
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return number(own, fd, assign=False)
    finally:
        os.close(fd)


def numbers(own: Socket) -> list[int]:
    """All nsids own's namespace has given."""
    found = []
    for _, body in own.dump(netlink.message(netlink.GETNSID, 0, b"\0\0\0\0")):
        nsid = netlink.table(body, 4).get(_NETNSA_NSID)
        if nsid is not None and netlink.signed(nsid) >= 0:
            found.append(netlink.signed(nsid))
    return found


def have_handles() -> bool:
    """Whether this kernel leads to a namespace by its file handle: Linux 6.18 does.

    Where it does not, only who is in a namespace leads there, and of other users' processes
    that is hidden from whoever has no CAP_SYS_PTRACE. Blocks.
    """
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        handle = _handle(fd)
    finally:
        os.close(fd)
    made = _by_handle(handle) if handle else None
    if made is None:
        return False
    os.close(made)
    return True


def _handle(fd: int) -> bytes:
    """The file handle of a namespace: bytes, which hold nothing. Empty before Linux 6.18."""
    buffer = (ctypes.c_ubyte * 136)()
    struct.pack_into("=I", buffer, 0, 128)
    mount = ctypes.c_int()
    if _libc.name_to_handle_at(fd, b"", buffer, ctypes.byref(mount), _AT_EMPTY_PATH) < 0:
        return b""
    size = struct.unpack_from("=I", buffer)[0]
    return bytes(buffer[: 8 + size])


def _by_handle(handle: bytes) -> int | None:
    buffer = (ctypes.c_ubyte * len(handle)).from_buffer_copy(handle)
    made = _libc.open_by_handle_at(_FD_NSFS_ROOT, buffer, os.O_RDONLY | os.O_CLOEXEC)
    return made if made >= 0 else None


# --- namespaces with names, for labs ---------------------------------------------------------


def create_named(name: str) -> None:
    """Make a namespace as `ip netns add` does: mounted at /run/netns/NAME, up to its loopback.

    Blocks. Raises TakenError, InvalidError, DeniedError. Nothing is left behind on failure.
    """
    path = _path(name)
    _shared_directory()
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    except FileExistsError:
        raise TakenError(
            f"there is a network namespace {name} already",
            hint=f"ip netns del {name}, or another name",
        ) from None
    failures: list[OSError] = []

    def unshare_and_mount() -> None:  # the thread ends in there, and is gone
        try:
            _checked(_libc.unshare(_CLONE_NEWNET), "unshare")
            source = f"/proc/self/task/{threading.get_native_id()}/ns/net".encode()
            _checked(_libc.mount(source, path.encode(), b"none", _MS_BIND, None), f"mount {path}")
            with Socket.here() as inside:
                up = struct.pack("=BBHiII", 0, 0, 0, 1, 1, 1)
                inside.do([netlink.message(netlink.NEWLINK, 0, up)])
        except OSError as failure:
            failures.append(failure)

    thread = threading.Thread(target=unshare_and_mount, name=f"create namespace {name}")
    try:
        thread.start()
        thread.join()
    except BaseException:
        if thread.ident is not None:
            thread.join()  # what it still mounts could not be taken away before
        delete_named(name)
        raise
    if failures:
        delete_named(name)
        if failures[0].errno in (errno.EPERM, errno.EACCES):
            raise RightsError(
                f"may not create network namespace {name}", hint="it needs root, or CAP_SYS_ADMIN"
            ) from failures[0]
        raise InternalError(
            f"could not create network namespace {name}: {failures[0]}"
        ) from failures[0]


def delete_named(name: str) -> None:
    """Take the name away, as `ip netns del`; without processes in it the namespace goes too.

    Blocks. A name that is not there is no error.
    """
    path = _path(name)
    with suppress(OSError):
        _checked(_libc.umount2(path.encode(), _MNT_DETACH), f"umount {path}")
    with suppress(FileNotFoundError):
        os.unlink(path)


def list_named() -> list[str]:
    """The names below /run/netns that are network namespaces, sorted. Blocks."""
    try:
        names = os.listdir(NAMED)
    except FileNotFoundError:
        return []
    device = os.stat("/proc/self/ns/net").st_dev
    found = []
    for name in names:
        with suppress(OSError):
            if os.stat(f"{NAMED}/{name}").st_dev == device:
                found.append(name)
    return sorted(found)


def _path(name: str) -> str:
    if not name or "/" in name or name in (".", "..") or len(name.encode()) > 200:
        raise InvalidError(f"{name[:60]!r} cannot be the name of a network namespace")
    return f"{NAMED}/{name}"


def _shared_directory() -> None:
    """Make /run/netns a shared mount: names made here are seen in other mount namespaces."""
    os.makedirs(NAMED, mode=0o755, exist_ok=True)
    if _libc.mount(b"", NAMED.encode(), b"none", _MS_SHARED | _MS_REC, None) == 0:
        return
    if ctypes.get_errno() != errno.EINVAL:
        _denied()
    if _libc.mount(NAMED.encode(), NAMED.encode(), b"none", _MS_BIND | _MS_REC, None) < 0:
        _denied()
    if _libc.mount(b"", NAMED.encode(), b"none", _MS_SHARED | _MS_REC, None) < 0:
        _denied()


def _denied() -> None:
    code = ctypes.get_errno()
    raise RightsError(
        f"may not prepare {NAMED} for named network namespaces: {os.strerror(code)}",
        hint="it needs root, or CAP_SYS_ADMIN",
    )
