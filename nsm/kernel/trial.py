"""What this kernel can do, found out by trying, where nobody else is.

A list of modules says what may be there; a container, a security module or a limit may
still refuse it. So each feature is used once, as wires and labs use it.

`apart` moves the calling process into namespaces of its own, for good. What is tried in
there goes with that process, however it ends. Each attempt raises what `explain` makes of
the kernel's answer: UnsupportedError where it has no such thing, RightsError where this
process may not. All of it blocks.
"""

import ctypes
import errno
import fcntl
import os
import signal
import struct
import subprocess
import time
from contextlib import ExitStack
from typing import Final

from nsm.errors import InternalError, RightsError, UnavailableError, UnsupportedError
from nsm.kernel import firewall, messages, netlink, splice
from nsm.kernel.netlink import Refusal, Socket, attr, message, nested, text, u32

TUN: Final = "/dev/net/tun"
HERE: Final = "a namespace made for trying"

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x2_0000, 0x1000_0000, 0x4000_0000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x4_0000
_IFNAME, _LINK, _LINKINFO, _INFO_KIND, _INFO_DATA, _VETH_PEER = 3, 5, 18, 1, 2, 1
_VX_ID, _VX_GROUP, _VX_LOCAL, _VX_PORT = 1, 2, 4, 15
_MACVLAN_MODE, _PASSTHRU = 1, 8
_LINK_BODY: Final = struct.Struct("=BBHiII")  # family, pad, type, index, flags, change
_UP = 1
_MAC: Final = "02:00:00:00:00:01"
_PR_SET_PDEATHSIG = 1
_PATIENCE = 2.0  # seconds wireguard-go may take; it takes some milliseconds
_NEWQDISC, _ROOT, _TCA_KIND, _TCA_OPTIONS = 36, 0xFFFF_FFFF, 1, 2
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x4004_54CA, 0x0001, 0x1000
_SETTING: Final = "/proc/sys/net/ipv4/conf/lo/route_localnet"
_libc = ctypes.CDLL(None, use_errno=True)
_is_apart = False


def apart() -> None:
    """Move this process into a network and a mount namespace of its own, for good.

    Who may not gets a user namespace too, in which it may, if this machine allows that. The
    process must have one thread. Raises RightsError, or ExhaustedError at a limit.
    """
    global _is_apart
    if _libc.unshare(_CLONE_NEWNET | _CLONE_NEWNS) < 0:
        refused = _refused("unshare --net --mount")
        both = _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWNS
        if not isinstance(refused, RightsError) or _libc.unshare(both) < 0:
            raise refused
    if _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) < 0:
        raise _refused("mount --make-rprivate /")
    _is_apart = True


def _must_be_apart() -> None:
    """Nothing is ever tried where somebody else is: not on a host that lets nobody go apart."""
    if not _is_apart:
        raise InternalError("nothing is tried outside of a namespace made for it")


def namespace() -> None:
    """Make a network namespace, give it a name as `ip netns add` does, and come back from it."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.unshare(_CLONE_NEWNS) < 0:
            raise _refused("unshare --mount")
        if _libc.unshare(_CLONE_NEWNET) < 0:
            raise _refused("unshare --net")
        # private, because a name that is mounted here must be seen nowhere else
        place = os.fsencode(__file__)  # any file will do
        if _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) < 0:
            raise _refused("mount --make-rprivate /")
        if _libc.mount(b"/proc/thread-self/ns/net", place, None, _MS_BIND, None) < 0:
            raise _refused("mount --bind /proc/thread-self/ns/net")
        if _libc.setns(home, _CLONE_NEWNET) < 0:
            raise _refused("setns")
    finally:
        os.close(home)


def settings() -> None:
    """Set a variable below /proc/sys/net, as every wire needs it in its namespace."""
    _must_be_apart()
    try:
        with open(_SETTING, "r+") as file:
            value = file.read()
            file.seek(0)
            file.write(value)
    except OSError as failure:
        raise netlink.explain(failure, f"sysctl -w {_name(_SETTING)}", HERE) from failure


def _name(path: str) -> str:
    return path.removeprefix("/proc/sys/").replace("/", ".")


def veth(name: str = "try-veth") -> None:
    """A veth pair."""
    peer = _LINK_BODY.pack(0, 0, 0, 0, 0, 0) + text(_IFNAME, f"{name}2")
    _make(name, "veth", attr(_VETH_PEER, peer))


def bridge() -> None:
    """A bridge."""
    _make("try-bridge", "bridge")


def vxlan() -> None:
    """A VXLAN device over IPv4, with its UDP socket."""
    _make(
        "try-vxlan", "vxlan", u32(_VX_ID, 1), attr(_VX_PORT, (4789).to_bytes(2, "big")),
        attr(_VX_LOCAL, bytes((127, 0, 0, 1))), attr(_VX_GROUP, bytes((127, 0, 0, 2))), flags=_UP,
    )  # fmt: skip


def macvlan() -> None:
    """A macvlan device that has all of the one below it."""
    veth("try-m")
    with Socket.here() as sock:
        lower = messages.device(sock.ask(messages.get_link(name="try-m"))).index
    _make("try-macvlan", "macvlan", u32(_MACVLAN_MODE, _PASSTHRU), more=u32(_LINK, lower))


def hop() -> None:
    """What joins a workload with a tunnel on the node: programs that a veth's packets meet."""
    veth("try-hop")
    with Socket.here() as sock, ExitStack() as loaded:
        near, far = (
            messages.device(sock.ask(messages.get_link(name=name))).index
            for name in ("try-hop", "try-hop2")
        )
        wishes = []
        for at, program in ((near, splice.outward(far)), (far, splice.inward(near, _MAC))):
            descriptor = splice.load(program)
            loaded.callback(os.close, descriptor)
            wishes += [splice.place(at), splice.attach(at, descriptor, splice.name(at))]
        for refusal in sock.do(wishes):
            if refusal and refusal.errno in (errno.EPERM, errno.EACCES):
                raise netlink.explain(refusal, "tc filter add ingress bpf", HERE)
            if refusal:
                raise splice.cannot(refusal)


def wireguard() -> None:
    """A WireGuard device of the kernel."""
    _make("try-wireguard", "wireguard")


def wireguard_go(program: str) -> None:
    """A WireGuard device of that program, up to the socket it is configured by.

    Hides /run from the calling process, because the program leaves files there. Not by
    `wireguard_go.Processes`: what that starts is made to outlive whoever started it.
    """
    _must_be_apart()
    if _libc.mount(b"none", b"/run", b"tmpfs", 0, None) < 0:
        raise _refused("mount -t tmpfs none /run")
    with subprocess.Popen(
        [program, "-f", "try-wg"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={"LOG_LEVEL": "error"}, preexec_fn=end_with_parent,
    ) as running:  # fmt: skip
        try:
            end = time.monotonic() + _PATIENCE
            while running.poll() is None and time.monotonic() < end:
                if os.path.exists("/run/wireguard/try-wg.sock"):
                    return
                time.sleep(0.01)
            if running.poll() is None:
                raise UnavailableError(f"{program} makes no device within {_PATIENCE:g} s")
        finally:
            running.kill()
        said = (running.stdout.read(4096) if running.stdout else b"").decode(errors="replace")
    lines = [line for line in said.splitlines() if line.strip()]
    why = lines[-1].strip()[-120:] if lines else "it did not say why"
    raise UnsupportedError(f"{program} makes no device: {why}")


def end_with_parent() -> None:
    """Die when the parent does: for a process that is started to try something."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def tun() -> None:
    """A TUN device, as wireguard-go makes one."""
    _must_be_apart()
    try:
        file = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UnsupportedError(f"there is no {TUN}") from None
    except PermissionError:
        raise RightsError(f"may not open {TUN}", hint=f"let this container use {TUN}") from None
    except OSError as failure:  # the file is there, and no driver behind it
        raise UnsupportedError(f"{TUN}: {failure.strerror}") from None
    try:
        fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", b"try-tun", _IFF_TUN | _IFF_NO_PI))
    except PermissionError as failure:
        raise RightsError(
            f"`ip tuntap add try-tun mode tun` in {HERE}: {failure.strerror}",
            hint="give this container CAP_NET_ADMIN",
        ) from failure
    except OSError as failure:
        raise netlink.explain(failure, "ip tuntap add try-tun mode tun", HERE) from failure
    finally:
        os.close(file)


def nft() -> None:
    """A table and a chain of nf_tables."""
    _must_be_apart()
    firewall.attempt()


def netem() -> None:
    """A queue that delays and loses packets."""
    body = struct.pack("=BBHiIII", 0, 0, 0, 1, 0, _ROOT, 0)
    body += text(_TCA_KIND, "netem") + attr(_TCA_OPTIONS, struct.pack("=6I", 0, 1000, 0, 0, 0, 0))
    command = "tc qdisc add dev lo root netem"
    refusal = _sent(message(_NEWQDISC, netlink.CREATE | netlink.EXCL, body))
    if refusal and refusal.errno == errno.ENOENT:  # its word for a kind it does not know
        raise UnsupportedError(f"`{command}` in {HERE}: {refusal}")
    if refusal:
        raise netlink.explain(refusal, command, HERE)


def _make(name: str, kind: str, *data: bytes, more: bytes = b"", flags: int = 0) -> None:
    info = nested(_LINKINFO, text(_INFO_KIND, kind), *([nested(_INFO_DATA, *data)] if data else []))
    body = _LINK_BODY.pack(0, 0, 0, 0, flags, flags) + text(_IFNAME, name) + more + info
    wish = message(netlink.NEWLINK, netlink.CREATE | netlink.EXCL, body)
    if refusal := _sent(wish):
        raise netlink.explain(refusal, f"ip link add {name} type {kind}", HERE)


def _sent(wish: bytearray) -> Refusal | None:
    _must_be_apart()
    with Socket.here() as sock:
        (refusal,) = sock.do([wish])
    return refusal


def _refused(command: str) -> Exception:
    code = ctypes.get_errno()
    return netlink.explain(OSError(code, os.strerror(code)), command, "this process")
