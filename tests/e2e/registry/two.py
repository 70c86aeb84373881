"""Two domains, each a trust domain of its own: one asks the other through its registry proxy."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from nsm.model import Endpoint
from tests.e2e.registry.realms import Program, Realm

DOOR = "tcp://127.0.0.4:5004"  # where nobody is
ENDPOINT = Endpoint(
    "nse-1@two", ("icmp@two",), {"icmp@two": {"app": "x"}}, url="tcp://192.0.2.1:5004"
)
HERE = Endpoint("nse-1", ("icmp",), {"icmp": {"app": "x"}}, url="tcp://192.0.2.1:5004")
NAMES = ("registry", "registry-proxy", "nsmgr")


@dataclass
class Two:
    """Two domains of a trust domain each; the first asks the second through its proxy."""

    one: Realm
    two: Realm
    registry: Program
    proxy: Program
    far: Program
    file: Path

    def say(self, **domains: object) -> None:
        """Write the file of domains."""
        text = domains.pop("text", None)
        new = self.file.with_suffix(".new")
        new.write_text(str(text) if text is not None else yaml.safe_dump(domains))
        new.rename(self.file)
