"""WireGuard without the kernel's: a wireguard-go process for each wire.

Its device is a TUN, which it makes in the namespace it runs in, the underlay; there its UDP
socket stays when the device is moved to the workload. It outlives whoever started it, and
ends by itself when its device goes, with a workload for example.

How a process is found again: the socket it is configured by has the tunnel's name, which is
one on the machine, and says so ever after, whatever becomes of the device's name. Whose it
is stands in its environment: the instance, that instance's namespace, and the wire's mark.
So a forwarder killed between two steps leaves nothing that its next life does not find.

Everything here blocks; call it in threads.
"""

import base64
import errno
import fcntl
import os
import select
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass

from nsm.errors import InternalError, PreconditionError, TakenError, UnavailableError
from nsm.kernel import capabilities, owner
from nsm.kernel.keys import Key
from nsm.kernel.netlink import PortTakenError, explain
from nsm.kernel.wireguard import EVERYTHING, Change, Peer, PeerChange, Settings

PROGRAM = "wireguard-go"
DIRECTORY = "/var/run/wireguard"
"""Where wireguard-go and wg look for sockets, by the names of devices."""

_OWNER = "VWIRE_OWNER"  # in the process's environment
_XATTR = "trusted.vwire"  # on its socket's file, the same
DIES = 5.0  # seconds within which a process ends after its SIGKILL: mostly it takes 30 ms
_ELSEWHERE = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ANSWERS = 0.5  # seconds; it takes some milliseconds, and who hangs is as good as dead
_OBEYS = 3.0  # seconds
_STARTS = 3.0  # seconds until its UDP socket is there: it looks once a second at the least
_HEARS = 1.0  # seconds until it knows its device's size; it takes a millisecond
_ITS_MTU = 1420  # bytes, which it gives each device first
_MOST = 1 << 20  # bytes of an answer
_SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(slots=True, eq=False)
class Running:
    """A process of ours; pidfd is -1 once it has ended and was collected.

    log is where it speaks to, as long as somebody listens, else -1. stopped says that we ended
    it, and that nobody need be told.
    """

    mark: owner.Mark
    pid: int
    pidfd: int
    mine: bool  # started in this life
    log: int = -1
    stopped: bool = False

    @property
    def name(self) -> str:
        return owner.tunnel_name(self.mark.wire, self.mark.side)


class Processes:
    """The wireguard-go processes of one instance that runs in one namespace."""

    def __init__(self, group: int) -> None:
        """on_start is told of every process that runs, from whatever thread."""
        self.on_start: Callable[[Running], None] = lambda _: None
        self._group = group
        self._home = 0
        self._running: dict[str, Running] = {}
        self._lock = threading.RLock()

    def at(self, home: int) -> None:
        """Say which namespace the instance runs in, by its cookie."""
        self._home = home

    # --- life --------------------------------------------------------------------------------

    def start(self, mark: owner.Mark, inside: AbstractContextManager[None]) -> str:
        """Start the process of that wire where inside leads; the name of its device there.

        Its device is down and without a key; its UDP socket has a port of its own choice.
        `settled` or `stop` comes next. Raises PreconditionError with its own words,
        TakenError; nothing is left then.
        """
        name = owner.tunnel_name(mark.wire, mark.side)
        program = find_program()
        self.stop(name)
        try:
            running = self._spawn(program, mark, inside)
            _leave_our_cgroup(running.pid)
            self._answers(running)
            self.on_start(running)
        except OSError as failure:
            self.stop(name)
            raise explain(failure, f"{PROGRAM} -f {name}", "this node") from failure
        except BaseException:
            self.stop(name)
            raise
        return name

    def settled(self, name: str, mtu: int) -> None:
        """Return when it has heard of its device's size, in bytes; from then on it may be moved.

        It hears of its device only where it runs, and pads packets up to the size it knows:
        beyond the real one they would leave in two pieces.
        """
        with self._lock:
            running = self._running.get(name)
            log = os.dup(running.log) if running and running.log >= 0 else -1
        if log < 0:
            return
        wanted = b"" if mtu == _ITS_MTU else b"MTU updated: %d" % mtu
        try:
            end = time.monotonic() + _HEARS
            while wanted not in os.pread(log, 1 << 16, 0) and time.monotonic() < end:
                time.sleep(0.0005)
            # nobody reads what it says from here on, and memory is not for writing diaries
            fcntl.fcntl(log, fcntl.F_ADD_SEALS, _SEALED)
        finally:
            os.close(log)
            with self._lock:
                if running:
                    _close_log(running)

    def _spawn(
        self, program: str, mark: owner.Mark, inside: AbstractContextManager[None]
    ) -> Running:
        name, whose = owner.tunnel_name(mark.wire, mark.side), f"{self._owner}{mark}"
        with self._lock, _listening(name, whose) as listening, ExitStack() as failing:
            log = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            failing.callback(os.close, log)
            files = [
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
                (os.POSIX_SPAWN_DUP2, listening.fileno(), 3),
            ]
            said = {_OWNER: whose, "WG_UAPI_FD": "3", "LOG_LEVEL": "verbose"}

            def spawn() -> int:
                capabilities.hand_on_only({capabilities.NET_ADMIN})
                # no fork, which threads would not survive; no Popen, which wants to be waited for
                return os.posix_spawn(
                    program,
                    [PROGRAM, "-f", name],
                    said,
                    file_actions=files,
                    setsid=True,  # a Ctrl-C is not meant for wires
                    setsigmask=(),
                    setsigdef=(signal.SIGPIPE,),
                )

            # it reads packets from anybody and needs one right; a thread that gave up the others
            # has no way back, so it is a thread for this alone, born in the same namespace
            with inside, ThreadPoolExecutor(1) as apart:
                pid = apart.submit(spawn).result()
            failing.callback(_end_child, pid)
            running = Running(mark, pid, os.pidfd_open(pid), mine=True, log=log)
            failing.pop_all()
            self._running[name] = running
            return running

    def _answers(self, running: Running) -> None:
        """Wait until it can be told its port, which it takes only once it is up."""
        end = time.monotonic() + _STARTS
        while True:
            settings = self.settings(running.name, _STARTS)
            if settings is None and time.monotonic() > end:
                raise InternalError(f"{PROGRAM} runs, and does not answer")
            if settings is None:
                said = os.pread(running.log, 1 << 16, 0).decode(errors="replace").splitlines()
                words = [line.partition(") ")[2] or line for line in said if "ERROR" in line]
                why = words[-1] if words else "it did not say why"
                raise PreconditionError(
                    f"{PROGRAM} ended as it started: {why}",
                    hint="it needs /dev/net/tun, CAP_NET_ADMIN, and of inotify's instances one for"
                    " each process (sysctl fs.inotify.max_user_instances)",
                )
            if settings.port:
                return
            if time.monotonic() > end:
                raise InternalError(f"{PROGRAM} runs, and did not open a UDP socket")
            time.sleep(0.001)

    def present(self, name: str) -> bool:
        """Whether there may be anything of that name. Costs microseconds."""
        return name in self._running or os.path.lexists(_path(name))

    def stop(self, name: str) -> None:
        """End the process of that name, if there is one, and take away what it leaves.

        With it go its device and its port. What is somebody else's is left alone.
        """
        running = self._find(name)
        if running:
            self._kill(running)
            self._see_end(running, DIES)
        with self._lock:
            if running and self._running.get(name) is running:
                del self._running[name]
            _unlink_dead(name)

    def kill(self, name: str) -> Running | None:
        """Have the process of that name end, if there is one, and do not wait: who deletes its
        device has all that anybody sees of it. `ended` takes away what it leaves.

        `start` of the same name waits; its port is free once it has ended.
        """
        running = self._find(name)
        if running:
            self._kill(running)
            return running
        with self._lock:
            _unlink_dead(name)
        return None

    def _kill(self, running: Running) -> None:
        with self._lock:
            if running.pidfd < 0:
                return
            running.stopped = True
            _close_log(running)  # before anybody asks for another file: there may be no room
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(running.pidfd, signal.SIGKILL)

    def _see_end(self, running: Running, patience: float) -> None:
        with self._lock:
            if running.pidfd < 0:
                return
            held = os.dup(running.pidfd)
        try:
            if not _has_ended(held, patience):
                raise InternalError(f"{PROGRAM} (pid {running.pid}) does not die")
        finally:
            os.close(held)
        self._collect(running)

    def _collect(self, running: Running) -> None:
        with self._lock:
            if running.pidfd < 0:
                return
            with suppress(ChildProcessError):  # an earlier life started it
                os.waitpid(running.pid, os.WNOHANG)
            os.close(running.pidfd)
            running.pidfd = -1
            _close_log(running)

    def ended(self, running: Running) -> None:
        """It ended, by itself perhaps, with its device: what it leaves is taken away."""
        self._collect(running)
        with self._lock:
            if self._running.get(running.name) is running:
                del self._running[running.name]
                _unlink_dead(running.name)

    def watch(self, running: Running) -> int:
        """A descriptor, the caller's, that is readable when the process has ended."""
        with self._lock:
            return os.dup(running.pidfd)

    def close(self) -> None:
        """Let go of all of them: they run on, but for those that were told to end."""
        until = time.monotonic() + DIES
        for running in self.known():
            if running.stopped:
                with suppress(InternalError):  # the next life finds what it leaves
                    self._see_end(running, max(0.0, until - time.monotonic()))
                    self.ended(running)
        with self._lock:
            for running in self._running.values():
                os.close(running.pidfd)
                running.pidfd = -1
                _close_log(running)
            self._running.clear()

    def known(self) -> list[Running]:
        """Those that run, as far as they are known."""
        with self._lock:
            return list(self._running.values())

    # --- telling and asking ------------------------------------------------------------------

    def settings(self, name: str, patience: float = _ANSWERS) -> Settings | None:
        """What it holds; None if nobody answers under that name: it has ended, or hangs."""
        said = _ask(name, "get=1\n\n", patience)
        return None if said is None else _read(said)

    def change(self, name: str, wanted: Change) -> None:
        """Tell it that. Raises PortTakenError, UnavailableError, InternalError."""
        lines = "".join(f"{line}\n" for line in _lines(wanted))
        said = _ask(name, f"set=1\n{lines}\n", _OBEYS)
        if said is None:
            raise UnavailableError(f"{PROGRAM} of {name} has ended, or does not answer")
        code = abs(int(dict(_pairs(said)).get("errno", "0")))
        if code == errno.EADDRINUSE:
            raise PortTakenError(f"UDP port {wanted.port} is taken")
        if code:
            raise InternalError(f"{PROGRAM} of {name}: {os.strerror(code)}")

    # --- finding -----------------------------------------------------------------------------

    def adopt(self) -> None:
        """Get to know the processes an earlier life started."""
        if not _sockets():
            return  # none without one
        for pid, whose in _marked():
            mark = owner.Mark.parse(whose.removeprefix(self._owner))
            if not whose.startswith(self._owner) or mark is None:
                continue
            pidfd = _hold(pid, whose)
            if pidfd < 0:
                continue
            running = Running(mark, pid, pidfd, mine=False)
            with self._lock:
                if running.name in self._running:
                    os.close(pidfd)
                    continue
                self._running[running.name] = running
            self.on_start(running)

    def sweep(self, standing: Collection[str]) -> None:
        """Adopt the processes of an earlier life whose tunnels stand; end and tidy up the rest.

        A process is the first thing of a tunnel to be made and its mark the last, so one
        without a tunnel is what a life left that was killed in between.
        """
        self.adopt()
        for running in self.known():
            if not running.mine and running.name not in standing:
                self.stop(running.name)
        for name in _sockets():
            with suppress(OSError):
                if os.getxattr(_path(name), _XATTR).startswith(self._owner.encode()):
                    with self._lock:
                        if name not in self._running:
                            _unlink_dead(name)

    @property
    def _owner(self) -> str:
        return f"{self._group:08x}/{self._home:x}/"

    def _find(self, name: str) -> Running | None:
        with self._lock:
            if name in self._running:
                return self._running[name]
        if os.path.lexists(_path(name)):
            self.adopt()
        with self._lock:
            return self._running.get(name)


def find_program() -> str:
    """Where wireguard-go is; PreconditionError if it is nowhere."""
    found = shutil.which(PROGRAM) or shutil.which(PROGRAM, path=_ELSEWHERE)
    if not found:
        raise PreconditionError(
            f"there is no {PROGRAM} on this node", hint=f"apt-get install {PROGRAM}"
        )
    return found


def tidy(homes: Collection[int]) -> list[str]:
    """Take away what is left of processes that ended with the namespaces their owners ran in.

    Those, by their cookies, are gone or going, and so is everybody who could do it. Returns the
    sockets that somebody still listens on.
    """
    left = []
    for name in _sockets():
        with suppress(OSError, ValueError):  # it goes meanwhile, or has no mark of ours
            _, home, _ = os.getxattr(_path(name), _XATTR).decode(errors="replace").split("/", 2)
            if home in {f"{one:x}" for one in homes}:
                _unlink_dead(name)
                left += [_path(name)] if os.path.lexists(_path(name)) else []
    return left


# --- sockets ---------------------------------------------------------------------------------


def _path(name: str) -> str:
    return f"{DIRECTORY}/{name}.sock"


def _sockets() -> list[str]:
    try:
        files = os.listdir(DIRECTORY)
    except FileNotFoundError:
        return []
    return [file.removesuffix(".sock") for file in files if file.endswith(".sock")]


def _listening(name: str, whose: str) -> socket.socket:
    """The socket it is configured by, made here: so it is marked before anybody listens, and
    who connects waits until the process answers."""
    os.makedirs(DIRECTORY, mode=0o755, exist_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        try:
            made.bind(_path(name))
        except OSError as failure:
            if failure.errno != errno.EADDRINUSE:
                raise
            raise TakenError(f"another process listens on {_path(name)}") from None
        os.chmod(_path(name), 0o600)
        with suppress(OSError):  # not every file system takes marks
            os.setxattr(_path(name), _XATTR, whose.encode())
        made.listen(16)
    except BaseException:
        made.close()
        raise
    return made


def _unlink_dead(name: str) -> None:
    """Unlink the socket if nobody listens on it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)  # who listens and hangs may have a full queue
        try:
            probe.connect(_path(name))
        except ConnectionRefusedError:
            with suppress(FileNotFoundError):
                os.unlink(_path(name))
        except OSError:
            pass  # it is not there, or somebody is behind it


def _ask(name: str, question: str, patience: float) -> str | None:
    """The answer, without its last empty line; None if there is none within patience, seconds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as channel:
        channel.settimeout(patience)
        said = bytearray()
        try:
            channel.connect(_path(name))
            channel.sendall(question.encode())
            while not said.endswith(b"\n\n") and len(said) < _MOST:
                if not (part := channel.recv(1 << 16)):
                    return None
                said += part
        except OSError:  # one of them: time is over
            return None
    return said.decode(errors="replace")


# --- its language ----------------------------------------------------------------------------


def _pairs(said: str) -> Iterator[tuple[str, str]]:
    for line in said.splitlines():
        key, _, value = line.partition("=")
        yield key, value


def _read(said: str) -> Settings:
    key: Key | None = None
    port = 0
    peers: list[dict[str, str]] = []
    allowed: list[set[str]] = []
    for word, value in _pairs(said):
        if word == "private_key":
            key = Key(bytes.fromhex(value)) if value.strip("0") else None
        elif word == "listen_port":
            port = int(value)
        elif word == "public_key":
            peers.append({word: value})
            allowed.append(set())
        elif word == "allowed_ip" and peers:
            allowed[-1].add(value)
        elif peers:
            peers[-1][word] = value
    return Settings(
        key, port, tuple(_peer(one, ips) for one, ips in zip(peers, allowed, strict=True))
    )


def _peer(said: dict[str, str], allowed: set[str]) -> Peer:
    return Peer(
        base64.b64encode(bytes.fromhex(said["public_key"])).decode(),
        said.get("endpoint", ""),
        int(said.get("persistent_keepalive_interval", 0)),
        int(said.get("last_handshake_time_sec", 0)),
        allowed >= set(EVERYTHING),
    )


def _lines(wanted: Change) -> Iterator[str]:
    if wanted.key:
        yield f"private_key={wanted.key.secret.hex()}"
    if wanted.port:
        yield f"listen_port={wanted.port}"
    for peer in wanted.peers:
        yield from _peer_lines(peer)


def _peer_lines(peer: PeerChange) -> Iterator[str]:
    yield f"public_key={base64.b64decode(peer.public).hex()}"
    if peer.remove:
        yield "remove=true"
    elif not peer.new:
        yield "update_only=true"
    if peer.endpoint:
        yield f"endpoint={peer.endpoint}"
    if peer.keepalive is not None:
        yield f"persistent_keepalive_interval={peer.keepalive}"
    if peer.new:
        yield "replace_allowed_ips=true"
        yield from (f"allowed_ip={network}" for network in EVERYTHING)


# --- processes and cgroups -------------------------------------------------------------------


def _marked() -> Iterator[tuple[int, str]]:
    """Every process with an owner's mark, and the mark: only a word, see `_hold`."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if whose := _mark_of(int(pid)):
                yield int(pid), whose
        except OSError:
            continue  # it ended, or is not ours to look into


def _mark_of(pid: int) -> str:
    wanted = f"{_OWNER}=".encode()
    with open(f"/proc/{pid}/environ", "rb") as file:
        said = file.read()
    for entry in said.split(b"\0"):
        if entry.startswith(wanted):
            return entry.removeprefix(wanted).decode(errors="replace")
    return ""


def _hold(pid: int, whose: str) -> int:
    """The caller's pidfd of a process that is wireguard-go, our user's, and so marked; else -1.

    Anybody may have a word in an environment. And a number may be another process's by now:
    all is read again while the pidfd is held, and the process it is of seen alive after that.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
    try:
        if _is_ours(pid) and _mark_of(pid) == whose and not _has_ended(pidfd, 0):
            held, pidfd = pidfd, -1
            return held
    except OSError:
        pass  # it ended, or is not ours to look into
    finally:
        if pidfd >= 0:
            os.close(pidfd)
    return -1


def _is_ours(pid: int) -> bool:
    """Whether our user runs the program there that we would start, by its file's name: the file
    may have been replaced since, or lie in a container that is gone."""
    with open(f"/proc/{pid}/status") as file:
        users = next(line.split()[1:] for line in file if line.startswith("Uid:"))
    program = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    try:
        called = os.path.realpath(find_program())
    except PreconditionError:
        called = PROGRAM
    return set(users) == {str(os.geteuid())} and os.path.basename(program) in (
        PROGRAM,
        os.path.basename(called),
    )


def _has_ended(pidfd: int, patience: float) -> bool:
    """Whether that process ends within so many seconds."""
    waiting = select.poll()
    waiting.register(pidfd, select.POLLIN)
    return bool(waiting.poll(patience * 1000))


def _end_child(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _leave_our_cgroup(pid: int) -> None:
    """Move it to the root of the tree, where there is one to write to: ours may be killed as a
    whole, when a service is stopped for example, and at the root there is nothing to tidy up."""
    with open("/proc/self/mounts") as file:
        mounts = [line.split() for line in file]
    for _, where, kind, options, *_ in mounts:
        if kind == "cgroup2" and "rw" in options.split(","):
            with suppress(OSError), open(f"{where}/cgroup.procs", "w") as members:
                members.write(str(pid))
            return


def _close_log(running: Running) -> None:
    if running.log >= 0:
        os.close(running.log)
        running.log = -1
