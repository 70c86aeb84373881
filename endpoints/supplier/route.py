"""A supplier's route: no path ends here. It sees to it that another endpoint is there.

The answer is upstream's refusal, with ABORTED: look again. A forwarder of ours does within the
same Request, upstream's clients with their next.
"""

import asyncio
from collections.abc import Mapping

from endpoints.supplier.keeper import Keeper
from nsm import model
from nsm.caller import Caller
from nsm.connections import Held
from nsm.endpoint import EndpointRoute, FromPools
from nsm.errors import AbortedError, NotFoundError, UnavailableError
from nsm.hop import LONGEST, Established
from nsm.ipam import Pools
from nsm.ondemand import CREATED
from nsm.undo import Undo

SPARE, SHARE = 2.0, 0.25  # seconds of the caller's time, or that part, left to reach the endpoint


class SupplierRoute(EndpointRoute):
    """Has the router of a request's service started; keepers are by service."""

    def __init__(self, name: str, keepers: Mapping[str, Keeper]) -> None:
        super().__init__(name, FromPools(Pools(())))
        self._called = name
        self._keepers = keepers

    async def establish(
        self, asked: model.Request, held: Held[str], caller: Caller, undo: Undo
    ) -> Established:
        """Refuse, in upstream's words, when the router is there; else say why it is not."""
        service = asked.connection.service
        keeper = self._keepers.get(service)
        if keeper is None:
            raise NotFoundError(
                f"supplier {self._called} has no router of {service[:256]!r}; it has those of"
                f" {', '.join(sorted(self._keepers))}",
                hint="add it to its NSM_ROUTERS_FILE, and start it again",
            )
        left = caller.left()
        left = LONGEST if left is None else left
        patience = left - min(SPARE, left * SHARE)
        try:
            async with asyncio.timeout(patience):
                await keeper.there()
        except TimeoutError:
            raise UnavailableError(
                f"{keeper.waiting()}, and no more time is left of this request",
                hint="ask again: it goes on",
            ) from None
        raise AbortedError(f"{CREATED} {keeper.recipe.name}", hint="ask again")
