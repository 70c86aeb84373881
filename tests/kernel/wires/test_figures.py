"""What a wire costs, against one raw netlink batch of the same messages in the same run."""

import os
import statistics
import time
from ipaddress import ip_interface

import pytest

from bench.raw import Measured, wire
from nsm.kernel.namespaces import Home
from nsm.kernel.node import Kernel
from nsm.kernel.state import Interface, LocalWire
from nsm.undo import Undo
from tests.support.spaces import Space
from tests.support.wait import until, write

pytestmark = pytest.mark.kernel

ROUNDS = 60
BAR = 2.0


def settled(*spaces: Space) -> bool:
    return not any(
        info.get("tentative")
        for space in spaces
        for link in space.ip("addr")
        for info in link["addr_info"]
    )


async def test_programming_a_wire_costs_at_most_twice_its_raw_netlink_batch(
    kernel: Kernel, client: Space, server: Space
) -> None:
    here = await kernel.namespace(path=client.path, name="client")
    there = await kernel.namespace(path=server.path, name="server")
    awaited, refresh = [], []
    with Home() as home:
        paths = {here: client.path, there: server.path}
        measured = Measured(kernel, home, paths, lambda n: wire(here, there, n))
        for n in range(ROUNDS):
            await measured.turn(n)
    fds = {here: os.open(client.path, os.O_PATH), there: os.open(server.path, os.O_PATH)}
    for n in range(ROUNDS):
        wanted = wire(here, there, n)
        start = time.perf_counter()
        async with Undo() as undo:
            await kernel.ensure(wanted, undo, fds=fds)
        awaited.append(time.perf_counter() - start)
        start = time.perf_counter()
        async with Undo() as undo:
            assert not (await kernel.ensure(wanted, undo, fds=fds)).steps
        refresh.append(time.perf_counter() - start)
        await kernel.remove(wanted.connection)
    for fd in fds.values():
        os.close(fd)
    raw, ours = measured.making.medians
    from_loop = statistics.median(awaited)
    print(
        f"raw {raw * 1e6:.0f} us, ensure {ours * 1e6:.0f} us, awaited {from_loop * 1e6:.0f} us,"
        f" refresh {statistics.median(refresh) * 1e6:.0f} us: ensure/raw {ours / raw:.2f},"
        f" awaited/raw {from_loop / raw:.2f}"
    )
    write("kernel programming of one wire / its raw netlink batch", ours / raw, BAR)
    raw_away, away = measured.closing.medians
    write("closing one wire / one raw delete message", away / raw_away, BAR)
    write("the same awaited from the loop / its raw netlink batch", from_loop / raw, BAR)
    assert ours / raw < 10 * BAR


@pytest.mark.long
async def test_a_thousand_wires_beside_it_do_not_slow_a_wire(
    kernel: Kernel, client: Space, server: Space
) -> None:
    here = await kernel.namespace(path=client.path, name="client")
    there = await kernel.namespace(path=server.path, name="server")
    medians = []
    with Home() as home:
        for present in (10, 1000):
            async with Undo() as undo:
                for n in range(present):
                    near, far = (
                        Interface(
                            space,
                            f"o{n}",
                            addresses=(ip_interface(f"10.{220 + n // 250}.{n % 250}.{side}/32"),),
                            ping=False,
                        )
                        for side, space in ((1, here), (2, there))
                    )
                    await kernel.ensure(LocalWire(f"other-{n}", near, far), undo)
            # until then the kernel works on the link-local addresses, and holds the same lock
            await until(lambda: settled(client, server), f"{present} wires at rest", bar=5)
            paths = {here: client.path, there: server.path}
            measured = Measured(kernel, home, paths, lambda n: wire(here, there, n))
            for n in range(ROUNDS):
                await measured.turn(n)
            medians.append(measured.making.medians)
    (raw_few, few), (raw_many, many) = medians
    print(
        f"with 10: {few * 1e6:.0f} us (raw {raw_few * 1e6:.0f}), with 1000: {many * 1e6:.0f} us"
        f" (raw {raw_many * 1e6:.0f}): {many / few:.2f}, the kernel's own {raw_many / raw_few:.2f}"
    )
    # bringing a device up makes the kernel walk the namespace's IPv6 routes, whoever asks
    growth = (many / few) / (raw_many / raw_few)
    write("a wire with 1000 beside it / with 10, over the kernel's own growth", growth, 1.2)
    await kernel.remove_all()
    assert growth < 12
