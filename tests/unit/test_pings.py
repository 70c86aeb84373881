"""What stock ping prints when it is interrupted, and what of it was lost."""

import pytest

from tests.support.pings import counted

SAID = """PING 172.16.1.0 (172.16.1.0) 56(84) bytes of data.
64 bytes from 172.16.1.0: icmp_seq=1 ttl=64 time=0.599 ms
From 172.16.1.1 icmp_seq=2 Destination Host Unreachable
64 bytes from 172.16.1.0: icmp_seq=3 ttl=64 time=0.696 ms
64 bytes from 172.16.1.0: icmp_seq=3 ttl=64 time=0.701 ms (DUP!)

--- 172.16.1.0 ping statistics ---
{} packets transmitted, 2 received, 50% packet loss, time 41ms
"""


@pytest.mark.parametrize(
    ("transmitted", "sent"), [(3, 3), (4, 3), (5, 4)], ids=["all over", "one under way", "one more"]
)
def test_only_the_last_echo_may_be_without_its_answer_when_ping_is_interrupted(transmitted, sent):
    assert counted(SAID.format(transmitted)) == (sent, 2)
