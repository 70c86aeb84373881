"""Closing wires of wireguard-go: gone with their devices, while their processes still end."""

import asyncio
import os
import signal

import pytest

from nsm.errors import InternalError
from nsm.kernel import owner, wireguard_go
from nsm.kernel.node import Kernel
from tests.kernel.wires.encrypted import INSTANCE, Nodes, ensured, processes, remains
from tests.support.wait import until

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.parametrize("encrypted", ["userspace"], indirect=True),
]
AT_ONCE = 30


@pytest.fixture
def undying(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if processes took their time to end, until undone: no signal of ours reaches them."""
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: None)
    return monkeypatch


async def hang() -> None:
    """So they do not end by themselves either, with their devices."""
    for pid, _ in processes():
        os.kill(pid, signal.SIGSTOP)
    await until(lambda: {state for _, state in processes()} == {"T"}, "all stand", record=False)


async def released() -> None:
    for pid, _ in processes():
        os.kill(pid, signal.SIGKILL)
    await until(lambda: not remains(), "what closed wires left is taken away", bar=0.2)


async def test_a_wire_is_gone_with_its_devices_and_nobody_is_told_of_its_process(
    encrypting: Kernel, encrypted: Nodes, undying: pytest.MonkeyPatch
) -> None:
    told: list[owner.Mark] = []
    encrypting.on_engine_end = told.append
    near, far = await encrypted.wires(encrypting)
    await ensured(encrypting, far, near)
    await hang()
    assert await encrypting.remove(near.connection) == 2
    assert encrypted.client.links() == encrypted.server.links() == set()
    assert len(list(processes())) == 2
    undying.undo()
    await released()
    assert told == []


async def test_a_wire_asked_for_again_at_once_waits_for_the_process_before(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await encrypted.wires(encrypting)
    for _ in range(5):
        await ensured(encrypting, far, near)
        assert await encrypting.remove(near.connection) == 2
    await ensured(encrypting, far, near)
    await encrypting.handshake(near, 10)
    assert await encrypted.client.pings("172.16.0.1")
    assert [state for _, state in processes() if state == "Z"] == []


async def test_who_stops_right_after_a_close_leaves_no_process_and_no_socket(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    for _ in range(5):
        async with Kernel(INSTANCE) as short:
            near, _ = await encrypted.wires(short)
            await ensured(short, near)
            assert await short.remove(near.connection) == 1
        assert remains() == set()


async def test_a_process_that_does_not_die_is_told_and_its_wire_not_made_over_it(
    encrypting: Kernel,
    encrypted: Nodes,
    undying: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    undying.setattr(wireguard_go, "DIES", 0.2)
    near, _ = await encrypted.wires(encrypting)
    await ensured(encrypting, near)
    await hang()
    await encrypting.remove(near.connection)
    await until(lambda: "does not die" in caplog.text, "a process that stays is told", bar=0.3)
    assert near.connection in caplog.text
    with pytest.raises(InternalError, match="does not die"):
        await ensured(encrypting, near)
    undying.undo()
    await released()
    await ensured(encrypting, near)


async def test_thirty_closed_at_once_leave_nothing(encrypting: Kernel, encrypted: Nodes) -> None:
    wires = [(await encrypted.wires(encrypting, name=f"nsm-{n}", net=n))[0] for n in range(AT_ONCE)]
    await ensured(encrypting, *wires)
    removing = [encrypting.remove(wire.connection) for wire in wires]
    assert await asyncio.gather(*removing) == [1] * AT_ONCE
    assert encrypted.client.links() == set()
    await until(lambda: not remains(), "what closed wires left is taken away", bar=0.5)
