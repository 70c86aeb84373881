"""Looking for endpoints more than once within one Request. Pure.

Who can only be reached no more, or is ending, is left out the next time, so that a service's
next match has its turn. Who answers ABORTED says that there is something new to be found: a
supplier has started an endpoint (`nsm/ondemand.py`). Each search costs the registry two calls, so
there is another one only where the last found somebody new.
"""

from nsm.errors import AbortedError, NsmError, UnavailableError

MOST = 8  # searches of one Request
PAUSE = 0.05  # seconds before what was said to be there is looked for again; then twice as long


class Search:
    """What one Request has tried."""

    def __init__(self) -> None:
        self.away: set[str] = set()
        """Endpoints that are not to be found, by name."""
        self._tried: set[str] = set()
        self._refusals: dict[str, NsmError] = {}  # of the search that is under way
        self._searches = 0
        self._promises = 0

    def new(self, name: str) -> bool:
        """Whether an endpoint was not tried yet."""
        return name not in self._tried

    def refused(self, name: str, reason: NsmError) -> None:
        """An endpoint was tried."""
        self._tried.add(name)
        self._refusals[name] = reason

    def again(self) -> float | None:
        """After how many seconds to look again; None: nobody else would be found."""
        refusals, self._refusals = self._refusals, {}
        self._searches += 1
        if self._searches >= MOST or not any(one.retry for one in refusals.values()):
            return None
        if any(isinstance(one, AbortedError) for one in refusals.values()):
            self.away.clear()
            self._tried.clear()
            self._promises += 1
            return PAUSE * 2 ** (self._promises - 2) if self._promises > 1 else 0.0
        self.away |= {name for name, one in refusals.items() if isinstance(one, UnavailableError)}
        return 0.0
