"""Ways into the namespaces of one wire, opened when first needed and closed with the batch.

A socket kept in a workload's namespace would keep that namespace alive, so a `Reach` lives
as long as one look at a wire, or one change of it, in a worker thread.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Self

from nsm.kernel import messages, netlink
from nsm.kernel.messages import Device
from nsm.kernel.namespaces import Home, number
from nsm.kernel.netlink import Refusal, Socket, explain
from nsm.kernel.state import Namespace, Sysctl
from nsm.kernel.wireguard_go import Processes

ABSENT = {errno.ENODEV, errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL, errno.ENXIO}
"""What the kernel says of what is not there (any more)."""

Seat = tuple[Namespace, str]


class Reach:
    """Sockets in the namespaces of one wire, for one batch."""

    def __init__(
        self, home: Home, fds: Mapping[Namespace, int], processes: Processes | None = None
    ) -> None:
        """fds are borrowed: ways into the namespaces that the caller has open.

        processes are those of the instance; without them its userspace tunnels are not known.
        """
        self.processes = processes or Processes(0)
        self._home = home
        self._fds = dict(fds)
        self._sockets: dict[Namespace, Socket] = {}
        self._generic: dict[Namespace, Socket] = {}
        self._opened: dict[Namespace, int] = {}
        self._stack = ExitStack()
        self._settings: dict[tuple[Namespace, str], str] = {}
        self.index: dict[Seat, int] = {}
        self.last: dict[Seat, int] = {}
        """The numbers that the wire's devices had when it was last looked at."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def own(self) -> Namespace:
        """The namespace this process runs in."""
        return self._home.namespace

    def number(self, where: Namespace, other: Namespace) -> int:
        """The nsid under which one namespace knows another; OWN (-1) if it does not."""
        return number(self.socket(where), self.fd(other), assign=False)

    def fd(self, namespace: Namespace) -> int:
        """A way into the namespace, ours for this batch."""
        if namespace.own:
            return self._home.fd
        if namespace not in self._opened:
            borrowed = self._fds.get(namespace)
            made = (
                self._home.find(namespace)
                if borrowed is None
                else self._home.opened(borrowed, str(namespace))
            )
            self._stack.callback(os.close, made)
            self._opened[namespace] = made
        return self._opened[namespace]

    def socket(self, namespace: Namespace) -> Socket:
        """The batch's socket in that namespace."""
        if namespace not in self._sockets:
            made = Socket.here() if namespace.own else self._home.socket(self.fd(namespace))
            self._sockets[namespace] = self._stack.enter_context(made)
        return self._sockets[namespace]

    def keep(self, fd: int) -> int:
        """Close that descriptor with the batch; returns it."""
        self._stack.callback(os.close, fd)
        return fd

    def generic(self, namespace: Namespace) -> Socket:
        """The batch's socket of generic netlink in that namespace."""
        if namespace not in self._generic:
            fd = self.fd(namespace)
            made = (
                Socket.here(netlink.GENERIC)
                if namespace.own
                else self._home.socket(fd, netlink.GENERIC)
            )
            self._generic[namespace] = self._stack.enter_context(made)
        return self._generic[namespace]

    def device(self, namespace: Namespace, *, name: str = "", index: int = 0) -> Device | None:
        """The device of that name or index, or None."""
        try:
            body = self.socket(namespace).ask(messages.get_link(name=name, index=index))
        except Refusal as refusal:
            if refusal.errno in ABSENT:
                return None
            raise explain(refusal, f"ip link show {name or index}", namespace) from refusal
        return messages.device(body)

    def index_of(self, namespace: Namespace, name: str) -> int:
        """The index of that device; 0 if there is none."""
        if (namespace, name) not in self.index:
            found = self.device(namespace, name=name)
            if found is None:
                return 0
            self.index[namespace, name] = found.index
        return self.index[namespace, name]

    def read(self, wanted: Iterable[Sysctl]) -> Iterator[Sysctl]:
        """The present values of settings; a device that is not there yet has the default's.

        What had the wanted value before is not read again: nothing of a wire changes it.
        """
        unread: dict[Namespace, list[Sysctl]] = {}
        for item in wanted:
            if self._settings.get((item.namespace, item.key)) == item.value:
                yield item
            else:
                unread.setdefault(item.namespace, []).append(item)
        for namespace, some in unread.items():
            with self.inside(namespace):
                values = [_read(item.key) for item in some]
            for item, value in zip(some, values, strict=True):
                if value is not None:
                    self._settings[namespace, item.key] = value
                    yield Sysctl(namespace, item.key, value)

    def write(self, item: Sysctl) -> None:
        """Set a kernel setting."""
        self.forget(item.namespace, item.key)
        with self.inside(item.namespace):
            fd = os.open(f"/proc/sys/{item.key}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, item.value.encode())
            finally:
                os.close(fd)

    def forget(self, namespace: Namespace, part: str) -> None:
        """Settings of that key, or of that device's, have to be read again."""
        for space, key in list(self._settings):
            if space == namespace and part in key:
                del self._settings[space, key]

    def inside(self, namespace: Namespace) -> AbstractContextManager[None]:
        """The calling thread is in that namespace for the block."""
        return nullcontext() if namespace.own else self._home.inside(self.fd(namespace))


def _read(key: str) -> str | None:
    parts = key.split("/")
    default = "/".join([*parts[:3], "default", *parts[4:]])
    for path in (key, default) if "/conf/" in key else (key,):
        try:
            fd = os.open(f"/proc/sys/{path}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            return os.read(fd, 256).decode().strip()
        finally:
            os.close(fd)
    return None
