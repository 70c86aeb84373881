"""Speaking rtnetlink, to the kernel itself, about nothing."""

import struct

import pytest

from nsm.kernel.netlink import REQUEST, Socket

NOOP = struct.pack("=IHHII", 16, 1, REQUEST, 0, 0)
REFUSED = struct.pack("=IHHII", 16, 250, REQUEST, 0, 0)  # no such message


@pytest.mark.parametrize("count", [1, 1024, 1025, 40_000])
def test_a_batch_may_be_longer_than_a_call_has_parts_and_a_socket_room(count):
    with Socket.here() as sock:
        batch = [bytearray(NOOP) for _ in range(count - 1)] + [bytearray(REFUSED)]
        *done, last = sock.do(batch)
        assert done == [None] * (count - 1)
        assert last is not None
        assert sock.do([bytearray(NOOP)]) == [None], "and it goes on"
