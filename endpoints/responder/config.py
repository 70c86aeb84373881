"""The responder's settings: upstream's variables and defaults (`wire.md` §11.3)."""

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from nsm import nsurl
from nsm.errors import InvalidError
from nsm.ipam import Pools
from nsm.limits import Bounds
from nsm.model import DNSConfig
from nsm.process.config import Count, Duration, Form, Url
from nsm.process.workload import Surroundings

Groups = tuple[tuple[str, ...], ...]


def _groups(text: str) -> Groups:
    found = nsurl.groups(text)
    Pools(found)  # refuses what are no prefixes, with a sentence
    return found


def _show_groups(groups: Groups) -> str:
    return ",".join(f"[{','.join(group)}]" if len(group) > 1 else group[0] for group in groups)


def _dns(text: str) -> tuple[DNSConfig, ...]:
    if not text.strip():
        return ()
    said = json.loads(text)  # its ValueError says that it is no JSON
    if not isinstance(said, list):
        raise InvalidError("it is no JSON array")
    return tuple(map(_one_dns, said))


def _one_dns(said: object) -> DNSConfig:
    if not isinstance(said, dict) or set(said) - {"dns_server_ips", "search_domains"}:
        raise InvalidError(
            f"{json.dumps(said)[:100]} is no object of dns_server_ips and search_domains"
        )
    servers, domains = said.get("dns_server_ips") or [], said.get("search_domains") or []
    for listed in (servers, domains):
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            raise InvalidError("dns_server_ips and search_domains are lists of texts")
    for server in servers:
        try:
            ipaddress.ip_address(server)
        except ValueError:
            raise InvalidError(f"DNS server {server[:64]!r} is no IP address") from None
    return DNSConfig(tuple(servers), tuple(domains))


def _show_dns(configs: tuple[DNSConfig, ...]) -> str:
    return json.dumps(
        [{"dns_server_ips": one.servers, "search_domains": one.search_domains} for one in configs]
    )


@dataclass(frozen=True, kw_only=True)
class Config(Surroundings):
    """responder: an endpoint that hands out addresses and answers pings."""

    name: str = "icmp-server"
    """This endpoint's name, in the registry and on paths. Unique in the domain."""

    service_names: tuple[str, ...] = ("icmp-responder",)
    """The network services it offers."""

    payload: Literal["ETHERNET", "IP"] = "ETHERNET"
    """What its wires carry between nodes."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """Its labels, for every service: a service's matches choose endpoints by them."""

    cidr_prefix: Annotated[
        Groups, Form(_groups, "prefixes, or groups of them: [a,b],c", _show_groups)
    ] = (("169.254.0.0/16",),)
    """Where addresses come from: each wire gets a pair from each group."""

    ipam_policy: Literal["polite", "strict"] = "polite"
    """strict takes addresses out of requests that are not of these prefixes."""

    dns_configs: Annotated[
        tuple[DNSConfig, ...],
        Form(_dns, 'JSON: [{"dns_server_ips": ["…"], "search_domains": ["…"]}]', _show_dns),
    ] = ()
    """What clients are told about names."""

    idle_timeout: Duration = 0.0
    """After so long without a wire the process ends; 0s is never."""

    max_requests: Count = Bounds().at_once
    """Requests worked on at once, at most a quarter of them of one client; more wait their turn."""

    max_requests_per_client: Count = Bounds().in_all
    """Requests of one client that are here at once, those that wait included; more are refused."""

    register_service: bool = True
    """Whether it registers its services too. Off where somebody else defines them."""

    unregister_itself: bool = True
    """Whether a stop takes the registration back; if not, it ends within a minute."""

    pbr_config_path: str = "/etc/policy-based-routing/config.yaml"
    """Policy routes that clients are told, in YAML. Read again when it changes."""

    listen_on: Url = ""
    """The unix socket to listen on; empty: a new one in a directory of its own."""

    def __post_init__(self) -> None:
        if not self.service_names or not all(self.service_names):
            raise InvalidError(
                "NSM_SERVICE_NAMES names no service", hint="give at least one, such as echo"
            )
        if self.listen_on and not self.listen_on.startswith("unix:"):
            raise InvalidError(
                f"NSM_LISTEN_ON is {self.listen_on}, and an endpoint is met on its own node",
                hint="give unix:///path, or nothing",
            )
