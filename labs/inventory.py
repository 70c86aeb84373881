"""What is there of a lab: in the kernel by `ip`, and running, so that two moments can be compared.

Counts and not names: what is made anew is called otherwise, and no more than before.
"""

import contextlib
import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from labs import alive
from labs.lab import Lab
from labs.paths import Paths
from nsm.kernel import topology
from nsm.kernel.namespaces import NAMED

_IP: Final = ("link", "address", "route", "rule", "neighbour")
Object = tuple[str, int, str, Mapping[str, Any]]  # place, family, kind, what `ip -j` tells


def taken(lab: Lab, paths: Paths) -> tuple[Counter[str], dict[str, set[str]]]:
    """How many of each kind there are, by place; and for each global address, where it is."""
    found: Counter[str] = Counter()
    places: dict[str, set[str]] = {}
    for place, family, kind, one in _told(lab, paths):
        if kind == "address":
            for address in one.get("addr_info", ()):
                if address.get("scope") == "global":
                    places.setdefault(address["local"], set()).add(place)
        elif what := _called(family, kind, one):
            found[f"{what} in {place}"] += 1
    names = [paths.namespace(place) for place in lab.places]
    for mark in alive.inside([topology.inode_named(name) for name in names]):
        with contextlib.suppress(OSError), open(f"/proc/{mark.pid}/comm") as file:
            found[f"process {file.read().strip()}"] += 1
    return found, places


def _called(family: int, kind: str, one: Mapping[str, Any]) -> str:
    """What an object counts as; nothing if it comes and goes by itself."""
    match kind:
        case "link":
            of = one.get("linkinfo", {}).get("info_kind", "plain")
            return f"{of} link" if family == 4 else ""  # both families tell of all links
        case "neighbour":
            return "neighbour" if "PERMANENT" in one.get("state", ()) else ""
        case "route" if one.get("dst", "").startswith(("fe80:", "ff00:")):
            return ""  # the kernel's own, of each link whose address is known to be nobody else's
        case _:
            return f"IPv{family} {kind}"


def _told(lab: Lab, paths: Paths) -> Iterator[Object]:
    """What `ip` tells of every namespace, asked of all at once."""
    batch = "".join(f"{kind} show{' table all' if kind == 'route' else ''}\n" for kind in _IP)
    asked = []
    for place in lab.places:
        if not os.path.exists(f"{NAMED}/{paths.namespace(place)}"):
            continue
        for family in (4, 6):
            command = ["ip", "-n", paths.namespace(place), f"-{family}", "-d", "-j", "-batch", "-"]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert process.stdin is not None
            process.stdin.write(batch)
            process.stdin.close()
            asked.append((place, family, process))
    decoder = json.JSONDecoder()
    for place, family, process in asked:
        with process:
            assert process.stdout is not None
            said = process.stdout.read().strip()
        for kind in _IP:
            rows, end = decoder.raw_decode(said) if said else ([], 0)
            said = said[end:].strip()
            for row in rows:
                if row:
                    yield place, family, kind, row
