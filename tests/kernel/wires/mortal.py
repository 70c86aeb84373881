"""A forwarder's kernel work that is killed at a certain step of making an encrypted wire.

    python -P -m tests.kernel.wires.mortal INSTANCE ID NEAR CLIENT ENGINE STEP

A step is a batch sent to the kernel, a process started, or a word with one. Says "whole" and
ends well where there are fewer steps than that. With STEP "each", steps are read line by line, each
is a child's, and its exit code is said: Python starts once, which takes seconds in the lane.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from ipaddress import ip_address, ip_interface
from typing import Any

from nsm.kernel import wireguard_go
from nsm.kernel.keys import Key
from nsm.kernel.netlink import Socket
from nsm.kernel.node import Kernel
from nsm.kernel.state import Interface, RemoteWire, WireguardTunnel
from nsm.undo import Undo


def counted(steps: int, act: Callable[[], None]) -> Callable[[Any], Any]:
    """Wraps what is to be counted: at the step of that number, act is called instead."""
    left = [steps]

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                act()
            return function(*args, **kwargs)

        return step

    return wrap


async def main(instance: str, id_: str, near: str, client: str, engine: str, step: str) -> None:
    async with Kernel(instance) as kernel, Undo() as undo:
        underlay = await kernel.namespace(path=near, name="near")
        there = await kernel.namespace(path=client, name="client")
        end = Interface(there, "nsm-1", mtu=1440, addresses=(ip_interface("172.16.0.0/32"),))
        tunnel = WireguardTunnel(
            Key.generate(),
            Key.generate().public,
            ip_address("192.0.2.1"),
            ip_address("192.0.2.2"),
            51901,
            underlay,
            51900,
            engine,  # type: ignore[arg-type] # one of the two
            10,
        )
        wrap = counted(int(step), lambda: os.kill(os.getpid(), signal.SIGKILL))
        Socket.do = wrap(Socket.do)
        wireguard_go._ask = wrap(wireguard_go._ask)
        os.posix_spawn = wrap(os.posix_spawn)
        await kernel.ensure(RemoteWire(id_, "src", end, tunnel), undo)


def each(*words: str) -> None:
    """One life for each step that is asked for."""
    for step in sys.stdin:
        if (pid := os.fork()) == 0:
            asyncio.run(main(*words, step))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    *asked, number = sys.argv[1:]
    if number == "each":
        each(*asked)
    else:
        asyncio.run(main(*asked, number))
        print("whole")
