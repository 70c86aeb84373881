"""Each tunnel gets a UDP port nobody has, the lowest, also where many are made at once."""

import asyncio

import pytest

from forwarder.ports import MOST, Ports
from nsm.errors import ExhaustedError


class Kernel:
    """Knows which ports are taken, and counts who asks."""

    def __init__(self, *taken):
        self.taken = set(taken)
        self.asked = []

    async def free(self, port):
        self.asked.append(port)
        await asyncio.sleep(0)
        return port not in self.taken


async def test_the_lowest_port_that_nobody_has():
    kernel = Kernel(51820, 51822)
    ports = Ports(51820, kernel.free)
    assert await ports.draw("a") == 51821
    assert await ports.draw("b") == 51823


async def test_wires_that_are_made_together_get_different_ports():
    ports = Ports(51820, Kernel().free)
    drawn = await asyncio.gather(*(ports.draw(f"c{n}") for n in range(50)))
    assert sorted(drawn) == list(range(51820, 51870))


async def test_the_kernel_is_not_asked_about_ports_that_are_known_to_be_taken():
    kernel = Kernel()
    ports = Ports(51820, kernel.free)
    ports.keep("standing", 51820)
    assert await ports.draw("a") == 51821
    assert kernel.asked == [51821]


async def test_a_port_is_given_again_once_its_tunnel_is_gone():
    ports = Ports(51820, Kernel().free)
    await ports.draw("a")
    await ports.draw("b")
    ports.give_back("a")
    ports.give_back("nobody's")
    assert await ports.draw("c") == 51820


async def test_drawn_anew_it_is_another_and_the_one_before_is_free():
    ports = Ports(51820, Kernel().free)
    assert await ports.draw("a") == 51820
    assert await ports.draw("a", above=51820) == 51821
    assert await ports.draw("b") == 51820


async def test_where_none_is_free_it_says_which_were_tried_and_keeps_none():
    kernel = Kernel(*range(51820, 65536))
    ports = Ports(51820, kernel.free)
    with pytest.raises(ExhaustedError, match=r"51820 to 55915 .* NSM_WIREGUARD_PORT"):
        await ports.draw("a")
    assert len(kernel.asked) == MOST
    assert not ports._given
    kernel.taken.clear()
    assert await ports.draw("b") == 51820


async def test_there_is_no_port_above_the_last():
    ports = Ports(65535, Kernel().free)
    assert await ports.draw("a") == 65535
    with pytest.raises(ExhaustedError, match="65535 to 65535"):
        await ports.draw("b")


async def test_a_draw_that_is_cancelled_keeps_nothing_once_it_is_given_back():
    never = asyncio.Event()

    async def hangs(_):
        return await never.wait()

    ports = Ports(51820, hangs)
    drawing = asyncio.create_task(ports.draw("a"))
    await asyncio.sleep(0)
    drawing.cancel()
    await asyncio.gather(drawing, return_exceptions=True)
    ports.give_back("a")
    assert not ports._given


async def test_the_lowest_is_given_again_when_somebody_else_lets_go_of_it():
    kernel = Kernel(51820, 51821)
    ports = Ports(51820, kernel.free)
    assert await ports.draw("a") == 51822
    kernel.taken.remove(51820)  # gone, and nobody said so
    assert await ports.draw("b") == 51820


async def test_thousands_of_ports_are_looked_at_once_each():
    """Not once for each port: that took 0.3 s of the loop with 4000."""
    looks = 0

    class Counting(dict):
        def __contains__(self, port):
            nonlocal looks
            looks += 1
            return super().__contains__(port)

    ports = Ports(20000, Kernel().free)
    ports._holders = Counting()
    for n in range(4000):
        ports.keep(f"standing-{n}", 20000 + n)
    assert await ports.draw("a") == 24000
    assert looks == 4001


async def test_a_port_that_turns_out_to_be_anothers_stays_its_own():
    asked = asyncio.Event()

    async def free(port):
        await asked.wait()
        return port != 51820

    ports = Ports(51820, free)
    drawing = asyncio.create_task(ports.draw("a"))
    await asyncio.sleep(0)
    ports.keep("standing", 51820)
    asked.set()
    assert await drawing == 51821
    assert await ports.draw("b") == 51822
    ports.give_back("a")
    assert await ports.draw("c") == 51821
