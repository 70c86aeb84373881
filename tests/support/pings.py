"""Stock pings that go on until they are interrupted: which of them were lost."""

import re


def counted(said: str) -> tuple[int, int]:
    """How many echoes were sent, and how many of them answered; of what `ping` printed, not -q.

    It does not wait for the answer to its last one when it is interrupted: that one counts
    only if it came.
    """
    (sent,) = map(int, re.findall(r"^(\d+) packets transmitted", said, re.MULTILINE))
    answered = {int(number) for number in re.findall(r" icmp_seq=(\d+) ttl=", said)}
    return (sent if sent in answered else sent - 1), len(answered)
