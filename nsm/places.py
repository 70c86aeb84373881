"""The file of domains that are known beforehand: `cluster2: {registry: [tcp://…]}`.

People write it, so whatever is wrong with it is said with the line it stands on.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import yaml

from nsm.domains import MOST_URLS, canonical, is_name
from nsm.errors import InvalidError
from nsm.written import composed, line, pairs

ROLES = ("registry", "nsmgr-proxy")
MOST_DOMAINS = 10_000  # in a file
EXAMPLE = "a domain has the form  cluster2: {registry: [tcp://HOST:PORT], nsmgr-proxy: [...]}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a domain's two doors are, as URLs to be tried in turn; empty: it has none."""

    registry: tuple[str, ...] = ()
    manager_proxy: tuple[str, ...] = ()


def parse_map(text: str, where: str, check: Callable[[str], object]) -> Mapping[str, Place]:
    """The domains of a file, `domain: {registry: [tcp://…], nsmgr-proxy: [tcp://…]}`.

    where is the file's path; check raises InvalidError for what is no URL. Raises
    InvalidError with file, line and what is expected there.
    """
    try:
        root = composed(text, where)
        return {} if root is None else _domains(root, where, check)
    except InvalidError as wrong:
        raise InvalidError(wrong.message, hint=EXAMPLE) from wrong


def _domains(root: yaml.Node, where: str, check: Callable[[str], object]) -> Mapping[str, Place]:
    found: dict[str, Place] = {}
    for key, node, at in pairs(root, where, "the file"):
        name = canonical(key)
        if not is_name(key):
            raise InvalidError(f"{at}: {key[:256]!r} is no domain's name")
        if name in found:
            raise InvalidError(f"{at}: domain {name!r} is there twice")
        if len(found) == MOST_DOMAINS:
            raise InvalidError(f"{at}: more than {MOST_DOMAINS} domains")
        urls: dict[str, tuple[str, ...]] = {}
        for role, listed, there in pairs(node, where, f"domain {name!r}"):
            if role not in ROLES:
                raise InvalidError(f"{there}: domain {name!r} has no {role[:64]!r}")
            urls[role] = tuple(_urls(listed, where, check))
        found[name] = Place(urls.get("registry", ()), urls.get("nsmgr-proxy", ()))
    return found


def _urls(node: yaml.Node, where: str, check: Callable[[str], object]) -> Iterable[str]:
    listed = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if len(listed) > MOST_URLS:
        raise _wrong(where, node, f"{len(listed)} URLs, more than {MOST_URLS}")
    for one in listed:
        if not isinstance(one, yaml.ScalarNode):
            raise _wrong(where, one, "a URL, or a list of URLs, is expected")
        try:
            check(one.value)
        except InvalidError as wrong:
            raise _wrong(where, one, wrong.message) from wrong
        yield one.value


def _wrong(where: str, node: yaml.Node, why: str) -> InvalidError:
    return InvalidError(f"{where}:{line(node)}: {why}")
