"""Who gets which identity: the issuer's registration entries, a YAML or JSON file.

    - id: spiffe://lab.example/forwarder
      uid: 0
      netns: /run/netns/node-1      # or "net:[4026532177]"
    - id: spiffe://lab.example/client
      uid: 1000
      cgroup: /system.slice/client.service
      dns: [client.lab.example]
      ttl: 2h

All selectors of an entry must hold. Whoever several entries fit gets all of
their identities, the first in the file being the default one. A file that is
wrong anywhere is refused as a whole, with the line.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nsm.errors import InvalidError, NsmError
from nsm.identity.attest import Process
from nsm.identity.authority import check_dns
from nsm.identity.changes import read
from nsm.identity.spiffe import SpiffeId
from nsm.model import SECOND
from nsm.written import account, composed, line, pairs, scalar

MAX_FILE = 4 * 1024 * 1024  # bytes
MAX_ENTRIES = 10_000
MAX_DNS = 32
SHORTEST_TTL = 600 * SECOND  # a token lives ten minutes and no longer than its certificate
LONGEST_TTL = 30 * 86400 * SECOND
SHORTEST_RENEW = SECOND

_SELECTORS = ("uid", "gid", "netns", "cgroup", "exe-sha256")
_KEYS = ("id", *_SELECTORS, "dns", "ttl", "renew")
_NETNS = re.compile(r"net:\[(\d{1,20})\]", re.ASCII)
_DURATION = re.compile(r"(\d{1,9})(s|m|h|d)", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of business: whoever fits the selectors is id. None means: any."""

    id: SpiffeId
    uid: int | None = None
    gid: int | None = None
    netns: str | None = None
    cgroup: str | None = None
    exe_sha256: str | None = None
    dns: tuple[str, ...] = ()
    ttl: int | None = None  # ns; the issuer's own if None
    renew: int | None = None  # ns; half of the ttl if None

    def fits(self, process: Process) -> bool:
        """Whether process has everything that this entry asks for. Blocks (looks at `netns`)."""
        return self.fits_but_for_digest(process) and self.exe_sha256 in (None, process.digest)

    def fits_but_for_digest(self, process: Process) -> bool:
        """The same without the one selector that costs reading a whole program. Blocks."""
        return (
            self.uid in (None, process.uid)
            and self.gid in (None, process.gid)
            and (self.cgroup is None or _within(self.cgroup, process.cgroups or ()))
            and (self.netns is None or _same_namespace(self.netns, process.netns))
        )


def load(path: Path, trust_domain: str) -> tuple[Entry, ...]:
    """The entries in path. Blocks. Raises InvalidError with file and line."""
    text = read(path, MAX_FILE, "the registration entries").decode(errors="replace")
    return parse(text, trust_domain, str(path))


def parse(text: str, trust_domain: str, where: str) -> tuple[Entry, ...]:
    """The entries in text; where names it in errors. Raises InvalidError with the line."""
    if text.lstrip()[:1] in ("[", "{"):
        text = text.replace("\t", " ")  # JSON may have them between its values, YAML may not
    root = composed(text, where)
    if root is None:
        return ()
    if not isinstance(root, yaml.SequenceNode):
        raise InvalidError(
            f"{where}:{line(root)}: a list of entries is expected", hint="each begins with '- id:'"
        )
    if len(root.value) > MAX_ENTRIES:
        raise InvalidError(f"{where} has {len(root.value)} entries; at most {MAX_ENTRIES} are read")
    return tuple(_entry(node, trust_domain, where) for node in root.value)


def _entry(node: yaml.Node, trust_domain: str, where: str) -> Entry:
    given: dict[str, Any] = {}
    for key, value_node, at in pairs(node, where, "an entry"):
        if key not in _KEYS:
            raise InvalidError(
                f"{at}: {key[:64]!r} is nothing an entry has",
                hint=f"it has {', '.join(_KEYS)}",
            )
        try:
            given[key] = _READ[key](value_node)
        except NsmError as wrong:
            raise InvalidError(f"{at}: {key}: {wrong.message}", hint=wrong.hint) from wrong
    return _checked(given, trust_domain, f"{where}:{line(node)}")


def _checked(given: dict[str, Any], trust_domain: str, at: str) -> Entry:
    whose: SpiffeId | None = given.get("id")
    if whose is None:
        raise InvalidError(f"{at}: the entry has no id")
    if whose.trust_domain != trust_domain or not whose.path:
        raise InvalidError(
            f"{at}: {whose} is no workload of the trust domain {trust_domain!r}",
            hint=f"ids here have the form spiffe://{trust_domain}/<path>",
        )
    if not any(selector in given for selector in _SELECTORS):
        raise InvalidError(
            f"{at}: the entry of {whose} has no selector, so anybody would get that identity",
            hint=f"say which process it is by {', '.join(_SELECTORS)}",
        )
    if "exe-sha256" in given and "uid" not in given:
        raise InvalidError(
            f"{at}: the entry of {whose} has a digest and no uid",
            hint="whoever may run a program can make it run other code (LD_PRELOAD, ptrace): "
            "add the uid that it runs as",
        )
    ttl, renew = given.get("ttl"), given.get("renew")
    if renew is not None and ttl is not None and renew >= ttl:
        raise InvalidError(f"{at}: the entry of {whose} is renewed only after it has expired")
    return Entry(**{key.replace("-", "_"): value for key, value in given.items()})


def _netns(node: yaml.Node) -> str:
    text = scalar(node)
    if not _NETNS.fullmatch(text) and not (text.startswith("/") and "\0" not in text):
        raise InvalidError(
            f"{text[:256]!r} is no network namespace",
            hint='give its file (/run/netns/node-1) or its number ("net:[4026532177]")',
        )
    return text


def _cgroup(node: yaml.Node) -> str:
    text = scalar(node)
    if not text.startswith("/") or ".." in text.split("/") or text == "/":
        raise InvalidError(
            f"{text[:256]!r} is no cgroup's path",
            hint="give it as /proc/<pid>/cgroup has it, such as /system.slice/x.service; "
            "the root would be everybody",
        )
    return text.rstrip("/")


def _sha256(node: yaml.Node) -> str:
    text = scalar(node).lower()
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise InvalidError("a sha256 has 64 hexadecimal digits", hint="sha256sum <program>")
    return text


def _dns(node: yaml.Node) -> tuple[str, ...]:
    if not isinstance(node, yaml.SequenceNode):
        raise InvalidError("a list of DNS names is expected")
    if len(node.value) > MAX_DNS:
        raise InvalidError(f"at most {MAX_DNS} DNS names fit")
    return tuple(check_dns(scalar(name)) for name in node.value)


def _duration(shortest: int, longest: int) -> Callable[[yaml.Node], int]:
    def read_one(node: yaml.Node) -> int:
        text = scalar(node)
        found = _DURATION.fullmatch(text)
        duration = int(found[1]) * _UNITS[found[2]] * SECOND if found else -1
        if not shortest <= duration <= longest:
            raise InvalidError(
                f"{text[:64]!r} is no duration from {shortest // SECOND} s "
                f"to {longest // SECOND} s",
                hint="write it as 90s, 30m, 2h or 1d",
            )
        return duration

    return read_one


_READ: dict[str, Callable[[yaml.Node], Any]] = {
    "id": lambda node: SpiffeId.parse(scalar(node)),
    "uid": account,
    "gid": account,
    "netns": _netns,
    "cgroup": _cgroup,
    "exe-sha256": _sha256,
    "dns": _dns,
    "ttl": _duration(SHORTEST_TTL, LONGEST_TTL),
    "renew": _duration(SHORTEST_RENEW, LONGEST_TTL),
}


def _within(prefix: str, paths: Sequence[str]) -> bool:
    """Whether a process whose cgroups are paths is in prefix or below it, in any hierarchy."""
    return any(
        (path == prefix or path.startswith(f"{prefix}/")) and ".." not in path.split("/")
        for path in paths
    )


def _same_namespace(wanted: str, seen: tuple[int, int] | None) -> bool:
    if seen is None:
        return False
    if number := _NETNS.fullmatch(wanted):
        return int(number[1]) == seen[1]
    try:
        status = os.stat(wanted)
    except OSError:  # not there (yet): nobody is in it
        return False
    return (status.st_dev, status.st_ino) == seen
