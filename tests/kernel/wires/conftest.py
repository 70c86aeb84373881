from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack

import pytest

from nsm.kernel.node import Kernel
from tests.kernel.wires.encrypted import ENGINES, INSTANCE, Nodes, remains
from tests.support.spaces import Space, fds, ip, space
from tests.support.wait import until


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After a test this machine's own devices and this process's files are what they were."""
    links, files = [link["ifname"] for link in ip("link")], fds()
    yield
    assert [link["ifname"] for link in ip("link")] == links
    assert fds() - files == set()


@pytest.fixture
async def kernel() -> AsyncIterator[Kernel]:
    async with Kernel("test") as made:
        yield made


@pytest.fixture
async def encrypting() -> AsyncIterator[Kernel]:
    """A kernel for encrypted wires: after the test no process of theirs is there, nor a file."""
    async with Kernel(INSTANCE) as made:
        yield made
        await made.remove_all()
        await until(lambda: not remains(), "nothing of wireguard-go remains", bar=0.1)


@pytest.fixture
def make_space() -> Iterator[Callable[[str], Space]]:
    with ExitStack() as stack:
        yield lambda hint: stack.enter_context(space(hint))


@pytest.fixture
def client(make_space: Callable[[str], Space]) -> Space:
    return make_space("client")


@pytest.fixture
def server(make_space: Callable[[str], Space]) -> Space:
    return make_space("server")


@pytest.fixture(params=ENGINES)
def encrypted(
    request: pytest.FixtureRequest,
    make_space: Callable[[str], Space],
    client: Space,
    server: Space,
) -> Nodes:
    """Nodes for encrypted wires, with wireguard-go and with the kernel's own WireGuard."""
    return Nodes(make_space("near"), make_space("far"), client, server, request.param)
