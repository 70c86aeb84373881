"""The sweep takes what carries our mark and is nobody's, and nothing else."""

import os
import subprocess

from forwarder.leftovers import Leftovers
from forwarder.recovery import Recovery
from nsm.connections import Connections
from nsm.kernel import owner
from nsm.kernel.node import Kernel
from nsm.kernel.state import Interface, LocalWire
from nsm.undo import Undo
from tests.support.spaces import Space

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
