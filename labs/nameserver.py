"""A lab's DNS server: which files make unbound say where the domains are. Pure.

It is a program of others on purpose: what our registry-proxies read is what anybody's server says.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

from nsm import domains

PROGRAM: Final = "unbound"
PORT: Final = 53
HEAD: Final = 4096  # bytes of a program in which its loader is named
TTL: Final = 5  # seconds: somebody may edit a zone while the lab is up
_NAMES: Final = {"registry": domains.REGISTRY, "nsmgr-proxy": domains.MANAGER_PROXY}

Places = Mapping[str, Mapping[str, Sequence[str]]]
"""As in the file of domains: of each domain, its doors and their URLs."""


def zones(places: Places) -> dict[str, str]:
    """The zone file of each domain, by its name."""
    return {domain: _zone(domain, doors) for domain, doors in places.items()}


def _zone(domain: str, doors: Mapping[str, Sequence[str]]) -> str:
    # the last of SOA's numbers is for how long "there is none" holds
    lines = [
        f"$TTL {TTL}",
        f"@ IN SOA ns.{domain}. op.{domain}. 1 3600 600 86400 {TTL}",
        f"@ IN NS ns.{domain}.",
    ]
    for door, urls in doors.items():
        name = f"{_NAMES[door]}.{domain}."
        for url in map(urlsplit, urls):
            kind = "AAAA" if ":" in (url.hostname or "") else "A"
            lines += [f"{name} IN SRV 0 0 {url.port} {name}", f"{name} IN {kind} {url.hostname}"]
    return "\n".join(lines) + "\n"


def start(program: str, head: bytes, conf: str) -> str:
    """What a shell is told, to become the server: the installed program, by its loader.

    Because Debian's AppArmor has unbound, when it is executed itself, read /etc/unbound only;
    and a copy is not executed where /run is mounted noexec, as Debian mounts it.
    """
    loader = re.search(rb"/[\x21-\x7e]*/ld[\x21-\x7e]*(?=\0)", head)
    by = [loader[0].decode()] if loader else []
    return f"exec {shlex.join([*by, program, '-d', '-p', '-c', conf])}\n"


def configuration(folder: str, addresses: Iterable[str], names: Iterable[str]) -> str:
    """What unbound is told: zones are `ZONE.zone` in its folder; it asks nobody."""
    listens = "".join(f"  interface: {address}@{PORT}\n" for address in addresses)
    served = "".join(
        f"""\
auth-zone:
  name: "{name}."
  zonefile: "{folder}/{name}.zone"
  for-upstream: no
  for-downstream: yes
  fallback-enabled: no
"""
        for name in names
    )
    return f"""\
server:
{listens}\
  access-control: 0.0.0.0/0 allow
  access-control: ::/0 allow
  do-daemonize: no
  num-threads: 1
  username: ""
  chroot: ""
  directory: "{folder}"
  pidfile: ""
  use-syslog: no
  module-config: "iterator"
remote-control:
  control-enable: no
{served}"""
