"""Telling systemd how this process fares (sd_notify(3)): ready, alive, stopping, or why not.

Each word is a datagram that is sent or not and never waited for. One that finds
systemd's socket full is sent again a moment later, because a READY=1 that is lost
lets systemd end a process that serves. As long as the event loop turns, systemd's watchdog
hears of it twice per WatchdogSec; a loop that hangs is ended by SIGABRT, leaves its
stacks in the log, and is started again: no wire is lost by that.
"""

import asyncio
import errno
import faulthandler
import os
import socket
from collections import deque

import structlog

RETRY = 0.05  # seconds until a full socket is tried again
_FULL = (errno.EAGAIN, errno.ENOBUFS)
_LONGEST = 4096  # bytes of a status; systemd takes 64 KiB of all

log = structlog.get_logger(__name__)


class Notifier:
    """What systemd is told, in order. Does nothing where there is no systemd: address is empty."""

    def __init__(self, address: str, watchdog: int = 0, watchdog_pid: int = 0) -> None:
        """address is a path, or @ and the name of an abstract socket; watchdog in microseconds.

        A watchdog that waits for another process (watchdog_pid, 0 is any) is none of ours.
        """
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog = 0.0 if watchdog_pid not in (0, os.getpid()) else watchdog / 1e6
        self._waiting: deque[str] = deque()
        self._retry: asyncio.TimerHandle | None = None
        self._said = False  # that systemd cannot be told: once is enough

    def ready(self, status: str) -> None:
        """It serves; status is for people who ask `systemctl status`."""
        self._tell(f"READY=1\nSTATUS={_line(status)}\n")
        if self._watchdog and self._address:
            faulthandler.enable()  # SIGABRT is what a hanging loop gets: say where it hung
            self._ping()

    def waits(self, status: str, patience: float) -> None:
        """It does not serve yet, for a reason; systemd waits seconds more before it ends it."""
        self._tell(f"EXTEND_TIMEOUT_USEC={round(patience * 1e6)}\nSTATUS={_line(status)}\n")

    def stopping(self) -> None:
        """It ends as it was asked to, or because it cannot go on."""
        self._tell("STOPPING=1\n")

    def failed(self, why: str) -> None:
        """It cannot run; said at the very end, when no loop turns any more."""
        self._waiting.append(f"STATUS=cannot run: {_line(why)}\n")
        self._send()

    def _ping(self) -> None:
        if "WATCHDOG=1\n" not in self._waiting:
            self._tell("WATCHDOG=1\n")
        asyncio.get_running_loop().call_later(self._watchdog / 2, self._ping)

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        self._waiting.append(state)
        if self._retry is None:
            self._flush()

    def _flush(self) -> None:
        self._retry = None
        if not self._send():
            self._retry = asyncio.get_running_loop().call_later(RETRY, self._flush)

    def _send(self) -> bool:
        """Send what waits; whether all of it is gone."""
        if not self._address:
            self._waiting.clear()
        while self._waiting:
            try:
                # anew each time: a systemd that was started again listens on another socket
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as one:
                    one.sendto(self._waiting[0].encode(), self._address)
            except OSError as error:
                if error.errno in _FULL:
                    return False
                if not self._said:
                    self._said = True
                    log.warning(
                        "NOTIFY_SOCKET cannot be told",
                        address=self._address.replace("\0", "@"),
                        why=error.strerror or str(error),
                    )
                self._waiting.clear()
                return True
            self._waiting.popleft()
            self._said = False
        return True


def _line(text: str) -> str:
    """One line of it, for what follows a line break would be another word to systemd."""
    return " ".join(text.split()).encode()[:_LONGEST].decode(errors="ignore")
