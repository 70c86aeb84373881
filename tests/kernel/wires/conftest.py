from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack

import pytest

from nsm.kernel.node import Kernel
from tests.support.spaces import Space, fds, ip, space


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
def make_space() -> Iterator[Callable[[str], Space]]:
    with ExitStack() as stack:
        yield lambda hint: stack.enter_context(space(hint))


@pytest.fixture
def client(make_space: Callable[[str], Space]) -> Space:
    return make_space("client")


@pytest.fixture
def server(make_space: Callable[[str], Space]) -> Space:
    return make_space("server")
