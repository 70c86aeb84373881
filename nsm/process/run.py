"""How a process starts, stops and ends.

    def main() -> int:
        return run("nsmgr", read(Config), serve)

    async def serve(config: Config, process: Process) -> None:
        async with source(…) as identity, server(…) as listening:   # start order
            process.ready(listening.urls, registry=config.registry_url)
            await process.stopped()
                                                                    # unwinds in reverse

The stop order is the order of those blocks: the innermost denies what is new and
lets what runs end, then watches and leases stop, then servers; the kernel is
left as it is.

SIGTERM, SIGINT   before it is ready: cancel the start. After: `stopped()` returns.
again, or no end within stop_grace: what still runs is cancelled.
SIGUSR1, SIGUSR2  log everything; log as configured. Both also log what runs, by name.

Exit codes: 0 ended as asked · 1 the mesh said no, or a defect · 2 asked wrongly ·
3 this machine cannot · 4 what it needs is not running · 130 Ctrl-C.
"""

import asyncio
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import structlog

from nsm.errors import (
    InvalidError,
    NsmError,
    PreconditionError,
    RightsError,
    UnavailableError,
    UnsupportedError,
)
from nsm.process import log as logs
from nsm.process import metrics
from nsm.process.config import Common, strangers
from nsm.process.forms import LogLevel
from nsm.process.health import Health, publish
from nsm.process.loopguard import LoopGuard
from nsm.process.notify import Notifier
from nsm.process.origins import refuse_foreign
from nsm.process.tasks import Tasks, running, tasks

C = TypeVar("C", bound=Common)
log = structlog.get_logger(__name__)

OK, FAILED, ASKED_WRONGLY, MACHINE_CANNOT, NOT_RUNNING, INTERRUPTED = 0, 1, 2, 3, 4, 130
WAITS = 120.0  # seconds until the next try of what a start waits for has failed as well
PATIENCE = 5.0  # seconds a cancelled process may take to unwind before it is ended as it is


class Process:
    """The running process, as its serve function sees it."""

    def __init__(
        self,
        kind: str,
        config: Common,
        group: Tasks,
        main: asyncio.Task[Any],
        guard: LoopGuard | None,
        notifier: Notifier,
    ) -> None:
        self.kind = kind
        self.name = config.name
        self.tasks = group
        self.health = Health(process="starting")
        self.signals: list[signal.Signals] = []
        self.forced = False
        self._config = config
        self._main = main
        self._guard = guard
        self._notifier = notifier
        self._started = time.monotonic()
        self._stop = asyncio.Event()

    async def stopped(self) -> None:
        """Wait until the process is asked to stop."""
        await self._stop.wait()

    def ready(self, listening: Iterable[str] = (), **more: str) -> None:
        """Say that everything is up: one line for people, one to whoever waits for it.

        listening are the URLs it answers on; more goes behind them, as `registry=…`.
        Raises InvalidError where NSM_READY_FD is no open file descriptor.
        """
        where = ", ".join(listening)
        line = "; ".join(
            (
                f"{self.kind} {self.name} ready" + (f": {where}" if where else ""),
                *(f"{what} {value}" for what, value in more.items() if value),
            )
        )
        log.info(line, seconds=round(time.monotonic() - self._started, 3))
        self.health.ready("process")
        self._notifier.ready(line)
        _tell(self._config.ready_fd, line)
        gc.collect()
        gc.freeze()  # what stands now stands for good: each later collection need not look at it
        if self._guard:
            self._guard.arm()

    def waits(self, why: str) -> None:
        """Say what it waits for before it can be ready, again and again while it does.

        A start that waits is not one that hangs: each time it gets `WAITS` seconds more.
        """
        if "process" in self.health.missing and not self._stop.is_set():
            self._notifier.waits(f"{self.kind} {self.name} waits: {why}", WAITS)

    def stop(self) -> None:
        """Ask the process to stop, as the first SIGTERM does; return at once."""
        if self._stop.is_set():
            return
        is_starting = "process" in self.health.missing
        self.ending()
        if is_starting:
            self._main.cancel()
        else:
            asyncio.get_running_loop().call_later(self._config.stop_grace, self._force)

    def ending(self) -> None:
        """Say that it ends, and from now on bound how long that may take."""
        if self._stop.is_set():
            return
        self._stop.set()
        self.health.lost("process", "stopping")
        if self._guard:
            self._guard.disarm()
        self._notifier.stopping()
        patience = self._config.stop_grace + PATIENCE
        asyncio.get_running_loop().call_later(patience, self._give_up)

    def heard(self, number: signal.Signals) -> None:
        """Obey a signal that asks for the end: the first in order, the second by force."""
        self.signals.append(number)
        if self._stop.is_set():
            self._force()
        else:
            log.info("stopping", signal=number.name)
            self.stop()

    def _force(self) -> None:
        if self.forced:
            return
        self.forced = True
        log.warning("stopped by force", running=self.tasks.names)
        self._main.cancel()
        asyncio.get_running_loop().call_later(PATIENCE, self._give_up)

    def _give_up(self) -> None:
        # A thread that waits for the kernel cannot be cancelled, and Python would wait for it.
        log.error("hangs, and is ended as it is", running=self.tasks.names)
        sys.stderr.flush()
        os._exit(self.exit_code or FAILED)

    @property
    def exit_code(self) -> int:
        """What the process ends with, where no error decides it."""
        if signal.SIGINT in self.signals:
            return INTERRUPTED
        return FAILED if self.forced else OK


def run(kind: str, config: C, serve: Callable[[C, Process], Awaitable[None]]) -> int:
    """Run serve until it ends or a signal ends it; return the exit code."""
    colors = False if config.no_color else None
    logs.configure(config.log_level, process=kind, name=config.name, colors=colors)
    # every peer's connections and descriptors are our open files, and the default is 1024
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # a core holds keys, and keys are never written to disk
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    notifier = Notifier(config.notify_socket, config.watchdog_usec, config.watchdog_pid)
    try:
        refuse_foreign()
        for sentence in strangers(type(config)):
            log.warning(sentence)
        return asyncio.run(_supervised(kind, config, serve, notifier))
    except NsmError as error:
        return _report(error, notifier)


async def _supervised(
    kind: str, config: C, serve: Callable[[C, Process], Awaitable[None]], notifier: Notifier
) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_unhandled)
    main = asyncio.current_task()
    assert main is not None
    guard = LoopGuard(config.loop_guard) if config.loop_guard else None
    process: Process | None = None
    try:
        async with tasks(f"{kind} {config.name}") as group:
            process = Process(kind, config, group, main, guard, notifier)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, process.heard, number)
            loop.add_signal_handler(signal.SIGUSR1, _set_level, "TRACE")
            loop.add_signal_handler(signal.SIGUSR2, _set_level, config.log_level)
            if config.health_file:
                telling = publish(process.health, config.health_file)
                group.spawn(telling, "health file", forever=True, vital=True)
            try:
                async with _metrics(kind, config, process):
                    await serve(config, process)
            finally:
                process.ending()
    except asyncio.CancelledError:
        if process is None or not (process.signals or process.forced):
            raise
    except Exception as error:  # noqa: BLE001 - the last place that can say what went wrong
        return _report(error, notifier)
    return process.exit_code


@asynccontextmanager
async def _metrics(kind: str, config: Common, process: Process) -> AsyncIterator[None]:
    if not config.prometheus:
        yield
        return
    where = metrics.served(*config.prometheus_listen_on, kind, lambda: process.health.serving)
    async with where as url:
        log.info("metrics", url=url)
        yield


def _set_level(level: LogLevel) -> None:
    logs.set_level(level)
    log.warning("the log level changed", to=level, **running())


def exit_code(error: BaseException) -> int:
    """The exit code that tells scripts which kind of trouble this is."""
    match error:
        case InvalidError():
            return ASKED_WRONGLY
        case UnsupportedError() | PreconditionError() | PermissionError() | RightsError():
            return MACHINE_CANNOT
        case UnavailableError():
            return NOT_RUNNING
        case _:
            return FAILED


def _report(error: BaseException, notifier: Notifier) -> int:
    """Say why the process ends, in the log and to systemd; return its exit code."""
    reasons = []
    for cause in _causes(error):
        if isinstance(cause, NsmError | PermissionError):
            notes = getattr(cause, "__notes__", ())
            more = {"notes": notes} if notes else {}
            log.error("cannot run", why=str(cause), **more)
            reasons.append(str(cause))
        else:
            log.critical("ended by a defect", exc_info=cause)
            reasons.append(f"a defect, {type(cause).__name__}")
    notifier.failed("; ".join(dict.fromkeys(reasons)))
    return max(exit_code(cause) for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _causes(one)
    else:
        yield error


def _unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What asyncio found nobody else to tell."""
    where = context.get("task") or context.get("future") or context.get("handle")
    log.error(context["message"], where=repr(where), exc_info=context.get("exception"))


def _tell(descriptor: int, line: str) -> None:
    """Write the line to a file descriptor somebody handed us, and close it."""
    if descriptor < 0:
        return
    try:
        os.write(descriptor, line.encode() + b"\n")
        os.close(descriptor)
    except BrokenPipeError:
        os.close(descriptor)  # whoever waited has gone, which is no reason to end
    except OSError as error:
        raise InvalidError(
            f"NSM_READY_FD is {descriptor}, which cannot be written: {error}"
        ) from error
