"""Who outlives whom: an encrypted wire outlives its forwarder, and nothing outlives the wire."""

import base64
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nsm.errors import NsmError, TakenError
from nsm.kernel import owner, wireguard_go
from nsm.kernel.capabilities import NET_ADMIN
from nsm.kernel.netlink import Refusal, Socket
from nsm.kernel.node import Kernel
from nsm.undo import Undo
from tests.kernel.wires.encrypted import (
    ALIKE,
    INSTANCE,
    Nodes,
    ensured,
    processes,
    remains,
    retold,
    seat,
)
from tests.kernel.wires.mortal import counted
from tests.support.spaces import holders, kernel_state, workload
from tests.support.wait import until

pytestmark = pytest.mark.kernel
ROOT = Path(__file__).parents[3]
ANY_STEP = 60  # more than making a wire has


async def test_keys_and_ports_are_read_back_by_the_next_life_which_changes_nothing(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    async with Kernel(INSTANCE) as first:
        near, far = await encrypted.wires(first)
        await ensured(first, far, near)
        await first.handshake(near, 10)
        assert await encrypted.client.pings("172.16.0.1")
    before, objects = encrypted.wg(near), remains()
    async with Kernel(INSTANCE) as second:
        found = await second.find()
        assert {(one.mark.side, one.device.name) for one in found if one.mark} == {
            ("src", "nsm-1"),
            ("dst", "nsm-1"),
        }
        for half in (near, far):
            standing = await second.standing_wireguard(half.connection, half.side, seat(half))
            assert standing is not None
            assert (standing.key, standing.port) == (half.tunnel.key, half.tunnel.port)
            assert standing.engine == encrypted.engine
            for elsewhere in (half.end.namespace, "nsm-2"), (half.tunnel.underlay, "nsm-1"):
                assert not await second.standing_wireguard(half.connection, half.side, elsewhere)
        assert await second.standing_wireguard("somebody else's", "src", seat(near)) is None
        assert await ensured(second, near, far) == ()
        assert await second.handshake(near, 10) == 0
        assert (encrypted.wg(near), remains()) == (before, objects)
        assert await encrypted.client.pings("172.16.0.1")
        assert await second.remove(near.connection) == 2
        await until(lambda: not remains(), "what a closed wire left is taken away", bar=0.2)
        assert await second.remove(near.connection) == 0
    assert encrypted.client.links() == encrypted.server.links() == set()


@ALIKE
async def test_a_life_that_looks_at_nothing_first_still_takes_it_away(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    async with Kernel(INSTANCE) as first:
        near, _ = await encrypted.wires(first)
        await ensured(first, near)
    async with Kernel(INSTANCE) as second:
        await second.namespace(path=encrypted.client.path)
        assert await second.remove(near.connection) == 1
    assert remains() == set()
    assert encrypted.client.links() == set()


@ALIKE
async def test_another_instance_on_the_same_machine_is_left_alone(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await encrypted.wires(encrypting)
    await ensured(encrypting, far, near)
    before = remains()
    async with Kernel("somebody else") as other:
        assert await other.find() == ()
        assert await other.remove_all() == 0
        assert await other.standing_wireguard(near.connection, "src", seat(near)) is None
    assert remains() == before
    assert await encrypting.handshake(near, 10) >= 0
    assert await encrypted.client.pings("172.16.0.1")


async def test_a_killed_workload_takes_everything_of_its_wire_along(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, _ = await encrypted.wires(encrypting)
    underlay = near.tunnel.underlay
    with workload() as one:
        there = await encrypting.namespace(pid=one.pid, name="mortal")
        await ensured(encrypting, replace(near, end=replace(near.end, namespace=there)))
        assert holders(there.inode) == []
        assert not await encrypting.port_free(51900, underlay=underlay)
        one.kill()

        async def free() -> bool:
            return await encrypting.port_free(51900, underlay=underlay)

        await until(lambda: not remains(), "nothing remains of a dead workload's wire", bar=0.2)
        await until(free, "a dead workload's port is free", bar=0.2)
    assert await encrypting.remove(near.connection) == 0
    assert encrypted.near.links() == {"eth0"}


@ALIKE
async def test_nothing_of_ours_stays_in_the_workload(encrypting: Kernel, encrypted: Nodes) -> None:
    near, far = await encrypted.wires(encrypting)
    await ensured(encrypting, far, near)
    await encrypting.handshake(near, 10)
    assert await encrypting.standing_wireguard(near.connection, "src", seat(near))
    taken = retold(near, port=51901)
    held = await encrypting.within(near.tunnel.underlay, lambda: _held(51901))
    with held, pytest.raises(TakenError):
        await ensured(encrypting, taken)
    assert holders(near.end.namespace.inode) == []
    for pid, _ in processes():
        assert os.readlink(f"/proc/{pid}/ns/net") != f"net:[{near.end.namespace.inode}]"


@ALIKE
async def test_what_stands_is_read_by_the_way_its_caller_has(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    """As without CAP_SYS_PTRACE: no process shows where a workload's namespace is."""
    near, _ = await encrypted.wires(encrypting)
    with ExitStack() as opened:
        with workload() as one:
            door = os.open(f"/proc/{one.pid}/ns/net", os.O_PATH)
            opened.callback(os.close, door)
            there = await encrypting.namespace(fd=door, name="held open")
        near = replace(near, end=replace(near.end, namespace=there))
        async with Undo() as undo:
            await encrypting.ensure(near, undo, fds={there: door})
        standing = await encrypting.standing_wireguard(
            near.connection, "src", seat(near), fds={there: door}
        )
        assert standing
        assert (standing.key, standing.port) == (near.tunnel.key, near.tunnel.port)
        await encrypting.remove(near.connection)
        assert not await encrypting.standing_wireguard(near.connection, "src", seat(near))


def _held(port: int) -> socket.socket:
    held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    held.bind(("", port))
    return held


@pytest.mark.parametrize("how", [pytest.param("refused", marks=pytest.mark.long), "failed"])
async def test_a_failure_at_any_step_leaves_nothing(
    encrypting: Kernel, encrypted: Nodes, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    near, _ = await encrypted.wires(encrypting)
    before = encrypted.near.links(), kernel_state(encrypted.client)

    class StopHereError(OSError):
        pass

    def stop() -> None:
        raise StopHereError(errno.ENOMEM, "as if the machine had no memory left")

    for step in range(1, ANY_STEP):
        with monkeypatch.context() as patch:
            wrap = counted(step, stop)
            if how == "refused":  # by whoever is asked: the kernel, or wireguard-go by ending
                patch.setattr(Socket, "do", _refusing(wrap, Socket.do))
                patch.setattr(wireguard_go, "_ask", _silent(wrap, wireguard_go._ask))
            else:
                patch.setattr(Socket, "do", wrap(Socket.do))
                patch.setattr(wireguard_go, "_ask", wrap(wireguard_go._ask))
            patch.setattr(os, "posix_spawn", wrap(os.posix_spawn))
            failure: Exception | None = None
            try:
                await ensured(encrypting, near)
            except (NsmError, StopHereError) as told:
                failure = told
        if failure is None:
            break
        assert not getattr(failure, "__notes__", [])
        assert encrypted.client.links() == set(), step
        assert remains() == set(), step
    assert step > 3
    assert await encrypting.remove(near.connection) == 1
    assert (encrypted.near.links(), kernel_state(encrypted.client)) == before


def _refusing(wrap: Callable[[Any], Any], do: Callable[..., Any]) -> Callable[..., Any]:
    def refused(self: Socket, batch: list[bytearray]) -> list[Refusal | None]:
        try:
            return wrapped(self, batch)
        except OSError:
            return [Refusal(errno.ENOMEM)] * len(batch)

    wrapped = wrap(do)
    return refused


def _silent(wrap: Callable[[Any], Any], ask: Callable[..., Any]) -> Callable[..., Any]:
    def silent(*asked: Any) -> str | None:
        try:
            return wrapped(*asked)
        except OSError:
            return None

    wrapped = wrap(ask)
    return silent


@ALIKE
async def test_a_forwarder_killed_at_any_step_leaves_nothing_its_next_life_does_not_take_away(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, _ = await encrypted.wires(encrypting)
    before = kernel_state(encrypted.client)
    words = [
        INSTANCE,
        near.connection,
        encrypted.near.path,
        encrypted.client.path,
        encrypted.engine,
    ]
    with lives(words) as live:
        for step in range(1, ANY_STEP):
            code = live(step)
            async with Kernel(INSTANCE) as later:  # as a forwarder that starts again
                found = await later.find()
                await later.remove_found([one for one in found if one.mark is None])
                if code == 0:
                    assert await later.remove(near.connection) == 1
                    break
                assert code == -signal.SIGKILL
                if any(one.mark for one in found):  # nobody comes back for it
                    await later.remove(near.connection)
            await until(lambda: not remains(), "nothing remains of a killed attempt", bar=0.2)
            assert encrypted.near.links() == {"eth0"}, step
            assert encrypted.client.links() == set(), step
    assert step > 3
    assert kernel_state(encrypted.client) == before


@contextmanager
def lives(words: list[str]) -> Iterator[Callable[[int], int]]:
    """Has a forwarder live until so many steps are done; its exit code."""
    command = [sys.executable, "-P", "-m", "tests.kernel.wires.mortal", *words, "each"]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as lived:  # fmt: skip

        def live(steps: int) -> int:
            assert lived.stdin is not None
            assert lived.stdout is not None
            print(steps, file=lived.stdin, flush=True)
            return int(lived.stdout.readline())

        yield live


@pytest.mark.parametrize("encrypted", ["userspace"], indirect=True)
async def test_a_killed_process_is_collected_and_its_wire_made_anew(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await encrypted.wires(encrypting)
    await ensured(encrypting, far, near)
    for half in (near, far):
        name = owner.tunnel_name(half.connection, half.side)
        (pid,) = (
            pid
            for pid, _ in processes()
            if name in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        )
        os.kill(pid, signal.SIGKILL)

        def gone(pid: int = pid, name: str = name) -> bool:
            return not os.path.exists(f"/proc/{pid}") and not os.path.lexists(
                f"/run/wireguard/{name}.sock"
            )

        await until(gone, "a killed process and what it leaves", bar=0.2)
    assert encrypted.client.links() == set()
    await ensured(encrypting, far, near)
    await encrypting.handshake(near, 10)
    assert await encrypted.client.pings("172.16.0.1")


@pytest.mark.parametrize("encrypted", ["userspace"], indirect=True)
async def test_what_dead_processes_left_is_in_nobodys_way_and_is_swept(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, _ = await encrypted.wires(encrypting)
    async with Kernel(INSTANCE) as first:
        await ensured(first, near)
    (process,) = processes()
    sockets = {one for one in remains() if one.startswith("socket")}
    os.kill(process[0], signal.SIGKILL)
    os.waitpid(process[0], 0)
    assert sockets
    assert sockets <= remains()
    async with Kernel(INSTANCE) as second:
        assert await second.find() == ()
        assert remains() == set()
    path = f"/run/wireguard/{owner.tunnel_name(near.connection, near.side)}.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    await ensured(encrypting, near)
    await encrypting.remove(near.connection)
    await until(lambda: not remains(), "what a closed wire left is taken away", bar=0.2)
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(path)
        foreign.listen()
        with pytest.raises(TakenError, match="another process listens on"):
            await ensured(encrypting, near)
        assert os.path.exists(path)
    os.unlink(path)


@pytest.mark.parametrize("encrypted", ["userspace"], indirect=True)
async def test_a_process_is_by_itself_and_shows_no_key(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, _ = await encrypted.wires(encrypting)
    await ensured(encrypting, near)
    ((pid, _),) = processes()
    folder = Path(f"/proc/{pid}")
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    group, session = int(fields[2]), int(fields[3])
    assert session == group == pid  # no signal to us or to a terminal is meant for it
    assert os.readlink(folder / "ns/net") == f"net:[{near.tunnel.underlay.inode}]"
    said = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
    for form in (near.tunnel.key.secret.hex(), base64.b64encode(near.tunnel.key.secret).decode()):
        assert form.encode() not in said
    assert f"nsm:{near.connection}:src".encode() in said
    path = f"/run/wireguard/{owner.tunnel_name(near.connection, near.side)}.sock"
    assert os.stat(path).st_mode & 0o777 == 0o600
    # what it says goes into a file in memory that takes no more
    assert os.readlink(folder / "fd/1").startswith("/memfd:")
    with pytest.raises(PermissionError), open(folder / "fd/1", "ab", buffering=0) as log:
        log.write(b"x")


@pytest.mark.parametrize("encrypted", ["userspace"], indirect=True)
async def test_a_process_may_do_what_its_device_takes_and_nothing_else_we_may(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    before = held(os.getpid(), "CapBnd")
    near, _ = await encrypted.wires(encrypting)
    await ensured(encrypting, near)
    ((pid, _),) = processes()
    kinds = ("CapPrm", "CapEff", "CapBnd")
    assert [held(pid, kind) for kind in kinds] == [1 << NET_ADMIN] * 3
    assert held(os.getpid(), "CapBnd") == before  # what was lowered is another thread's


def held(pid: int, kind: str) -> int:
    """A set of a process's capabilities, as the kernel has it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith(kind))


@pytest.fixture
def doomed() -> Iterator[Path]:
    """A cgroup."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [
        where for _, where, kind, options, *_ in mounts if kind == "cgroup2" and "rw" in options
    ]
    if not roots:
        pytest.skip("kernel lacks cgroups that may be made")
    made = Path(roots[0]) / f"vw-test-{os.getpid()}"
    made.mkdir()
    yield made
    made.rmdir()


@pytest.mark.parametrize("encrypted", ["userspace"], indirect=True)
async def test_a_process_outlives_the_cgroup_of_the_forwarder_and_leaves_none(
    encrypting: Kernel, encrypted: Nodes, doomed: Path
) -> None:
    near, _ = await encrypted.wires(encrypting)
    paths = [encrypted.near.path, encrypted.client.path]
    words = [INSTANCE, near.connection, *paths, encrypted.engine, "0"]
    enter = f'echo $$ > {doomed}/cgroup.procs && exec "$@"'
    command = ["sh", "-c", enter, "sh", sys.executable, "-P", "-m", "tests.kernel.wires.mortal"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *words], cwd=ROOT, env=environment, capture_output=True)
    assert done.stdout == b"whole\n", done.stderr
    ((pid, _),) = processes()
    assert f"/{doomed.name}" not in Path(f"/proc/{pid}/cgroup").read_text()
    (doomed / "cgroup.kill").write_text("1")
    await encrypting.find()
    assert await encrypting.standing_wireguard(near.connection, "src", seat(near))
    assert [number for number, _ in processes()] == [pid]


def test_on_this_node_is_found_by_trying_and_the_answer_says_what_would_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trial = (
        "import asyncio, json; from nsm.kernel.node import Kernel\n"
        "async def main():\n"
        f"    async with Kernel({INSTANCE!r}) as kernel:\n"
        "        for prefer in ('auto', 'kernel', 'userspace'):\n"
        "            found = await kernel.find_wireguard(prefer)\n"
        "            print(json.dumps([found.name, found.why]))\n"
        "asyncio.run(main())\n"
    )

    def found(*before: str, **variables: str) -> list[list[str]]:
        done = subprocess.run(
            [*before, sys.executable, "-P", "-c", trial],
            env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    links = os.listdir("/sys/class/net")
    auto, kernel, userspace = found()
    has = subprocess.run(
        ["unshare", "-n", "ip", "link", "add", "type", "wireguard"], capture_output=True
    )
    if has.returncode:
        assert kernel == ["", "the kernel has no WireGuard; modprobe wireguard"]
        assert auto[0] == "userspace"
        assert "the kernel has no WireGuard" in auto[1]
    else:
        assert kernel == auto == ["kernel", "the kernel made a WireGuard device"]
    assert userspace[0] == "userspace"
    hidden = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh")
    assert found(*hidden)[2][0] == ""
    assert "/dev/net/tun" in found(*hidden)[2][1]
    away = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /usr/bin && exec "$@"', "sh")
    python = os.path.realpath(sys.executable)
    if not python.startswith("/usr/bin/"):
        assert "there is no wireguard-go on this node; apt-get install" in found(*away)[2][1]
    assert os.listdir("/sys/class/net") == links
    assert remains() == set()
