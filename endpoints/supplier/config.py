"""The supplier's settings."""

from dataclasses import dataclass

from nsm.errors import InvalidError
from nsm.process.workload import Surroundings

STATE = "/run/vwire/supplier"


@dataclass(frozen=True, kw_only=True)
class Config(Surroundings):
    """supplier: starts a node's routers when somebody asks for one. One on each node."""

    name: str = "supplier"
    """This supplier's name, in the registry and on paths. Unique in the domain, and in each
    domain that it supplies, where it is NAME@DOMAIN."""

    routers_file: str
    """Which routers it may start and how, a YAML file (vl3.md). Read at the start; whoever may
    write it may run programs as this process."""

    state_dir: str = STATE
    """Where it notes which of them run, so that its next life finds them, and keeps their logs."""

    unregister_itself: bool = True
    """Whether a stop takes the registration back; if not, it ends within a minute. Routers stay."""

    def __post_init__(self) -> None:
        if not self.node_name:
            raise InvalidError(
                "NODE_NAME is not set, and a service's matches choose suppliers by their node",
                hint="give it the name that this node's manager and clients have for it",
            )
        if not self.name or "@" in self.name:
            raise InvalidError(
                f"NSM_NAME is {self.name!r}",
                hint="give a name without @: the supplier is NAME@DOMAIN where it has to be",
            )
