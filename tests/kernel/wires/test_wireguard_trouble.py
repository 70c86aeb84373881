"""wireguard-go processes that hang, are somebody else's, or find no room."""

import asyncio
import os
import signal
import time

import pytest

from nsm.kernel.node import Kernel
from tests.kernel.wires.encrypted import Nodes, ensured, processes, remains
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
    await until(lambda: {state for _, state in processes()} == {"T"}, "all stand still", record=False)
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
    assert remains() == set()
