"""The router's settings: upstream's variables (`wire.md` §11.3), and what is ours."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated

from nsm import domains
from nsm.endpoint import OWN_NAMESPACE
from nsm.errors import InvalidError
from nsm.model import Connection, Path, Segment
from nsm.names import templates
from nsm.names.templates import Template
from nsm.process.config import Duration, Form, PositiveDuration, Url
from nsm.process.workload import Asking


def _families(text: str) -> tuple[int, ...]:
    found = tuple(int(one) for one in text.split(",") if one.strip())
    if set(found) - {4, 6} or len(set(found)) < len(found):
        raise ValueError(text)
    return tuple(sorted(found))


def _show_families(families: tuple[int, ...]) -> str:
    return ",".join(map(str, families))


def _templates(text: str) -> tuple[Template, ...]:
    return templates.parse_all(templates.listed(text)) if text.strip() else ()


def _show_templates(found: tuple[Template, ...]) -> str:
    return ",".join(map(str, found))


_MEMBERS = "any-member"


class _Any(dict[str, str]):
    """All labels there may be: a domain with one of them in it is not known before a member."""

    def get(self, key: str, default: object = None) -> str:
        return _MEMBERS


@dataclass(frozen=True, kw_only=True)
class Config(Asking):
    """vl3: a vL3 domain's router. Its members' wires end in it, and it joins the others."""

    name: str = "vL3-server"
    """This router's name, in the registry and on paths. Unique in the domain."""

    liveness_check_interval: PositiveDuration = 1.2
    """How often the other routers are asked through the wires to them; four times as often, and
    more, where there is doubt."""

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

    dns_templates: Annotated[
        tuple[Template, ...],
        Form(_templates, "a list such as {client}.orders-db,{client}.example", _show_templates),
    ] = templates.parse_all([templates.DEFAULT])
    """What members are called in DNS. The router answers on its own addresses, port 53, asks the
    other routers, and tells members so. Empty: no names."""

    namespace: str = ""
    """The network namespace that wires end in, a path. Empty: the process's own, as in a pod; only
    there are the other routers pinged."""

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
    def apexes(self) -> tuple[str, ...]:
        """The DNS domains that are the network's also while nobody is in them."""
        found = {domains.split(self.service)[0].lower(): None}
        found |= {one.name(self._somebody).partition(".")[2]: None for one in self.dns_templates}
        return tuple(one for one in found if domains.is_name(one) and _MEMBERS not in one)

    @property
    def _somebody(self) -> Connection:
        """Of any member."""
        return Connection(
            id=_MEMBERS,
            service=self.service,
            endpoint=self.name,
            labels=_Any(),
            path=Path((Segment(_MEMBERS, _MEMBERS),)),
        )

    @property
    def called(self) -> tuple[str, ...]:
        """What the router itself is called: by its name in the network, and as a member is."""
        own = Connection(
            id=self.name,
            service=self.service,
            labels=self.told,
            path=Path((Segment(self.name, self.name),)),
        )
        found = {f"{self.name}.{domains.split(self.service)[0]}": None}
        for template in self.dns_templates:
            with suppress(InvalidError):  # of members' labels and names, which are others
                found[template.name(own)] = None
        return tuple(one for one in found if domains.is_name(one))

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
        for template in self.dns_templates:  # a service that cannot be named shows at once
            template.name(self._somebody)
        if self.listen_on and not self.listen_on.startswith("unix:"):
            raise InvalidError(
                f"NSM_LISTEN_ON is {self.listen_on}, and an endpoint is met on its own node",
                hint="give unix:///path, or nothing",
            )
