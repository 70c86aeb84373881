"""gRPC's own health service, which probes ask with an empty service name (`wire.md` §11.4)."""

import asyncio
from typing import Any

from nsm.errors import InvalidError, NotFoundError
from nsm.proto import health_pb2 as pb
from nsm.proto.health_grpc import HealthBase

_Status = pb.HealthCheckResponse


class Health(HealthBase):
    """Serving, for the process as a whole and for each of services, until told otherwise."""

    def __init__(self, *services: str) -> None:
        self._serving = dict.fromkeys(("", *services), True)
        self._changed = asyncio.Event()

    def set(self, serving: bool, service: str | None = None) -> None:
        """Say whether service, or with None everything, is served."""
        for name in self._serving if service is None else (service,):
            self._serving[name] = serving
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, stream: Any) -> None:  # noqa: N802 - the protocol's name
        """The status now; NOT_FOUND for a service that is not known here."""
        asked = await _asked(stream)
        if asked.service not in self._serving:
            raise NotFoundError(f"unknown service {asked.service[:200]!r}")
        await stream.send_message(_Status(status=self._status(asked.service)))

    async def Watch(self, stream: Any) -> None:  # noqa: N802
        """The status now and whenever it changes; the stream never ends by itself."""
        asked = await _asked(stream)
        told = None
        while True:
            changed, status = self._changed, self._status(asked.service)
            if status != told:
                await stream.send_message(_Status(status=status))
                told = status
            await changed.wait()

    def _status(self, service: str) -> Any:
        known = self._serving.get(service)
        if known is None:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if known else _Status.NOT_SERVING


async def _asked(stream: Any) -> Any:
    asked = await stream.recv_message()
    if asked is None:
        raise InvalidError("the call carries no HealthCheckRequest")
    return asked
