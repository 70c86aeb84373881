"""Namespaces on one segment, each with an address of both families."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.support.spaces import Space, space


@contextmanager
def segment(count: int) -> Iterator[list[Space]]:
    """Namespaces, n with 10.77.0.{n + 1} and fd77::{n + 1}, on a bridge of their own."""
    with ExitStack() as stack:
        middle = stack.enter_context(space("dns-lan"))
        middle.do("link", "add", "lan", "type", "bridge")
        middle.do("link", "set", "lan", "up")
        made = []
        for n in range(count):
            one = stack.enter_context(space(f"dns{n}"))
            one.do(*f"link add eth0 type veth peer name p{n} netns {middle.name}".split())
            middle.do("link", "set", f"p{n}", "master", "lan", "up")
            one.do("addr", "add", f"10.77.0.{n + 1}/24", "dev", "eth0")
            one.do("addr", "add", f"fd77::{n + 1}/64", "dev", "eth0", "nodad")
            one.do("link", "set", "eth0", "up")
            made.append(one)
        yield made


def address(n: int) -> str:
    """The IPv4 address of namespace n."""
    return f"10.77.0.{n + 1}"
