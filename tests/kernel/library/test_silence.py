"""A machine that is gone is told from a process that hangs, by what the kernel acknowledges."""

import asyncio
import os
import sys
import time
from pathlib import Path

from tests.support.spaces import space
from tests.support.wait import until

HANGS = """
import socket, sys
door = socket.create_server(("10.9.0.2", 5000))
print("listens", flush=True)
held, _ = door.accept()
sys.stdin.read()  # and reads nothing
"""
ASKS = """
import socket, sys, time
from nsm.rpc.sockets import Silence
end = socket.create_connection(("10.9.0.2", 5000))
silence = Silence(end)
for order in sys.stdin:
    if order != "look\\n":
        end.send(b"are you there")
    if order == "only send\\n":
        print("0.0 sent", flush=True)
        continue
    print(silence.lasts(time.monotonic()), silence.bearable, flush=True)
"""
GIVES_UP = """
import socket, struct, sys
door = socket.create_server(("10.9.0.2", 5000))
print("listens", flush=True)
held, _ = door.accept()
sys.stdin.readline()
held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
held.close()  # with a reset, and that is lost
print("gave up", flush=True)
sys.stdin.read()
"""
WAITS = """
import socket
from nsm.rpc.sockets import watch_for_death
end = socket.create_connection(("10.9.0.2", 5000))
watch_for_death(end)
print("waits", flush=True)
try:
    end.recv(1)
except ConnectionResetError:
    print("told", flush=True)
"""


async def child(where, script: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        "ip", "netns", "exec", where.name, sys.executable, "-P", "-c", script,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip


def joined(here, far) -> None:
    here.do("link", "add", "w0", "type", "veth", "peer", "name", "w0", "netns", far.name)
    for one, last in ((here, 1), (far, 2)):
        one.do("link", "set", "w0", "up")
        one.do("addr", "add", f"10.9.0.{last}/24", "dev", "w0")


async def test_who_waits_for_one_that_gave_up_meanwhile_is_told_soon_after_packets_pass_again():
    with space("here") as here, space("far") as far:
        joined(here, far)
        giving = await child(far, GIVES_UP)
        assert await giving.stdout.readline() == b"listens\n"
        waiting = await child(here, WAITS)
        assert await waiting.stdout.readline() == b"waits\n"
        far.do("link", "set", "w0", "down")
        giving.stdin.write(b"give up\n")
        assert await giving.stdout.readline() == b"gave up\n"
        far.do("link", "set", "w0", "up")
        told = asyncio.create_task(waiting.stdout.readline())
        await until(told.done, "a wait for who gave up to end", bar=0.8, record=False)
        assert told.result() == b"told\n"
        giving.stdin.close()
        for one in (giving, waiting):
            await asyncio.wait_for(one.wait(), 5)


async def test_a_gone_machine_acknowledges_nothing_and_a_hanging_process_does():
    with space("here") as here, space("far") as far:
        joined(here, far)
        hanging = await child(far, HANGS)
        assert await hanging.stdout.readline() == b"listens\n"
        asking = await child(here, ASKS)

        async def look(order: str) -> tuple[float, float]:
            asking.stdin.write(f"{order}\n".encode())
            lasts, bearable = (await asyncio.wait_for(asking.stdout.readline(), 5)).split()
            return float(lasts), float(bearable)

        async def lasts(order: str = "look") -> float:
            return (await look(order))[0]

        await lasts("send")

        async def acknowledged() -> bool:
            return await lasts() == 0.0

        await until(acknowledged, "what a hanging process was sent to be acknowledged", bar=0.5)
        # what is said at once, and after 0.2, 0.6 and 1.4 s; longer where that takes its time
        assert 1.5 <= (await look("look"))[1] < 5
        far.do("link", "set", "w0", "down")
        assert await lasts() == 0.0, "nothing was sent"
        await lasts("send")

        async def long() -> bool:
            return await lasts() > 1.0

        await until(long, "a second without an acknowledgement", bar=1.3, record=False)
        far.do("link", "set", "w0", "up")
        await until(acknowledged, "it to be there again", bar=2)
        for one in (asking, hanging):
            one.stdin.close()
            await asyncio.wait_for(one.wait(), 5)


async def test_silence_that_nobody_looked_at_is_none():
    """Between two calls nobody does, and what was under way at the last look has arrived since."""
    with space("here") as here, space("far") as far:
        joined(here, far)
        hanging = await child(far, HANGS)
        assert await hanging.stdout.readline() == b"listens\n"
        asking = await child(here, ASKS)

        async def lasts(order: str) -> float:
            asking.stdin.write(f"{order}\n".encode())
            return float((await asyncio.wait_for(asking.stdout.readline(), 5)).split()[0])

        def acknowledged() -> bool:
            return "unacked" not in here.run("ss", "-Htin", "dst", "10.9.0.2").stdout

        async def sent_in_vain() -> None:
            far.do("link", "set", "w0", "down")
            await lasts("only send")
            await until(lambda: not acknowledged(), "it to be said again", bar=1, record=False)

        assert await lasts("look") == 0.0
        await sent_in_vain()
        await lasts("look")
        far.do("link", "set", "w0", "up")
        await until(acknowledged, "what was sent to arrive", bar=1)
        idle = time.monotonic() + 1.0
        await until(lambda: time.monotonic() > idle, "a while", bar=1, record=False)
        await sent_in_vain()
        assert await lasts("look") < 1.0
        for one in (asking, hanging):
            one.stdin.close()
            await asyncio.wait_for(one.wait(), 5)
