"""Being somebody of a lab for a moment: in a place's namespace, under its identity."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from labs import become, processes
from labs.lab import Lab
from labs.paths import Paths
from nsm.errors import InvalidError
from nsm.kernel.topology import enter_named


@dataclass(frozen=True, slots=True)
class Seat:
    """Where the mesh is met from a place: its manager's socket and its identity's.

    On a node of a floating domain there is no manager: its registry is met instead, which
    answers who offers what, and nothing else. gid is the group by which a lab's issuer knows
    who is there.
    """

    name: str
    manager: str
    identity: str
    gid: int = 0
    floating: str = ""  # the domain without managers that the place is of

    def need_manager(self) -> None:
        """Raises InvalidError where there is none: nobody there holds or makes wires."""
        if self.floating:
            raise InvalidError(
                f"{self.floating} is a floating domain: it has no managers, and no wires",
                hint="ask on a node of a cluster that knows it",
            )

    @property
    def variables(self) -> Mapping[str, str]:
        """What a program there is told of the mesh."""
        return {"NSM_CONNECT_TO": self.manager, "SPIFFE_ENDPOINT_SOCKET": self.identity}


def enter(lab: Lab, paths: Paths, place: str) -> None:
    """Move into a place's namespace and before its resolv.conf, for good; as the only thread.

    Raises InvalidError for a place there is not.
    """
    lab.node_of(place)
    enter_named(paths.namespace(place))
    become.at_home(paths.namespace(place))


def sit(lab: Lab, paths: Paths, place: str) -> None:
    """Be in a place for good, as a program that was started there would be.

    In its namespace, under its identity, and with the variables that say where the mesh
    is. A switch has its namespace only. Raises InvalidError for a place there is not.
    """
    if lab.node_of(place).kind == "switch":
        enter(lab, paths, place)
        return
    become.told(take(lab, paths, place).variables)


def take(lab: Lab, paths: Paths, place: str) -> Seat:
    """Turn this process into one of the lab's, for good: on a node as `nsmctl` of that node,

    at a client or endpoint as that one. The calling process must have one thread.
    Raises InvalidError for a place there is not.
    """
    seat = of(lab, paths, place)
    enter(lab, paths, place)
    become.group(seat.gid)
    return seat


def of(lab: Lab, paths: Paths, place: str) -> Seat:
    """The seat of a place. Raises InvalidError for a place there is not, and for a switch."""
    node = lab.node_of(place)
    if node.kind == "switch":
        raise InvalidError(f"{place} is a switch: nobody is there to ask as")
    namespace = paths.namespace(place)
    entries = processes.plan(lab, paths).entries
    entry = next(e for e in reversed(entries) if e.namespace == namespace)
    cluster = lab.clusters[node.cluster]
    manager = f"unix://{paths.node(node.name, 'nsm.io.sock')}"
    if not cluster.managers:
        manager = processes.at(lab, cluster, processes.REGISTRY_PORT)
    return Seat(
        place if place != node.name else f"nsmctl-{node.name}-{os.getpid()}",
        manager,
        f"unix://{paths.cluster(node.cluster, 'spiffe.sock')}",
        entry.gid,
        "" if cluster.managers else cluster.name,
    )
