"""Pings of a wire's own end, told apart: answered, silent, and not ours to send."""

import asyncio
import sys

import pytest

from tests.support.spaces import space

ASK = """
import asyncio, ipaddress, sys
from nsm.liveness import alive
own, others = ([ipaddress.ip_interface(one) for one in text.split(",") if one]
               for text in sys.argv[1:3])
print(asyncio.run(alive(own, others, 0.4)))
"""


@pytest.mark.parametrize(
    ("own", "others", "allowed", "verdict"),
    [
        ("10.9.0.1/24,fd09::1/64", "127.0.0.1/32,::1/128", "0 2147483647", "True"),
        ("10.9.0.1/24", "10.9.0.7/32", "0 2147483647", "False"),
        ("10.9.0.1/24", "127.0.0.1/32,10.9.0.7/32", "0 2147483647", "False"),
        ("10.9.0.1/24", "192.0.2.1/32", "0 2147483647", "False"),
        ("10.9.0.9/24", "127.0.0.1/32", "0 2147483647", "False"),
        ("10.9.0.1/24", "127.0.0.1/32", "1 0", "None"),
        ("10.9.0.1/24", "::1/128", "0 2147483647", "None"),
        ("", "", "0 2147483647", "None"),
    ],
)
async def test_a_wire_lives_if_every_address_answers(own, others, allowed, verdict):
    with space("live") as here:
        here.do("link", "add", "b0", "up", "type", "bridge")
        here.do("addr", "add", "10.9.0.1/24", "dev", "b0")
        here.do("addr", "add", "fd09::1/64", "dev", "b0", "nodad")
        here.run("sysctl", "-w", f"net.ipv4.ping_group_range={allowed}")
        done = await asyncio.to_thread(here.run, sys.executable, "-c", ASK, own, others)
    assert done.stdout.strip() == verdict, done.stderr
