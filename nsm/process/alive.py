"""Whether a process is still the one we mean: pid and start time.

A number alone may be somebody else's by now.
"""

from dataclasses import dataclass


def started(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = text.rpartition(b")")[2].split()  # a name may hold spaces and brackets
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


@dataclass(frozen=True, slots=True)
class Mark:
    """A process as it was noted."""

    pid: int
    start: int

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        return self.pid > 0 and started(self.pid) == self.start != 0
