"""Names of other domains, `name@domain`, and where those domains are (`wire.md` §9).

A domain is what others call a cluster: its registry is asked for what is offered
there, its manager's proxy takes the requests for that. Here are the pure parts:
taking a domain off names and putting it on again, and what DNS's answers come to.
`nsm.resolve` does the asking.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from nsm.errors import InvalidError
from nsm.model import Endpoint, Service

T = TypeVar("T")
REGISTRY = "registry.nsm-system"
MANAGER_PROXY = "nsmgr-proxy.nsm-system"
SOON = 5.0  # seconds until a question is asked again that only half was answered
MOST_URLS = 16  # of one door

_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DOMAIN = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?", re.ASCII)
_EVERYBODY = ipaddress.ip_address("255.255.255.255")
_DIRECT = re.compile(r"(?:tcp:)?//(.+):([0-9]{1,5})", re.ASCII)


# -- names


def split(name: str) -> tuple[str, str]:
    """The name in its domain, and the domain: `("svc", "cluster2")`; "" is our own."""
    own, _, domain = name.partition("@")
    return own, domain


def join(name: str, domain: str) -> str:
    """The name as it is written outside domain; as it is where domain is ""."""
    return f"{name}@{domain}" if domain else name


def foreign_name(asked: Endpoint | Service) -> str:
    """The first name in it that is of another domain, its own or a service's; "" if none is."""
    return next((name for name in _names(asked) if "@" in name), "")


def is_foreign(asked: Endpoint | Service) -> bool:
    """Whether a name in it is of another domain: its own, or a service's."""
    return bool(foreign_name(asked))


def domain_of(asked: Endpoint | Service) -> str:
    """The one domain that its names are of; "" if none says one.

    Raises InvalidError for names of several domains, for services here and there, and for an
    `@` with nothing before or behind it.
    """
    found: dict[str, str] = {}
    for name in _names(asked):
        if "@" in name:
            own, domain = split(name)
            if not domain or not own:
                raise InvalidError(
                    f"{name[:256]!r} says no {'domain' if own else 'name'}",
                    hint="a name of another domain is written NAME@DOMAIN",
                )
            found.setdefault(domain, name)
    if len(found) > 1:
        one, other, *_ = found.values()
        raise InvalidError(
            f"{one[:256]!r} and {other[:256]!r} are of two domains, and one question goes to one",
            hint="ask, or register, for each domain by itself",
        )
    domain = next(iter(found), "")
    if domain and isinstance(asked, Endpoint):
        there = [service for service in asked.services if "@" in service]
        if 0 < len(there) < len(asked.services):
            here = next(service for service in asked.services if "@" not in service)
            raise InvalidError(
                f"service {here[:256]!r} is of this domain and {there[0][:256]!r} is not",
                hint="ask, or register, for each domain by itself",
            )
    return domain


def stripped_endpoint(asked: Endpoint) -> Endpoint:
    """The endpoint as its own domain calls it: name, services, and the keys of its labels."""
    return _renamed(asked, lambda name: split(name)[0], lambda service: split(service)[0])


def joined_endpoint(
    found: Endpoint,
    domain: str,
    asked: Endpoint = Endpoint(),  # noqa: B008 - frozen
) -> Endpoint:
    """The endpoint as it is called outside domain.

    What asked calls it, who registers it goes on calling it: a name without a domain stays.
    """
    name = {split(asked.name)[0]: asked.name}
    services = {split(service)[0]: service for service in (*asked.labels, *asked.services)}
    return _renamed(
        found,
        lambda own: name.get(own) or join(own, domain),
        lambda own: services.get(own) or join(own, domain),
    )


def stripped_service(asked: Service) -> Service:
    """The service as its own domain calls it."""
    return replace(asked, name=split(asked.name)[0])


def joined_service(found: Service, domain: str) -> Service:
    """The service as it is called outside domain."""
    return replace(found, name=join(found.name, domain))


def _names(asked: Endpoint | Service) -> tuple[str, ...]:
    return (
        (asked.name, *asked.services, *asked.labels)
        if isinstance(asked, Endpoint)
        else (asked.name,)
    )


def _renamed(
    endpoint: Endpoint, name: Callable[[str], str], service: Callable[[str], str]
) -> Endpoint:
    return replace(
        endpoint,
        name=name(endpoint.name) if endpoint.name else "",
        services=tuple(map(service, endpoint.services)),
        labels={service(own): labels for own, labels in endpoint.labels.items()},
        labels_unknown={service(own): more for own, more in endpoint.labels_unknown.items()},
    )


# -- where they are


def direct(domain: str) -> str:
    """The URL a domain is itself, such as `//10.0.0.1:5002`; "" where it is a name.

    Raises InvalidError for what is neither.
    """
    if match := _DIRECT.fullmatch(domain):
        host, port = match[1].removeprefix("[").removesuffix("]"), int(match[2])
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            address = None
        if address and 0 < port < 65536 and ("[" in match[1]) == (address.version == 6):
            return urls([str(address)], port)[0]
    elif is_name(domain):
        return ""
    raise InvalidError(
        f"{domain[:256]!r} is no domain",
        hint="a DNS name such as cluster2.example, or //10.0.0.1:5002",
    )


def question(role: str, domain: str) -> str:
    """The DNS name of a domain's door; role is REGISTRY or MANAGER_PROXY."""
    return f"{role}.{domain.rstrip('.')}."


@dataclass(frozen=True, slots=True)
class Door:
    """An SRV record."""

    priority: int
    weight: int
    port: int
    target: str


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What DNS says to a question, good for ttl seconds. Where there are no records, why says so.

    failed: nobody could say, which is not the same as that there are none.
    """

    records: tuple[T, ...] = ()
    ttl: float = 0.0
    why: str = ""
    failed: bool = False


def merged(one: Answer[T], other: Answer[T]) -> Answer[T]:
    """Both families' addresses of a name; what one lacks, the other may have."""
    records = one.records + other.records
    if one.failed or other.failed:
        failed, said = (one, other) if one.failed else (other, one)
        ttl = min(said.ttl, SOON) if records else 0.0
        return Answer(records, ttl, failed.why, failed=not records)
    return Answer(records, min(one.ttl, other.ttl), one.why)


def in_turn(doors: Iterable[Door]) -> list[Door]:
    """SRV records in the order in which to try them, the same for everybody."""
    ranked = sorted(doors, key=lambda door: (door.priority, -door.weight, door.port, door.target))
    return [door for door in ranked if door.target != "." and door.port][:MOST_URLS]


def is_host(address: str) -> bool:
    """Whether a host may have it: not all of them, and not none."""
    said = ipaddress.ip_address(address)
    return not (said.is_unspecified or said.is_multicast or said == _EVERYBODY)


def urls(addresses: Iterable[str], port: int) -> tuple[str, ...]:
    """What to dial."""
    written = (f"[{one}]" if ":" in one else one for one in addresses)
    return tuple(dict.fromkeys(f"tcp://{one}:{port}" for one in written))[:MOST_URLS]


def server(text: str) -> tuple[str, int]:
    """A DNS server as it is written: `10.0.0.53`, `10.0.0.53:5353`, `fd00::53`, `[fd00::53]:5353`.

    Raises ValueError.
    """
    host, port = text, "53"
    if text.startswith("[") or text.count(":") == 1:
        host, _, port = text.rpartition(":")
        if text.startswith("[") and not host.endswith("]"):
            raise ValueError(text)
        host = host.removeprefix("[").removesuffix("]")
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(text)
    return str(ipaddress.ip_address(host)), int(port)


def show_server(where: tuple[str, int]) -> str:
    """The inverse of `server`."""
    host, port = where
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_name(domain: str) -> bool:
    """Whether it is a domain as DNS names them."""
    return len(domain) <= 253 and _DOMAIN.fullmatch(domain) is not None


def canonical(domain: str) -> str:
    """The domain as it is compared: as DNS does, without case and without its last dot."""
    return domain.lower().rstrip(".")


def same_name(name: str) -> str:
    """The name as it is compared with others: its domain is one, however it is written."""
    own, domain = split(name)
    return join(own, canonical(domain))
