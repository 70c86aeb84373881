"""Prefixes no wire may use: those of the node's own networks (`wire.md` §3.5).

The file is YAML, `prefixes: [10.0.0.0/8, …]`.
"""

from ipaddress import ip_network

import yaml

from nsmgr.followed import Followed


class ExcludedPrefixes(Followed[tuple[str, ...]]):
    """The file's prefixes, as of its last good reading; none while it does not exist."""

    def __init__(self, path: str) -> None:
        super().__init__(path, parse, (), "excluded prefixes")

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What no wire may use now."""
        return self.value


def parse(text: str) -> tuple[str, ...]:
    """The prefixes of a file's text; ValueError says what is wrong with it."""
    read = yaml.safe_load(text) or {}
    if not isinstance(read, dict):
        raise ValueError(  # noqa: TRY004 - the file's value is wrong, not our types
            f"a mapping with the key prefixes is expected, not {type(read).__name__}"
        )
    for key, value in read.items():
        if str(key).lower() == "prefixes":
            return tuple(str(ip_network(str(one), strict=False)) for one in value or ())
    return ()
