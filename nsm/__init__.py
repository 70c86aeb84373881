"""Virtual wires between workloads: what clients and endpoints import.

    async with nsm.connect("kernel://icmp-responder/nsm-1") as wire: …
    async with nsm.Endpoint("echo-1", ["echo"]): …

Names come when they are first used, so that `import nsm` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsm.client import Change, Client, Settings, Wire
    from nsm.errors import NsmError
    from nsm.model import Connection, DNSConfig, PolicyRoute, Route
    from nsm.nsurl import NSURL
    from nsm.process.workload import Endpoint, connect

_FROM = {
    "Change": "nsm.client",
    "Client": "nsm.client",
    "Connection": "nsm.model",
    "DNSConfig": "nsm.model",
    "Endpoint": "nsm.process.workload",
    "NSURL": "nsm.nsurl",
    "NsmError": "nsm.errors",
    "PolicyRoute": "nsm.model",
    "Route": "nsm.model",
    "Settings": "nsm.client",
    "Wire": "nsm.client",
    "connect": "nsm.process.workload",
}
__all__ = [
    "NSURL",
    "Change",
    "Client",
    "Connection",
    "DNSConfig",
    "Endpoint",
    "NsmError",
    "PolicyRoute",
    "Route",
    "Settings",
    "Wire",
    "connect",
]


def __getattr__(name: str) -> object:
    if name not in _FROM:
        raise AttributeError(f"module 'nsm' has no name {name!r}")
    value = getattr(import_module(_FROM[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM})
