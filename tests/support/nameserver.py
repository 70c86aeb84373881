"""A DNS server that is not ours: unbound, serving zones as their files say."""

import asyncio
import os
import shutil
import signal
import socket
import textwrap
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.wait import until

SOA = "@ {ttl} IN SOA ns.{zone}. op.{zone}. {serial} 3600 600 86400 {minimum}"


def free_port(host: str = "127.0.0.1", kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port that nobody has, at host."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, kind) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


class Nameserver:
    """Zones, and the server of them at host:port; start, stop and change it at will.

    records are a zone file's lines, relative to the zone. A zone without records
    is one that the server has lost: it answers SERVFAIL.
    """

    def __init__(self, folder: Path, host: str, port: int, space: str) -> None:
        self.host = host
        self._space = space
        self.port = port or free_port(host, socket.SOCK_DGRAM)
        self._folder = folder
        self._zones: dict[str, str] = {}
        self._serial = 1
        self._seen = 0
        self._forward = ""
        self._process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        """As NSM_DNS_SERVERS has it."""
        return f"{self.host}:{self.port}"

    async def serve(
        self,
        zones: Mapping[str, str],
        *,
        negative: int = 60,
        minimum: int | None = None,
        forward: str = "",
    ) -> None:
        """Serve these zones instead of what it serves. negative: the TTL of "there is none".

        forward: lines of forward-zone clauses, for what it asks others.
        """
        self._forward = forward
        self._serial += 1
        for zone, records in zones.items():
            soa = SOA.format(
                ttl=negative,
                zone=zone,
                serial=self._serial,
                minimum=negative if minimum is None else minimum,
            )
            text = f"{soa}\n@ 60 IN NS ns.{zone}.\n{textwrap.dedent(records)}\n" if records else ""
            (self._folder / f"{zone}.zone").write_text(text)
        self._zones = dict(zones)
        await self.stop()
        await self.start()

    async def start(self) -> None:
        """Start; return when it answers."""
        (self._folder / "unbound.conf").write_text(self._configuration())
        # Not /usr/sbin/unbound itself: Debian's AppArmor has that read /etc/unbound only.
        program = self._folder / "unbound"
        if not program.exists():
            found = shutil.which("unbound", path=f"{os.environ['PATH']}:/usr/sbin")
            assert found, "unbound is not installed: make setup"
            shutil.copy(found, program)
        with (self._folder / "unbound.log").open("ab") as log:
            self._seen = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *(["ip", "netns", "exec", self._space] if self._space else []),
                *(program, "-d", "-p", "-c", self._folder / "unbound.conf"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        await until(self._listening, "unbound to listen", record=False)

    async def stop(self) -> None:
        """Stop: from now on the port is nobody's."""
        if self._process is not None:
            if self._process.returncode is None:
                self._process.send_signal(signal.SIGTERM)
            await self._process.wait()
            self._process = None

    def _listening(self) -> bool:
        assert self._process is not None
        log = (self._folder / "unbound.log").read_text()
        assert self._process.returncode is None, f"unbound ended: {log}"
        if self._space:  # not to be reached from here
            return "start of service" in log[self._seen :]
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            return probe.connect_ex((self.host, self.port)) == 0

    def _configuration(self) -> str:
        zones = "".join(
            f"""
auth-zone:
  name: "{zone}."
  zonefile: "{self._folder}/{zone}.zone"
  for-upstream: no
  for-downstream: yes
  fallback-enabled: no
"""
            for zone in self._zones
        )
        return f"""
server:
  interface: {self.host}@{self.port}
  access-control: {"0.0.0.0/0 allow_setrd" if self._space else "127.0.0.0/8 allow"}
  port: {self.port}
  do-ip6: no
  verbosity: 1
  do-not-query-localhost: no
  do-daemonize: no
  num-threads: 1
  username: ""
  chroot: ""
  directory: "{self._folder}"
  pidfile: ""
  use-syslog: no
  rrset-roundrobin: no
  module-config: "iterator"
remote-control:
  control-enable: no
{zones}{self._forward}"""


@asynccontextmanager
async def nameserver(
    folder: Path, host: str = "127.0.0.1", port: int = 0, space: str = ""
) -> AsyncIterator[Nameserver]:
    """A name server to be told what to serve, at any free port; it ends with the block.

    space: the named namespace it is in.
    """
    folder.mkdir(exist_ok=True)
    made = Nameserver(folder, host, port, space)
    try:
        yield made
    finally:
        await made.stop()
