"""Policy routes from a file: routes that hold for some traffic only (`wire.md` §10.5).

- from: 172.16.2.201/24        # every key may be absent
  proto: 6                     # IP protocol number
  dstport: 6666                # one, or first-last
  srcport: 1000-2000
  routes:
    - prefix: 172.16.3.0/24
      nexthop: 172.16.2.200
"""

import asyncio
import ipaddress
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import structlog
import yaml

from nsm.errors import InvalidError
from nsm.model import PolicyRoute, Route
from nsm.written import known

LOOK_EVERY = 1.0  # seconds between looks at the file, at most
LONGEST = 1024 * 1024  # bytes of the file
MOST = 1024  # rules in it

_PORTS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)

log = structlog.get_logger(__name__)


def parse(text: str, where: str) -> tuple[PolicyRoute, ...]:
    """Read the rules; raises InvalidError that names where, the rule and what is wrong."""
    try:
        said = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or "cannot be read"
        raise InvalidError(f"{line}: no YAML: {problem}") from None
    if said is None:
        return ()
    if not isinstance(said, list) or len(said) > MOST:
        raise InvalidError(f"{where}: it is no list of up to {MOST} rules")
    return tuple(_rule(rule, f"{where}: rule {place}") for place, rule in enumerate(said, 1))


def _rule(said: Any, where: str) -> PolicyRoute:
    fields = known(said, {"from", "proto", "dstport", "srcport", "routes"}, where)
    routes = fields.get("routes") or []
    if not isinstance(routes, list) or len(routes) > MOST:
        raise InvalidError(f"{where}: routes is no list of up to {MOST} routes")
    source, proto = _text(fields, "from", where), _text(fields, "proto", where)
    if source:
        _checked(ipaddress.ip_interface, source, f"{where}: from", "an address or prefix")
    if proto and not (proto.isascii() and proto.isdecimal() and int(proto) < 256):
        raise InvalidError(f"{where}: proto {proto[:64]!r} is no protocol number, as 6 for TCP")
    return PolicyRoute(
        from_=source,
        proto=proto,
        dst_port=_ports(fields, "dstport", where),
        src_port=_ports(fields, "srcport", where),
        routes=tuple(_route(one, f"{where}, route {place}") for place, one in enumerate(routes, 1)),
    )


def _route(said: Any, where: str) -> Route:
    fields = known(said, {"prefix", "nexthop"}, where)
    prefix, hop = _text(fields, "prefix", where), _text(fields, "nexthop", where)
    _checked(lambda text: ipaddress.ip_network(text, strict=False), prefix, where, "a prefix")
    if hop:
        _checked(ipaddress.ip_address, hop, f"{where}: nexthop", "an address")
    return Route(prefix, hop)


def _text(fields: dict[str, Any], key: str, where: str) -> str:
    value = fields.get(key)
    if value is None:
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InvalidError(f"{where}: {key} is no text or number")
    return str(value)


def _ports(fields: dict[str, Any], key: str, where: str) -> str:
    text = _text(fields, key, where)
    match = _PORTS.fullmatch(text)
    if text and not (match and all(int(one) < 65536 for one in match.groups() if one)):
        raise InvalidError(f"{where}: {key} {text[:64]!r} is no port or first-last")
    return text


def _checked(reader: Any, text: str, where: str, what: str) -> None:
    try:
        reader(text)
    except ValueError:
        raise InvalidError(f"{where}: {text[:64]!r} is not {what}") from None


class PolicyFile:
    """The rules of a file, which need not exist, as they were when it was last good."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._rules: tuple[PolicyRoute, ...] = ()
        self._seen: tuple[int, int, int] | None = None
        self._looked = 0.0

    async def load(self) -> None:
        """Read the file; raises InvalidError if it is there and not good."""
        self._rules, self._seen = await asyncio.to_thread(_read, self._path)
        self._looked = time.monotonic()

    async def __call__(self) -> Sequence[PolicyRoute]:
        """The rules; looks at the file at most once a second."""
        if time.monotonic() - self._looked > LOOK_EVERY:
            self._looked = time.monotonic()
            seen = await asyncio.to_thread(_stamp, self._path)
            if seen != self._seen:
                self._seen = seen
                try:
                    await self.load()
                except InvalidError as error:
                    log.warning("policy routes are not good; the last good stay", why=str(error))
                else:
                    log.info("policy routes are read", path=self._path, rules=len(self._rules))
        return self._rules


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: str) -> tuple[tuple[PolicyRoute, ...], tuple[int, int, int] | None]:
    seen = _stamp(path)
    if seen is None:
        return (), None
    try:
        with open(path, "rb") as file:
            data = file.read(LONGEST + 1)
    except OSError as error:
        raise InvalidError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > LONGEST:
        raise InvalidError(f"{path} has more than {LONGEST} bytes")
    try:
        return parse(data.decode(), path), seen
    except UnicodeDecodeError:
        raise InvalidError(f"{path} is no UTF-8 text") from None
