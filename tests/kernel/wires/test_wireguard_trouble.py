"""wireguard-go processes that hang, are somebody else's, or find no room."""

import asyncio
import os
import signal
import time

import pytest

from nsm.kernel.node import Kernel
from tests.kernel.wires.encrypted import Nodes, ensured, processes, remains

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.parametrize("encrypted", ["userspace"], indirect=True),
]


async def test_a_process_that_hangs_is_replaced_and_keeps_nobody_waiting(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await encrypted.wires(encrypting)
    await ensured(encrypting, far, near)
    await encrypting.handshake(near, 10)
    hanging = {pid for pid, _ in processes()}
    assert len(hanging) == 2
    for pid in hanging:
        os.kill(pid, signal.SIGSTOP)
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
    for pid, _ in processes():
        os.kill(pid, signal.SIGSTOP)
    assert await encrypting.remove(near.connection) == 2
    assert remains() == set()
