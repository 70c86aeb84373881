"""wireguard-go processes that hang, are somebody else's, or find no room."""

import asyncio
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from nsm.errors import ExhaustedError
from nsm.kernel import owner
from nsm.kernel.node import Kernel
from tests.kernel.wires.encrypted import Nodes, ensured, processes, remains
from tests.support.spaces import fds
from tests.support.wait import until

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.parametrize("encrypted", ["userspace"], indirect=True),
]


async def hang() -> set[int]:
    """Stop all our processes, as if they hung; who they are."""
    stopped = {pid for pid, _ in processes()}
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    still = {"T"}
    await until(lambda: {state for _, state in processes()} == still, "all stand", record=False)
    return stopped


async def test_a_process_that_hangs_is_replaced_and_keeps_nobody_waiting(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await encrypted.wires(encrypting)
    await ensured(encrypting, far, near)
    await encrypting.handshake(near, 10)
    hanging = await hang()
    assert len(hanging) == 2
    began = time.monotonic()
    healing = [asyncio.create_task(ensured(encrypting, half)) for half in (far, near)]
    await asyncio.sleep(0)
    await encrypting.namespace(path=encrypted.client.path)
    assert time.monotonic() - began < 2, "an unrelated question, while both threads ask"
    await asyncio.gather(*healing)
    assert time.monotonic() - began < 5
    assert not hanging & {pid for pid, _ in processes()}
    await encrypting.handshake(near, 10)
    assert await encrypted.client.pings("172.16.0.1")
    await hang()
    assert await encrypting.remove(near.connection) == 2
    await until(lambda: not remains(), "what a closed wire left is taken away", bar=0.2)


@pytest.mark.parametrize("stranger", ["another program", "another user"])
async def test_a_process_is_not_ours_because_it_says_so(
    encrypting: Kernel, encrypted: Nodes, stranger: str
) -> None:
    """Anybody may have that word in an environment, and who is taken for ours is killed."""
    near, _ = await encrypted.wires(encrypting)
    said = {"VWIRE_OWNER": f"{encrypting.group:08x}/{encrypting.own.cookie:x}/nsm:mine:src"}
    path = f"/run/wireguard/{owner.tunnel_name('mine', 'src')}.sock"
    os.makedirs("/run/wireguard", exist_ok=True)
    with socket.socket(socket.AF_UNIX) as stale, _running(stranger, said) as other:
        stale.bind(path)
        try:
            await encrypting.find()
            await encrypting.remove("mine")
            assert other.poll() is None
            await ensured(encrypting, near)
            assert other.poll() is None
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)


@contextmanager
def _running(stranger: str, said: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process with those variables that is not what they say."""
    sleep = shutil.which("sleep")
    assert sleep
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        program, other = Path(folder) / "wireguard-go", {}
        if stranger == "another user":
            shutil.copy(sleep, program)
            other = {"user": 65534, "group": 65534, "extra_groups": []}
        else:
            program = Path(sleep)
        with subprocess.Popen([program, "600"], env=said, cwd="/", **other) as running:
            try:
                yield running
            finally:
                running.kill()


async def test_without_room_for_files_that_is_said_and_nothing_is_left(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, _ = await encrypted.wires(encrypting)
    before, steps = fds(), 0
    for room in range(60):
        with _room(room):
            try:
                await ensured(encrypting, near)
                break
            except ExhaustedError as failure:
                said = str(failure)
        steps += 1
        assert "Too many open files" in said
        assert "raise the limit of open files" in said
        assert remains() == set(), room
        assert encrypted.client.links() == set(), room
    assert steps > 5
    await encrypting.remove(near.connection)
    await until(lambda: not fds() - before, "no file stays open", record=False)


@contextmanager
def _room(files: int) -> Iterator[None]:
    """This process may open so many files more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    there = {int(one) for one in os.listdir("/proc/self/fd")}
    free = (number for number in range(soft) if number not in there)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, files, None)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
