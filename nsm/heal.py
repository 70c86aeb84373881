"""Why a wire was lost, and how its healing went. Values only; `docs/healing.md` says what is done.

Times are `time.monotonic()`: a clock that is set meanwhile makes no outage longer.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self


class Cause(enum.StrEnum):
    """What told that a wire is lost, or why it was led elsewhere."""

    CONTROL = "control"  # the mesh says that it is down, does not know it, or refuses a refresh
    DATA = "data"  # the far end does not answer any more, or our own end is gone
    DELETED = "deleted"  # a hop closed it
    EDITED = "edited"  # it was up: the mesh led it to another endpoint, as new rules have it
    EXPIRED = "expired"  # nobody could be asked until its tokens had ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """One loss of a wire, from its beginning to its end; `Wire.trouble` is the last.

    began       when it began as far as known: where the far end fell silent, its last answer
    noticed     when it was known
    endpoint    who was at the far end
    flowed      whether packets flowed all the same, as pings say; None: nobody knows
    healed      when the wire was up again; 0.0: not yet
    tries       how many requests that took
    stages      milliseconds by stage: `unnoticed` (began to noticed), `unasked` (until the
                request that worked began), then those of that request, as in `Wire.stages`, and
                `cleared`: another that took away what the old endpoint had said of itself
    """

    cause: Cause
    began: float
    noticed: float
    endpoint: str = ""
    flowed: bool | None = None
    healed: float = 0.0
    tries: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long it lasted; 0.0 while it does."""
        return self.healed - self.began if self.healed else 0.0

    def ended(self, now: float, asked: float, tries: int, stages: Mapping[str, float]) -> Self:
        """It is healed; asked is when the request began that did it, stages are that one's."""
        waits = {
            "unnoticed": round((self.noticed - self.began) * 1000, 3),
            "unasked": round((asked - self.noticed) * 1000, 3),
        }
        return replace(self, healed=now, tries=tries, stages={**waits, **stages})
