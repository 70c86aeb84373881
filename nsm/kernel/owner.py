"""What is ours in the kernel, and how everybody can tell.

Four marks. The link *group* goes into the message that creates a device, into a
veth peer's too, so that no moment exists in which a device of ours is unmarked.
The *alias* follows in the same batch and says whose it is: the connection id and
the side; people read it in `ip link`, and a restarted forwarder finds its wires
by it. Routes carry our *protocol number*, rules that and a *priority range*.
What has no mark is somebody else's and is never touched.
"""

import hashlib
import re
import zlib
from dataclasses import dataclass
from typing import Literal, cast
from urllib.parse import quote, unquote

from nsm.errors import InvalidError

PROTOCOL = 78
"""rtm_protocol and FRA_PROTOCOL of every route and rule that is ours."""

RULES = range(7800, 8800)
"""Priorities of our rules: before main (32766), after local (0)."""

_GROUPS = 0x4E53_0000  # "NS": the upper half says vwire, the lower half which instance
_LONGEST = 255  # IFALIASZ - 1, in bytes
_DECIMAL = re.compile(r"[0-9]{1,20}", re.ASCII)  # 64 bits
_LEG = re.compile(r"[0-9a-f]{8}", re.ASCII)

SideName = Literal["src", "dst"]
"""src is the client's side of a wire and dst the endpoint's, as in `nsm.model`."""

SIDES: tuple[SideName, SideName] = ("src", "dst")


def group(instance: str) -> int:
    """The link group of everything the instance of that name makes.

    Two instances that meet in one namespace leave each other's devices alone;
    two names may share a group (1 in 65,536), the alias still tells whose wire it is.
    """
    return _GROUPS | (zlib.crc32(instance.encode()) & 0xFFFF)


def is_ours(number: int) -> bool:
    """Whether a link group belongs to any instance of ours."""
    return number & 0xFFFF_0000 == _GROUPS


@dataclass(frozen=True, slots=True)
class Mark:
    """Whose a device is: read from and written to its alias.

    rules says that policy routing rules hang on the device. They outlive it, so
    whoever removes the device must know without having it any more. hop says that it is
    the tunnel below a workload's device, which outlives the workload; lead, that it is what
    is between those two.

    A WireGuard device does not show where its socket is, nor where its far end said it
    is once packets came from elsewhere. So that is written here: the cookie of the
    underlay (0: not said), and the far end as ADDRESS:PORT.

    leg tells the wires of one connection apart: while it goes over to another endpoint there
    are two, the old and the new one. beside says which of them is not the one in use: it is
    either not that yet, or not that any more, so whoever finds it after a crash takes it away.
    """

    connection: str
    side: SideName
    rules: bool = False
    hop: bool = False
    underlay: int = 0
    far: str = ""
    lead: bool = False
    leg: str = ""
    beside: bool = False

    def __str__(self) -> str:
        return (
            f"nsm:{quote(self.connection, safe='')}:{self.side}"
            + (":rules" if self.rules else "")
            + (":hop" if self.hop else "")
            + (":lead" if self.lead else "")
            + (f":on={self.underlay}" if self.underlay else "")
            + (f":to={quote(self.far, safe='')}" if self.far else "")
            + (f":leg={self.leg}" if self.leg else "")
            + (":beside" if self.beside else "")
        )

    @classmethod
    def parse(cls, alias: str) -> "Mark | None":
        """The mark an alias holds, or None if it is not one of ours."""
        parts = alias.split(":")
        if len(parts) < 3 or parts[0] != "nsm" or parts[2] not in ("src", "dst"):
            return None
        side, more = cast("SideName", parts[2]), parts[3:]
        said = dict(part.split("=", 1) for part in more if "=" in part)
        on, leg = said.get("on", ""), said.get("leg", "")
        return cls(
            unquote(parts[1]),
            side,
            "rules" in more,
            "hop" in more,
            int(on) if _DECIMAL.fullmatch(on) else 0,
            unquote(said.get("to", "")),
            "lead" in more,
            leg if _LEG.fullmatch(leg) else "",
            "beside" in more,
        )

    @property
    def wire(self) -> str:
        """Which wire of its connection's: what names on the machine are made from."""
        return wire_id(self.connection, self.leg)

    @property
    def role(self) -> str:
        """Which of a side's devices it is on."""
        return "lead" if self.lead else "hop" if self.hop else ""


def mark(
    connection: str,
    side: SideName,
    *,
    rules: bool = False,
    hop: bool = False,
    underlay: int = 0,
    far: str = "",
    lead: bool = False,
    leg: str = "",
    beside: bool = False,
) -> Mark:
    """The mark of one end; InvalidError where the id does not fit into an alias."""
    made = Mark(connection, side, rules, hop, underlay, far, lead, leg, beside)
    if not connection or len(str(made).encode()) > _LONGEST:
        raise InvalidError(
            f"connection id {connection[:40]!r}… does not fit into a link alias of {_LONGEST} bytes"
            if connection
            else "a wire needs a connection id",
            hint="use ids of at most 80 characters, a uuid for example",
        )
    return made


def mac(connection: str, side: SideName) -> str:
    """The MAC of that end: the same at every refresh and on both nodes.

    Given at creation, because a MAC left to the kernel is rewritten by udev's
    MACAddressPolicy seconds later, under the far end's permanent neighbour entry.
    """
    digest = hashlib.sha256(f"{side} {connection}".encode()).digest()
    return ":".join(f"{byte:02x}" for byte in b"\x02" + digest[:5])


def wire_id(connection: str, leg: str) -> str:
    """What tells a wire from all others, those of the same connection too; leg "" is the first."""
    return f"{connection} {leg}" if leg else connection


def tunnel_name(wire: str, side: SideName) -> str:
    """What a tunnel is called while it is in the underlay: 15 bytes, one on the whole machine."""
    return "nsm" + hashlib.sha256(f"{side} {wire}".encode()).hexdigest()[:12]


def beside_name(wire: str, side: SideName) -> str:
    """What a workload's device is called while it stands beside the one in use."""
    return "nsmb" + tunnel_name(wire, side)[3:-1]


def lead_name(wire: str, side: SideName) -> str:
    """What is called, in the underlay, what leads from a workload to its tunnel there.

    It begins with nsm, because managers of links are told to leave that alone; no tunnel has
    that name, because an l is no hexadecimal digit.
    """
    return "nsml" + tunnel_name(wire, side)[3:-1]
