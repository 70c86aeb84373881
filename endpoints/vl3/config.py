"""The router's settings: upstream's variables (`wire.md` §11.3), and what is ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from nsm.endpoint import OWN_NAMESPACE
from nsm.errors import InvalidError
from nsm.process.config import Duration, Form, Url
from nsm.process.workload import Surroundings


def _families(text: str) -> tuple[int, ...]:
    found = tuple(int(one) for one in text.split(",") if one.strip())
    if set(found) - {4, 6} or len(set(found)) < len(found):
        raise ValueError(text)
    return tuple(sorted(found))


def _show_families(families: tuple[int, ...]) -> str:
    return ",".join(map(str, families))


@dataclass(frozen=True, kw_only=True)
class Config(Surroundings):
    """vl3: a vL3 domain's router. Its members' wires end in it, and it joins the others."""

    name: str = "vL3-server"
    """This router's name, in the registry and on paths. Unique in the domain."""

    service_names: tuple[str, ...] = ("vL3",)
    """The network service whose routers are one network; exactly one."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """Its labels: a service's matches choose routers by them."""

    prefix_server_url: tuple[Url, ...] = ()
    """The address plan that lends this router its prefixes; several where each has a family."""

    pool: str = ""
    """The pool there; empty: the one of routers that name none."""

    families: Annotated[tuple[int, ...], Form(_families, "4, 6, or both: 4,6", _show_families)] = ()
    """Which addresses members get, 4 and 6. Empty: what the pool has."""

    namespace: str = ""
    """The network namespace that wires end in, a path. Empty: the process's own, as in a pod."""

    idle_timeout: Duration = 0.0
    """After so long without a member the process ends; 0s is never."""

    register_service: bool = True
    """Whether it registers its service too. Off where somebody else defines it."""

    unregister_itself: bool = True
    """Whether a stop takes the registration back and closes the wires to other routers. If not,
    all wires stay for the next life; the registration ends within a minute."""

    listen_on: Url = ""
    """The unix socket to listen on; empty: a new one in a directory of its own."""

    @property
    def service(self) -> str:
        """The network's name."""
        return self.service_names[0]

    @property
    def place(self) -> str:
        """The path of the namespace."""
        return self.namespace or OWN_NAMESPACE

    def __post_init__(self) -> None:
        if len(self.service_names) != 1 or not self.service_names[0]:
            raise InvalidError(
                f"NSM_SERVICE_NAMES names {len(self.service_names)} services, and a router is of"
                " one network",
                hint="give one, such as vL3, and start another router for another network",
            )
        if not self.prefix_server_url:
            raise InvalidError(
                "NSM_PREFIX_SERVER_URL names no address plan, and so nobody lends this router"
                " addresses",
                hint="give its URL, such as tcp://vl3-ipam:5006",
            )
        if self.listen_on and not self.listen_on.startswith("unix:"):
            raise InvalidError(
                f"NSM_LISTEN_ON is {self.listen_on}, and an endpoint is met on its own node",
                hint="give unix:///path, or nothing",
            )
