"""Who may outlive whom: workloads take their wires along, wires outlive the forwarder."""

import asyncio
import gc
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from nsm.errors import InvalidError, TakenError
from nsm.kernel import messages, namespaces, owner
from nsm.kernel.events import Kind, LinkChanged, LinkGone, NamespaceGone, Resync, Watch
from nsm.kernel.netlink import NamespaceGoneError, Refusal, Socket
from nsm.kernel.node import Kernel
from nsm.kernel.state import Hop, Interface, LocalWire, Namespace, RemoteWire, VxlanTunnel
from nsm.undo import Undo
from tests.support.spaces import Space, Workload, fds, holders, ip, kernel_state, workload
from tests.support.wait import until

pytestmark = pytest.mark.kernel


async def joined(
    kernel: Kernel, client: Namespace, server: Namespace, fd: int | None = None, id_: str = "id-1"
) -> LocalWire:
    wire = LocalWire(
        id_,
        Interface(client, "nsm-1", addresses=(ip_interface("10.0.0.1/31"),)),
        Interface(server, "nsm-2", addresses=(ip_interface("10.0.0.0/31"),)),
    )
    async with Undo() as undo:
        await kernel.ensure(wire, undo, fds={} if fd is None else {client: fd})
    return wire


async def test_a_killed_workload_takes_its_device_and_the_far_end_and_is_heard(
    kernel: Kernel, server: Space
) -> None:
    there = await kernel.namespace(path=server.path, name="server")
    with workload() as client:
        fd = os.open(client.ns, os.O_PATH)
        here = await kernel.namespace(fd=fd, name="client")
        heard = []
        async with Watch() as watch, asyncio.TaskGroup() as group:

            async def listen() -> None:
                async for event in watch:
                    heard.append(event)

            listening = group.create_task(listen())
            await until(lambda: heard, "the first event", bar=0.1)
            assert heard[0] == Resync()
            await joined(kernel, here, there, fd)
            os.close(fd)
            assert holders(here.inode) == []
            assert server.links() == {"nsm-2"}
            client.kill()
            await until(lambda: not server.links(), "the far end gone", bar=0.1)
            await until(
                lambda: NamespaceGone(here.nsid) in heard, "the namespace's death heard", bar=0.1
            )
            mark = owner.Mark("id-1", "dst")
            await until(
                lambda: any(
                    isinstance(e, LinkGone) and (e.nsid, e.mark) == (there.nsid, mark)
                    for e in heard
                ),
                "the far end's death heard",
                bar=0.1,
            )
            assert any(isinstance(e, LinkChanged) and e.mark == mark for e in heard)
            listening.cancel()
    assert await kernel.remove("id-1") == 0
    with pytest.raises(NamespaceGoneError):
        await kernel.within(here, lambda: None)


async def test_a_failed_attempt_does_not_keep_the_workload(kernel: Kernel, server: Space) -> None:
    there = await kernel.namespace(path=server.path, name="server")
    server.do("link", "add", "nsm-2", "type", "bridge")
    with workload() as client:
        here = await kernel.namespace(pid=client.pid, name="client")
        inode = os.stat(client.ns).st_ino
        with pytest.raises(TakenError):
            await joined(kernel, here, there)
        bad = Interface(
            here, "nsm-1", routes=(Hop(ip_network("10.0.0.0/8"), ip_address("127.0.0.1")),)
        )
        with pytest.raises(InvalidError):
            async with Undo() as undo:
                await kernel.ensure(LocalWire("id-2", bad, Interface(there, "x")), undo)
        assert holders(inode) == []
        await gone(kernel, client, here)


async def gone(kernel: Kernel, client: Workload, here: Namespace) -> None:
    """Kill it, and wait until the kernel says the number means nothing."""
    client.kill()
    with Socket.here() as own:
        await until(lambda: here.nsid not in namespaces.numbers(own), "the namespace gone", bar=0.1)


async def test_an_undone_attempt_does_not_keep_the_workload(kernel: Kernel, server: Space) -> None:
    there = await kernel.namespace(path=server.path, name="server")
    with workload() as client:
        here = await kernel.namespace(pid=client.pid, name="client")
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block is the matter
            async with Undo() as undo:
                await kernel.ensure(
                    LocalWire("id", Interface(here, "nsm-1"), Interface(there, "nsm-2")), undo
                )
                raise ZeroDivisionError
        assert holders(here.inode) == []
        assert server.links() == set()
        await gone(kernel, client, here)


async def test_a_workload_that_dies_before_the_undo_is_no_second_error(
    kernel: Kernel, server: Space
) -> None:
    there = await kernel.namespace(path=server.path, name="server")
    with workload() as client:
        here = await kernel.namespace(pid=client.pid, name="client")
        with pytest.raises(ZeroDivisionError) as failure:  # noqa: PT012 - the block is the matter
            async with Undo() as undo:
                wire = LocalWire("id", Interface(here, "nsm-1"), Interface(there, "nsm-2"))
                await kernel.ensure(wire, undo)
                await gone(kernel, client, here)
                raise ZeroDivisionError
        assert not getattr(failure.value, "__notes__", [])
        assert server.links() == set()


async def test_the_cookie_tells_a_reborn_inode_from_the_dead_one(kernel: Kernel) -> None:
    with workload() as first:
        old = await kernel.namespace(pid=first.pid, name="first")
        await gone(kernel, first, old)
    with workload() as second:
        new = await kernel.namespace(pid=second.pid, name="second")
        assert new != old
        # as if the inode were given again: the door is there and leads elsewhere
        pretender = replace(old, inode=new.inode, handle=b"")
        with pytest.raises(NamespaceGoneError):
            await kernel.within(pretender, lambda: None)
        assert await kernel.namespace(pid=second.pid) == new


@pytest.mark.parametrize("by", ["handle", "doors", "nsid"])
async def test_a_namespace_is_found_again_without_an_fd(kernel: Kernel, by: str) -> None:
    with workload() as process:
        known = await kernel.namespace(pid=process.pid, name="x")
        if by == "handle" and not known.handle:
            pytest.skip("the running kernel has no file handles of namespaces (Linux 6.18 has)")
        if by == "doors":
            known = replace(known, handle=b"")
        if by == "nsid":
            known = await kernel.namespace(nsid=known.nsid, name="x")
        found = await kernel.within(known, lambda: os.stat("/proc/thread-self/ns/net").st_ino)
        assert found == os.stat(process.ns).st_ino
        assert holders(found) == []


async def test_after_a_restart_everything_is_found_from_the_kernel_alone(
    client: Space, server: Space, make_space: Callable[[str], Space]
) -> None:
    before = kernel_state(client, server)
    near = make_space("near")
    async with Kernel("test") as first, Kernel("somebody else") as other:
        here = await first.namespace(path=client.path, name="client")
        there = await first.namespace(path=server.path, name="server")
        await joined(first, here, there)
        await joined_remote(first, here, await first.namespace(path=near.path, name="near"))
        foreign = LocalWire("theirs", Interface(here, "theirs"), Interface(there, "theirs"))
        async with Undo() as undo:
            await other.ensure(foreign, undo)
    client.do("link", "add", "eth0", "type", "bridge")
    async with Kernel("test") as second:
        found = await second.find()
        assert {(f.mark.connection, f.mark.side, f.device.name) for f in found if f.mark} == {
            ("id-1", "src", "nsm-1"),
            ("id-1", "dst", "nsm-2"),
            ("id-2", "src", "nsm-7"),
        }
        (tunnel,) = (f.device for f in found if f.device.kind == "vxlan")
        assert (tunnel.vni, str(tunnel.remote), tunnel.port) == (42, "192.0.2.2", 4789)
        assert await second.remove("id-1") == 2
        assert server.links() == {"theirs"}
        assert await second.remove_all() == 1
        assert client.links() == {"eth0", "theirs"}
    async with Kernel("somebody else") as other:
        assert await other.remove_all() == 2
    client.do("link", "del", "eth0")
    assert kernel_state(client, server) == before


async def joined_remote(kernel: Kernel, here: Namespace, near: Namespace) -> None:
    tunnel = VxlanTunnel(42, ip_address("192.0.2.1"), ip_address("192.0.2.2"), near)
    async with Undo() as undo:
        await kernel.ensure(RemoteWire("id-2", "src", Interface(here, "nsm-7"), tunnel), undo)


async def test_an_unfinished_device_of_ours_is_found_and_adopted(
    kernel: Kernel, client: Space, server: Space
) -> None:
    here = await kernel.namespace(path=client.path, name="client")
    there = await kernel.namespace(path=server.path, name="server")
    client.do(
        *f"link add nsm-1 group {kernel.group} type veth peer name nsm-2".split(),
        "netns",
        server.name,
    )
    (found,) = await kernel.find()  # the peer, made by stock ip, has no group
    assert found.mark is None
    server.do("link", "set", "nsm-2", "group", str(kernel.group))
    await joined(kernel, here, there)
    assert await client.pings("10.0.0.0")
    assert {f.mark for f in await kernel.find()} == {
        owner.Mark("id-1", "src"),
        owner.Mark("id-1", "dst"),
    }


async def test_a_workload_that_renames_its_interface_does_not_escape_removal(
    kernel: Kernel, client: Space, server: Space
) -> None:
    here = await kernel.namespace(path=client.path, name="client")
    there = await kernel.namespace(path=server.path, name="server")
    await joined(kernel, here, there)
    client.do("link", "set", "nsm-1", "name", "mine")
    assert await kernel.remove("id-1") == 2
    assert client.links() == server.links() == set()


async def test_a_workload_that_writes_over_a_mark_does_not_escape_removal(
    kernel: Kernel, client: Space, server: Space
) -> None:
    here = await kernel.namespace(path=client.path, name="client")
    there = await kernel.namespace(path=server.path, name="server")
    await joined(kernel, here, there)
    client.do("link", "set", "nsm-1", "alias", "mine", "down", "name", "mine")
    server.do("link", "del", "nsm-2")
    client.do(*["link", "add", "nsm-1", "type", "veth", "peer", "name", "x"])
    assert await kernel.remove("id-1") == 0  # nothing of it is left, and these are not ours
    assert client.links() == {"nsm-1", "x"}
    client.do("link", "del", "nsm-1")
    await joined(kernel, here, there)
    client.do("link", "set", "nsm-1", "alias", "mine")
    assert await kernel.remove("id-1") == 2
    assert client.links() == server.links() == set()


async def test_counters_count_and_a_gone_device_has_none(
    kernel: Kernel, client: Space, server: Space
) -> None:
    here = await kernel.namespace(path=client.path, name="client")
    there = await kernel.namespace(path=server.path, name="server")
    wire = await joined(kernel, here, there)
    async with Undo() as undo:
        places = (await kernel.ensure(wire, undo)).places
    assert await client.pings("10.0.0.0")
    both = await kernel.counters([places["src"], places["dst"]] * 30)
    stats = client.ip("-s", "link", "show", "nsm-1")[0]["stats64"]
    counted = both[0]
    assert counted is not None
    assert 0 < counted.tx_packets <= stats["tx"]["packets"]
    assert 0 < counted.rx_bytes <= stats["rx"]["bytes"]
    await kernel.remove("id-1")
    assert await kernel.counters([places["src"]]) == [None]


async def test_two_hundred_wires_leave_nothing(
    kernel: Kernel, client: Space, server: Space
) -> None:
    files = fds()
    here = await kernel.namespace(path=client.path, name="client")
    there = await kernel.namespace(path=server.path, name="server")

    def wire(n: int) -> LocalWire:
        near, far = (ip_interface(f"10.{n}.0.{side}/32") for side in (1, 2))
        return LocalWire(
            f"id-{n}",
            Interface(
                here,
                f"c-{n}",
                addresses=(near, ip_interface(f"2001:db8:{n:x}::1/128")),
                routes=(Hop(far.network),),
                neighbours=((far.ip, owner.mac(f"id-{n}", "dst")),),
            ),
            Interface(there, f"s-{n}", addresses=(far,), routes=(Hop(near.network),)),
        )

    async def one(n: int) -> None:
        async with Undo() as undo:
            await kernel.ensure(wire(n), undo)

    await one(0)
    await kernel.remove("id-0")
    state = kernel_state(client, server)
    async with asyncio.TaskGroup() as group:
        for n in range(200):
            group.create_task(one(n))
    assert len(client.links()) == len(server.links()) == 200
    assert len(await kernel.find()) == 400
    async with asyncio.TaskGroup() as group:
        for n in range(200):
            group.create_task(kernel.remove(f"id-{n}"))
    assert kernel_state(client, server) == state
    gc.collect()
    # the last deletions' threads still wait for the kernel
    await until(lambda: fds() <= files, "files closed", bar=0.5)
    homes = {
        os.readlink(f"/proc/self/task/{task}/ns/net") for task in os.listdir("/proc/self/task")
    }
    assert homes == {os.readlink("/proc/self/ns/net")}


async def test_threads_and_files_end_with_the_room(client: Space, server: Space) -> None:
    threads, files = {t.name for t in threading.enumerate()}, fds()
    async with Kernel("test") as kernel:
        here = await kernel.namespace(path=client.path, name="client")
        there = await kernel.namespace(path=server.path, name="server")
        await joined(kernel, here, there)
        assert await kernel.remove_all() == 2
        async with Watch(Kind.ALL):
            pass
    left = {t.name for t in threading.enumerate()} - threads
    assert not [name for name in left if name.startswith("kernel")]
    assert fds() == files


def test_the_error_at_the_end_of_a_dump_is_read() -> None:
    with Socket.here() as own:
        unused = max([*namespaces.numbers(own), 0]) + 1000
        with pytest.raises(Refusal, match="Invalid argument"):
            own.dump(messages.dump_links(unused))


async def test_lost_events_are_told_as_a_resync(kernel: Kernel, client: Space) -> None:
    await kernel.namespace(path=client.path, name="client")
    async with Watch() as watch:
        assert watch._sock is not None
        watch._sock.setsockopt(1, 8, 1)  # SO_RCVBUF: as small as the kernel allows
        events = aiter(watch)
        assert await anext(events) == Resync()
        for _ in range(5):  # the loop does not run meanwhile
            client.do("link", "add", "b0", "type", "bridge")
            client.do("link", "del", "b0")
        async with asyncio.timeout(5):
            while await anext(events) != Resync():
                pass
        watch._sock.setsockopt(1, 8, 1 << 20)
        client.do("link", "add", "b1", "type", "bridge")
        async with asyncio.timeout(5):
            while True:  # what was in the buffer when it overflowed comes first
                event = await anext(events)
                if isinstance(event, LinkChanged) and event.device.name == "b1":
                    break


def test_named_namespaces_are_what_stock_ip_makes_of_them() -> None:
    name = f"vw-named-{os.getpid()}"
    assert name not in namespaces.list_named()
    namespaces.create_named(name)
    try:
        assert name in namespaces.list_named()
        assert name in {entry["name"] for entry in ip("netns")}
        (loopback,) = Space(name).ip("link")
        assert "UP" in loopback["flags"]
        with pytest.raises(TakenError, match="there is a network namespace"):
            namespaces.create_named(name)
        inode = os.stat(f"/run/netns/{name}").st_ino
        assert holders(inode) == []
    finally:
        namespaces.delete_named(name)
    namespaces.delete_named(name)
    assert name not in {entry["name"] for entry in ip("netns")}
    assert not os.path.exists(f"/run/netns/{name}")
    for bad in ("", "a/b", "..", "x" * 300):
        with pytest.raises(InvalidError):
            namespaces.create_named(bad)
