"""Where a lab keeps what: everything below one folder, so that one removal takes all of it."""

import os
import re
from dataclasses import dataclass
from typing import Final

from nsm.errors import InvalidError
from nsm.names.resolvconf import NETNS

ROOT: Final = "/run/vwire/labs"
NAME: Final = "[a-z]([a-z0-9-]{0,22}[a-z0-9])?"
"""What a lab may be called, as in schema.json."""


def is_name(text: str) -> bool:
    """Whether a lab may be called so."""
    return re.fullmatch(NAME, text) is not None


@dataclass(frozen=True, slots=True)
class Paths:
    """The files of one lab. Nothing here looks at the machine.

    Raises InvalidError for what cannot be a lab's name: these paths are removed, and a
    name typed on a command line must not lead out of the folder of labs.
    """

    lab: str
    root: str = ROOT

    def __post_init__(self) -> None:
        if not is_name(self.lab):
            raise InvalidError(
                f"{self.lab[:60]!r} cannot be a lab's name",
                hint="a lab has a name of 1 to 24 characters a-z 0-9 -, starting with a letter",
            )

    @property
    def folder(self) -> str:
        """Holds everything of the lab."""
        return os.path.join(self.root, self.lab)

    @property
    def state(self) -> str:
        """What was made and by whom; written before it is made."""
        return os.path.join(self.folder, "state.json")

    @property
    def text(self) -> str:
        """The lab file, as it was when the lab came up."""
        return os.path.join(self.folder, "lab.yaml")

    @property
    def processes(self) -> str:
        """One JSON line for each birth, readiness and end of a process."""
        return os.path.join(self.folder, "processes.jsonl")

    @property
    def orders(self) -> str:
        """The named pipe through which whoever was killed is started again."""
        return os.path.join(self.folder, "orders")

    @property
    def faults(self) -> str:
        """What somebody has broken on purpose and not mended yet."""
        return os.path.join(self.folder, "faults.json")

    def log(self, process: str) -> str:
        """The log of process NODE/PROC."""
        return os.path.join(self.folder, "log", process.replace("/", "."))

    def status(self, client: str) -> str:
        """Where a client tells of its wires."""
        return os.path.join(self.folder, "status", client)

    def outages(self, client: str) -> str:
        """Where a client writes down when it was without a wire."""
        return os.path.join(self.folder, "log", f"outages.{client}")

    def node(self, node: str, *more: str) -> str:
        """Something of a node."""
        return os.path.join(self.folder, "node", node, *more)

    def cluster(self, cluster: str, *more: str) -> str:
        """Something of a cluster."""
        return os.path.join(self.folder, "cluster", cluster, *more)

    def disk(self, cluster: str) -> str:
        """Where a disk of a cluster's own is mounted, if it has one: what its stores are on."""
        return self.cluster(cluster, "disk")

    def authority(self, cluster: str) -> str:
        """The folder of the key by which a cluster's issuer signs."""
        return self.cluster(cluster, "authority")

    def federation(self, cluster: str) -> str:
        """The folder of what a cluster trusts of others' identities."""
        return self.cluster(cluster, "federation")

    def domains(self, cluster: str) -> str:
        """Where a cluster has written down where others are."""
        return self.cluster(cluster, "domains.yaml")

    def dns(self, *more: str) -> str:
        """Something of the lab's DNS server."""
        return os.path.join(self.folder, "dns", *more)

    def namespace(self, place: str) -> str:
        """The name of a place's network namespace."""
        return f"{self.lab}-{place}"

    def home(self, place: str) -> str:
        """The working directory of a place's programs, empty at first."""
        return os.path.join(self.folder, "home", place)

    def resolv_conf(self, place: str) -> str:
        """What programs in a place's namespace have as /etc/resolv.conf, if it is there."""
        return os.path.join(NETNS, self.namespace(place), "resolv.conf")

    def folders(self, nodes: tuple[str, ...], clusters: tuple[str, ...]) -> tuple[str, ...]:
        """Every folder of the lab but the first, parents before children."""
        return (
            os.path.join(self.folder, "log"),
            os.path.join(self.folder, "status"),
            os.path.join(self.folder, "node"),
            os.path.join(self.folder, "cluster"),
            *(path for node in nodes for path in (self.node(node), self.node(node, "tmp"))),
            *(self.cluster(cluster) for cluster in clusters),
        )
