"""The sweep takes what carries our mark and is nobody's, and nothing else."""

import asyncio
import os
import subprocess
from dataclasses import replace

from forwarder.crossing import Crossing
from forwarder.leftovers import Leftovers
from forwarder.recovery import Recovery
from nsm.connections import Connections
from nsm.kernel import owner
from nsm.kernel.node import Kernel
from nsm.kernel.state import Interface, LocalWire
from nsm.model import Mechanism
from nsm.undo import Undo
from tests.support.spaces import Space
from tests.support.spaces import space as fresh
from tests.support.wait import until

NAME = f"sweep-{os.getpid()}"


def links(space):
    return {name for name in space.links() if name != "lo"}


async def test_what_nobody_holds_is_taken_away_and_what_somebody_holds_stays():
    group = str(owner.group(NAME))
    spaces = [Space(f"t{os.getpid()}-{side}") for side in "ab"]
    for space in spaces:
        subprocess.run(["ip", "netns", "add", space.name], check=True)
    try:
        async with Kernel(NAME) as kernel:
            a, b = [await kernel.namespace(path=f"/run/netns/{one.name}") for one in spaces]
            connections, recovery = Connections(), Recovery(kernel)
            leftovers = Leftovers(kernel, connections, recovery)
            async with Undo() as undo:
                for id_ in ("held", "lost", "scrawled", "before"):
                    ends = Interface(a, id_[:8]), Interface(b, id_[:8])
                    await kernel.ensure(LocalWire(id_, *ends), undo)
            for id_ in ("held", "scrawled"):
                async with connections.turn(id_) as held:
                    held.made = object()
            await recovery.look()
            for id_ in ("held", "lost", "scrawled"):
                recovery.settled(id_)
            # the workload writes over a mark of its own wire; somebody else has a device there
            spaces[0].run("ip", "link", "set", "scrawled", "alias", "nsm:other:src")
            spaces[0].run("ip", "link", "add", "theirs", "type", "bridge")
            # and one whose maker died before it said whose it is
            spaces[0].run("ip", "link", "add", "halfway", "group", group, "type", "bridge")
            async with connections.turn("making"):
                async with Undo() as undo:
                    ends = Interface(a, "making"), Interface(b, "making")
                    await kernel.ensure(LocalWire("making", *ends), undo)
                assert await leftovers.sweep() == 2
                assert links(spaces[0]) == {"held", "scrawled", "before", "making", "theirs",
                                            "halfway"}  # fmt: skip
            assert await leftovers.sweep() == 3, "what was made and not held, and the half-made"
            assert links(spaces[0]) == {"held", "scrawled", "before", "theirs"}
            assert links(spaces[1]) == {"held", "scrawled", "before"}
            assert await leftovers.sweep() == 0
            # what another workload writes on a device of its own hides nobody's wire
            # (numbered as late as can be: in whichever order all are found, theirs is the last)
            for space in spaces:
                for index, side in enumerate(("src", "dst"), (1 << 31) - 3):
                    named = ("index", str(index), "name", side, "group", group)
                    space.run("ip", "link", "add", *named, "type", "bridge")
                    space.run("ip", "link", "set", side, "alias", f"nsm:held:{side}")
            assert await leftovers.sweep() == 0
            assert await kernel.remove("held") == 2
            assert links(spaces[0]) == {"scrawled", "before", "theirs", "src", "dst"}
            await kernel.remove_all()
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space.name], check=True)


async def test_a_held_connections_other_wire_is_taken_away_and_no_wire_that_goes_over():
    """As a kill leaves one between a swap and the store's write: the wire before is held."""
    other = "ab12cd34"
    with fresh("a") as near, fresh("b") as far:
        async with Kernel(NAME) as kernel:
            a, b = [await kernel.namespace(path=one.path, name=one.name) for one in (near, far)]
            connections, recovery = Connections(), Recovery(kernel)
            leaving = set()
            leftovers = Leftovers(kernel, connections, recovery, leaving)

            def wire(leg: str) -> LocalWire:
                name = f"moved{leg[:2]}"
                return LocalWire("moved", Interface(a, name), Interface(b, name), leg)

            async with Undo() as undo:
                for leg in ("", other):
                    await kernel.ensure(wire(leg), undo)
            both = {"moved", "movedab"}
            async with connections.turn("moved") as held:
                held.made = object()
                held.memory = Crossing("nse", "IP", "", Mechanism(), None)
            assert await leftovers.sweep() == 0, "adopted: which one is in use is not known yet"
            async with connections.turn("moved") as held:
                held.memory = replace(held.memory, wire=wire(""))
            leaving.add(wire(other).id)
            assert await leftovers.sweep() == 0, "it is drained, and taken away then"
            leaving.clear()
            async with connections.turn("moved") as held:
                sweeping = asyncio.create_task(leftovers.sweep())  # while it goes over
                await until(lambda: held.waiting == 2, "the sweep waits for its turn", bar=0.5)
                held.memory = replace(held.memory, wire=wire(other), leg=other)
            await sweeping
            assert links(near) == links(far) == both, "the one in use was found as a leftover"
            near.run("ip", "link", "set", "movedab", "alias", "nsm:moved:src:leg=deadbeef")
            assert await leftovers.sweep() == 2, "both ends of the wire before"
            assert links(near) == links(far) == {"movedab"}, "whatever the workload wrote on it"
            await kernel.remove("moved")
            assert links(near) == links(far) == set()
