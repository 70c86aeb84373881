"""Which routers a supplier may start, and how: NSM_ROUTERS_FILE, in YAML or JSON. Pure.

    orders-db@meet:                        # the service, as clients ask for it
      name: orders-db-n1@meet              # the router's name: NSM_NAME
      namespace: /run/netns/orders-db      # where its wires end: NSM_NAMESPACE
      module: endpoints.vl3                # or argv: [/usr/bin/router, argument]
      gid: 990                             # and uid: the supplier's own unless given
      log: /var/log/orders-db.log          # in NSM_STATE_DIR unless given
      environment:
        NSM_PREFIX_SERVER_URL: tcp://198.51.100.7:5006

All of a command comes from here. A request only says of which service.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from nsm import domains
from nsm.errors import InvalidError, NsmError
from nsm.model import Endpoint
from nsm.written import account, composed, pairs, scalar

MODULE: Final = "endpoints.vl3"
SET: Final = {  # what the supplier says itself, and which key says it to the supplier
    "NSM_NAME": "name",
    "NSM_SERVICE_NAMES": "the service before the colon",
    "NSM_NAMESPACE": "namespace",
    "NSM_HEALTH_FILE": "nothing: the supplier reads it",
}
MOST: Final = 1024  # routers of one node
_KEYS: Final = ("name", "namespace", "module", "argv", "uid", "gid", "log", "environment")

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the router of a service is started; where says which line of which file said so."""

    service: str
    name: str
    namespace: str = ""
    module: str = MODULE
    argv: tuple[str, ...] = ()  # instead of the module
    uid: int | None = None
    gid: int | None = None
    log: str = ""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    where: str = ""


def parse(text: str, where: str) -> tuple[Recipe, ...]:
    """The recipes in text; raises InvalidError with where, the line and what to write."""
    root = composed(text, where)
    if root is None or (isinstance(root, yaml.MappingNode) and not root.value):
        raise InvalidError(f"{where} names no router", hint="give a service, and below it a name")
    found = [
        _recipe(service, node, at, where)
        for service, node, at in pairs(root, where, "a service's router")
    ]
    if len(found) > MOST:
        raise InvalidError(f"{where} has {len(found)} routers; at most {MOST} are read")
    for what in ("name", "namespace", "log"):
        _apart(found, what)
    return tuple(found)


def _recipe(service: str, node: yaml.Node, at: str, file: str) -> Recipe:
    given: dict[str, Any] = {}
    for key, value, line in pairs(node, file, f"the router of {service!r}"):
        if key not in _KEYS:
            raise InvalidError(
                f"{line}: {key[:64]!r} is nothing a router has", hint=f"it has {', '.join(_KEYS)}"
            )
        try:
            given[key] = _READ[key](value)
        except NsmError as wrong:
            raise InvalidError(f"{line}: {key}: {wrong.message}", hint=wrong.hint) from wrong
    if "name" not in given:
        raise InvalidError(f"{at}: the router of {service!r} has no name")
    if {"module", "argv"} <= given.keys():
        raise InvalidError(f"{at}: the router of {service!r} has a module and an argv; give one")
    try:
        domains.domain_of(Endpoint(given["name"], (service,)))
    except InvalidError as wrong:
        raise InvalidError(f"{at}: {wrong.message}", hint=wrong.hint) from wrong
    if not _WORD.fullmatch(domains.split(service)[0]):
        raise InvalidError(f"{at}: {service[:64]!r} is no service's name, as orders-db@meet is")
    return Recipe(service=service, where=at, **given)


def _apart(found: list[Recipe], what: str) -> None:
    """Refuse two routers that would be in each other's way."""
    seen: dict[str, Recipe] = {}
    for one in found:
        if value := getattr(one, what):
            if other := seen.get(value):
                raise InvalidError(
                    f"{one.where}: {what} {value!r} is the router's of {other.service!r} as well",
                    hint="each router has its own",
                )
            seen[value] = one


def _text(node: yaml.Node) -> str:
    text = scalar(node)
    if "\0" in text:
        raise InvalidError("it has a zero byte")
    return text


def _name(node: yaml.Node) -> str:
    text = _text(node)
    if not _WORD.fullmatch(domains.split(text)[0]):
        raise InvalidError(
            f"{text[:64]!r} is no router's name",
            hint="it is made of letters, digits, dots, hyphens and underscores; @domain may follow",
        )
    return text


def _path(node: yaml.Node) -> str:
    text = _text(node)
    if not text.startswith("/"):
        raise InvalidError(f"{text[:256]!r} is no path from the root")
    return text


def _module(node: yaml.Node) -> str:
    text = _text(node)
    if not _MODULE.fullmatch(text):
        raise InvalidError(f"{text[:64]!r} is no module's name, as {MODULE} is")
    return text


def _argv(node: yaml.Node) -> tuple[str, ...]:
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise InvalidError("a list is expected: the program, then its arguments")
    return (_path(node.value[0]), *map(_text, node.value[1:]))


def _environment(node: yaml.Node) -> dict[str, str]:
    found = {}
    for key, value, _ in pairs(node, "", "environment"):
        if not _VARIABLE.fullmatch(key):
            raise InvalidError(f"{key[:64]!r} is no variable's name")
        if key in SET:
            raise InvalidError(f"{key} is what the supplier sets", hint=f"say it by {SET[key]}")
        try:
            found[key] = _text(value)
        except InvalidError as wrong:
            raise InvalidError(f"{key}: {wrong.message}") from wrong
    return found


_READ: Final[Mapping[str, Callable[[yaml.Node], Any]]] = {
    "name": _name,
    "namespace": _path,
    "module": _module,
    "argv": _argv,
    "uid": account,
    "gid": account,
    "log": _path,
    "environment": _environment,
}
