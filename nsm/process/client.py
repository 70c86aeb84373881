"""The client as a program: `python -P -m nsm.process.client`.

Holds the wires a workload's variables or annotations ask for until it is told
to stop, then closes them. Where upstream's client and its init container stand
beside a workload, this one can.
"""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import structlog

from nsm import nsurl
from nsm.client import Change, Client, Settings, Wire, Wish
from nsm.errors import InvalidError, NsmError, PreconditionError
from nsm.heal import Trouble
from nsm.identity.background import background
from nsm.names import resolvconf
from nsm.nsurl import NSURL
from nsm.process import losses
from nsm.process.config import DnsServer, Duration, Form, read
from nsm.process.metrics import carried, figures
from nsm.process.naming import Naming
from nsm.process.run import Process, run
from nsm.process.workload import Asking

IDENTITY_PATIENCE = 30.0  # seconds for the first certificate
DNS_PORT = 53
TROUBLE = ("cause", "flowed", "was", "outage_ms")  # what the log says of a loss

log = structlog.get_logger(__name__)


def _urls(text: str) -> tuple[NSURL, ...]:
    return tuple(nsurl.parse(one) for one in text.split(",") if one.strip())


def _show_urls(urls: tuple[NSURL, ...]) -> str:
    return ",".join(map(str, urls))


def _show_groups(groups: tuple[tuple[NSURL, ...], ...]) -> str:
    return ",".join(f"[{_show_urls(group)}]" for group in groups)


@dataclass(frozen=True, kw_only=True)
class Config(Asking):
    """nsc: holds a workload's wires. Ctrl-C or SIGTERM closes them."""

    name: str = "nsc"
    """What the client calls itself on paths. After a restart its wires are found by it."""

    network_services: Annotated[
        tuple[NSURL, ...],
        Form(_urls, "a list, separated by commas, of: kernel://SERVICE[/INTERFACE]", _show_urls),
    ]
    """The wires to hold. One id each: the name, a dash and the place in this list."""

    awareness_groups: Annotated[
        tuple[tuple[NSURL, ...], ...],
        Form(nsurl.awareness_groups, "groups such as [URL,URL],[URL]", _show_groups),
    ] = ()
    """Wires whose endpoints know of each other: only those may have addresses in common."""

    patience: Duration = 60.0
    """For how long each wire is asked for, if what refuses it may pass; 0s is for ever."""

    local_dns_server_enabled: bool | None = None
    """Whether names that wires say resolve here, by a DNS server in this network namespace. true:
    always, or the client does not start; false: never; empty: from the first wire on that says
    some, where resolv.conf is this workload's own and not the machine's."""

    local_dns_server_address: DnsServer = ("127.0.0.1", 53)
    """Where it answers."""

    resolv_conf: str = resolvconf.PATH
    """The file that programs find it by. All else in it stays in force, other names resolve as
    before, and what was there comes back at the end. Empty: no file is touched."""

    status_file: str = ""
    """Where each change of a wire is appended as a line of JSON; nowhere if empty."""

    def __post_init__(self) -> None:
        if not self.network_services:
            raise InvalidError(
                "NSM_NETWORK_SERVICES names no wire", hint="give at least one kernel://SERVICE"
            )
        seen: dict[str, NSURL] = {}
        for url in self.network_services:
            if url.interface and seen.setdefault(url.interface, url) is not url:
                raise InvalidError(
                    f"NSM_NETWORK_SERVICES asks twice for interface {url.interface!r}:"
                    f" {seen[url.interface]} and {url}",
                    hint="give each wire a name of its own",
                )
        served = self.local_dns_server_enabled is not False
        if served and self.resolv_conf and self.local_dns_server_address[1] != DNS_PORT:
            raise InvalidError(
                f"NSM_LOCAL_DNS_SERVER_ADDRESS has port {self.local_dns_server_address[1]}, and"
                f" {self.resolv_conf} can lead to port {DNS_PORT} only",
                hint="give that port, or NSM_RESOLV_CONF empty and lead programs there yourself",
            )


async def serve(config: Config, process: Process) -> None:
    """Hold the wires until the process is asked to stop."""
    patience = config.patience or float("inf")
    async with contextlib.AsyncExitStack() as stack:
        status = await stack.enter_async_context(_status(config.status_file))
        note = await stack.enter_async_context(losses.noted(config.outage_log))
        naming = await stack.enter_async_context(
            Naming(
                config.local_dns_server_enabled, config.resolv_conf, config.local_dns_server_address
            ).running()
        )

        def changed(what: Change, wire: Wire, error: NsmError | None) -> None:
            line = _line(what, wire, error)
            facts = {key: line[key] for key in ("id", "service", "endpoint", "interface")}
            facts |= {key: line[key] for key in TROUBLE if key in line}
            if error is None:
                log.info("wire", state=what.value, **facts, ms=line["ms"])
            else:
                log.warning("wire", state=what.value, **facts, why=str(error))
            status.append(line)
            note(what, wire)
            if what is Change.CLOSED:
                naming.forget(wire)

        settings = Settings(
            dial_timeout=config.dial_timeout,
            request_timeout=config.request_timeout,
            lifetime=config.lifetime,
            labels=config.told,
            awareness=config.awareness_groups,
            liveness=config.liveness,
            on_change=changed,
        )
        asking = Client(
            config.name,
            source=config.identity(IDENTITY_PATIENCE),
            manager=config.connect_to,
            settings=settings,
        )
        client = await stack.enter_async_context(asking)
        ids = nsurl.connection_ids(config.name, config.network_services)
        wish = Wish(on_answer=naming.tell)
        wires = [
            await stack.enter_async_context(
                client.connect(url, id_=id_, patience=patience, wish=wish)
            )
            for id_, url in zip(ids, config.network_services, strict=True)
        ]
        figures.shows("wires", lambda: carried(one.made for one in client.wires if one.up))
        await naming.settled()
        process.ready(manager=config.connect_to, wires=", ".join(map(_shown, wires)))
        await process.stopped()


def _shown(wire: Wire) -> str:
    own = " ".join(str(address.ip) for address in wire.addresses)
    other = " ".join(str(address.ip) for address in wire.peer_addresses)
    return f"{wire.interface} {own} ↔ {other}".strip()


def _line(what: Change, wire: Wire, error: NsmError | None) -> dict[str, Any]:
    """A wire's state for whoever reads the status file; no tokens."""
    made = wire.made
    return {
        "time": time.time_ns(),
        "event": what.value,
        "id": wire.id,
        "url": str(wire.url),
        "service": wire.service,
        "endpoint": made.endpoint if made else "",
        "interface": wire.interface,
        "mtu": wire.mtu if made else 0,
        "src": made.ip.src_ip_addrs if made else (),
        "dst": made.ip.dst_ip_addrs if made else (),
        "path": [{"name": one.name, "id": one.id} for one in made.segments] if made else (),
        "ms": round(sum(wire.stages.values()), 3),
        "stages": wire.stages,
        "error": str(error) if error else "",
        **_trouble(what, wire.trouble),
    }


def _trouble(what: Change, trouble: Trouble | None) -> dict[str, Any]:
    """What is known of the loss that a line tells of, or of the one that it ends."""
    if trouble is None or what not in (Change.DOWN, Change.UP):
        return {}
    found = {
        "cause": trouble.cause.value,
        "flowed": trouble.flowed,
        "was": trouble.endpoint,
        "unnoticed_ms": round((trouble.noticed - trouble.began) * 1000, 3),
    }
    if what is Change.UP:
        healed = {"outage_ms": round(trouble.seconds * 1000, 3), "tries": trouble.tries}
        return {**found, **healed, "stages": trouble.stages}
    return found


class _Lines:
    """Lines on their way into a file, written by a thread in their order."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._waiting: list[str] = []
        self._some = asyncio.Event()
        self._writing: asyncio.Future[int] | None = None

    def append(self, line: Mapping[str, Any]) -> None:
        """Write the line soon; the file is whole before the block ends."""
        if self._file >= 0:
            self._waiting.append(json.dumps(line) + "\n")
            self._some.set()

    async def write(self) -> None:
        """Write what waits, and what comes."""
        while True:
            await self._some.wait()
            await self.flush()

    async def flush(self) -> None:
        """Write what waits, behind what is being written."""
        if self._writing:  # also where whoever began it was cancelled: the thread goes on
            await asyncio.wait({self._writing})
        self._some.clear()
        data, self._waiting = "".join(self._waiting).encode(), []
        if data:
            loop = asyncio.get_running_loop()
            self._writing = loop.run_in_executor(None, os.write, self._file, data)
            await asyncio.shield(self._writing)


@asynccontextmanager
async def _status(path: str) -> AsyncIterator[_Lines]:
    if not path:
        yield _Lines(-1)
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    try:
        file = await asyncio.to_thread(os.open, path, flags, 0o644)
    except OSError as error:
        raise PreconditionError(
            f"NSM_STATUS_FILE is {path!r}, which cannot be written: {error.strerror}",
            hint="its directory must exist",
        ) from error
    lines = _Lines(file)
    try:
        async with background() as tasks:
            tasks.create_task(lines.write(), name="status file")
            yield lines
    finally:
        await lines.flush()
        os.close(file)


def main() -> int:
    """Run the client; returns its exit code."""
    return run("client", read(Config), serve)


if __name__ == "__main__":
    sys.exit(main())
