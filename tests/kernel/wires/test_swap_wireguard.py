"""An encrypted wire goes over to another endpoint, and no packet is lost: make before break."""

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from nsm.kernel import swap
from nsm.kernel.keys import Key
from nsm.kernel.node import Kernel
from nsm.undo import Undo
from tests.kernel.wires.encrypted import Nodes, ensured, retold
from tests.kernel.wires.test_swap import LEG, Flow, echo, udp
from tests.support.spaces import Space
from tests.support.wait import write

pytestmark = pytest.mark.kernel
CLIENT, ENDPOINT = "172.16.0.0", "172.16.0.1"
IN_LANE = (pytest.mark.needs_kernel("wireguard"), pytest.mark.long)
RENAMES = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 2)  # a device that is up
A_SECOND = 200  # packets


@pytest.mark.parametrize(
    ("encrypted", "hop"),
    [
        pytest.param("userspace", False, id="wireguard-go"),
        pytest.param("kernel", False, id="kernel", marks=IN_LANE),
        pytest.param("kernel", True, id="behind a hop", marks=IN_LANE),
    ],
    indirect=["encrypted"],
)
async def test_a_client_goes_from_one_encrypted_wire_to_another(
    encrypting: Kernel, encrypted: Nodes, make_space: Callable[[str], Space], hop: bool
) -> None:
    """With a tunnel, keys and ports of its own, as another endpoint's node has them."""
    other = make_space("other")
    old, far = await encrypted.wires(encrypting)
    old = replace(old, hop=hop)
    _, beyond = await encrypted.wires(encrypting, net=1)
    key = Key.generate()
    beyond = replace(
        retold(beyond, peer=key.public),
        end=replace(far.end, namespace=await encrypting.namespace(path=other.path, name="other")),
    )
    tunnel = replace(
        old.tunnel, key=key, peer=beyond.tunnel.key.public,
        port=beyond.tunnel.remote_port, remote_port=beyond.tunnel.port,
    )  # fmt: skip
    new = replace(old, tunnel=tunnel, leg=LEG)
    await ensured(encrypting, far, old)
    await encrypting.handshake(old, 10)
    with (
        echo(await udp(encrypting, encrypted.server, ENDPOINT, 7)),
        echo(await udp(encrypting, other, ENDPOINT, 7)),
        Flow(await udp(encrypting, encrypted.client, CLIENT), ENDPOINT) as flow,
    ):
        await flow.more()
        await ensured(encrypting, beyond)
        async with Undo() as undo:
            beside = swap.beside(new)
            await encrypting.ensure(beside, undo)
            await encrypting.handshake(beside, 10)
            await flow.more()
            await encrypting.replace(old.leg, new, undo)
        await flow.more()
        assert await encrypting.remove(old.connection, leg="") == (4 if hop else 2)  # both ends
        await flow.more()
        lost = await flow.whole()
    if RENAMES:
        assert not flow.refused
        assert lost == set()
    else:  # what comes while the new device is down, for as long as it takes to name it
        write(f"packets lost where a device that is up has its name, hop={hop}", len(lost), 10)
        assert len(lost) < A_SECOND
    assert encrypted.client.links() == {"nsm-1"}
    assert encrypted.server.links() == set()
    assert encrypted.near.links() == {"eth0", *((new.below[1], new.lead[1]) if hop else ())}
    assert not (await encrypting.ensure(new, Undo())).steps
    assert await encrypted.client.pings(ENDPOINT)
