"""One line for each call a process answered, and one more in its figures."""

import structlog

from nsm.errors import Code
from nsm.process.metrics import figures
from nsm.rpc.server import Call

log = structlog.get_logger(__name__)
_QUIET = ("/grpc.health.v1.Health/",)  # probes, every few seconds


def log_call(call: Call) -> None:
    """Who asked for what, how long it took, and what came of it."""
    figures.called(call.method.strip("/"), call.code.name, call.ms / 1000)
    facts = {
        "method": call.method.strip("/"),
        "caller": str(call.caller),
        "code": call.code.name,
        "ms": round(call.ms, 2),
    }
    if call.code == Code.OK:
        write = log.debug if call.method.startswith(_QUIET) else log.info
        write("call", **facts)
    elif call.code == Code.CANCELLED:  # its caller wants no more of it: how a stream ends
        log.info("call", why=call.text, **facts)
    else:
        log.warning("call", why=call.text, **facts)
