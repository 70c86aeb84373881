"""resolv.conf, led to our resolver and back again.

What was there stays in the file, as comments: so whoever finds it after a kill -9 (our next
start, or a person) needs nothing else to bring it back. The file is written in place, because
container runtimes mount it and a mount cannot be replaced; and by one write each time, so
that there is no moment at which half of it is lost.
"""

import asyncio
import ipaddress
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import structlog

from nsm.errors import NotFoundError, PreconditionError, RightsError

PATH = "/etc/resolv.conf"
NETNS = "/etc/netns"
"""Where `ip netns exec NAME` finds the files that it mounts for a namespace."""
LARGEST = 65_536  # bytes
MOST_SERVERS = 3  # as libc
_TITLE = "# names are asked of vwire's client; what was here before comes back when it ends"
_WAS = "# was: "
_END = "# no line end before"
T = TypeVar("T")
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Before:
    """What a resolv.conf says, as libc understands it."""

    servers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    ndots: int = 1


def read(text: str) -> Before:
    """What it says; lines that nobody understands are passed over, as libc does."""
    servers: list[str] = []
    search: tuple[str, ...] = ()
    ndots = 1
    for line in text.splitlines():
        words = line.split()
        if not words or line[0] in "#;":
            continue
        match words[0]:
            case "nameserver" if len(words) > 1:
                with suppress(ValueError):
                    ipaddress.ip_address(words[1])
                    servers.append(words[1])
            case "search" | "domain":
                search = tuple(word.rstrip(".") for word in words[1:] if word != ".")
            case "options":
                for word in words[1:]:
                    key, _, number = word.partition(":")
                    if key == "ndots" and number.isascii() and number.isdigit():
                        ndots = min(int(number[:3]), 15)
    return Before(tuple(servers[:MOST_SERVERS]), search, ndots)


def arrival(server: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Where a question to a server arrives: ::ffff:127.0.0.1 and 0.0.0.0 are 127.0.0.1."""
    address = ipaddress.ip_address(server)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if address.is_unspecified:
        return ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return address


def led(text: str, server: str) -> str:
    """The text that leads to server instead; all that is no server stays in force."""
    text = original(text)
    was = "".join(f"{_WAS}{line}\n" for line in text.split("\n")[: -1 if _ended(text) else None])
    kept = "".join(
        f"{line}\n"
        for line in text.splitlines()
        if line.split()[:1] not in ([], ["nameserver"]) and line[0] not in "#;"
    )
    end = "" if _ended(text) else f"{_END}\n"
    return f"{_TITLE}\n{was}{end}nameserver {server}\n{kept}"


def original(text: str) -> str:
    """The text of before; the text itself where it is not ours."""
    if not text.startswith(_TITLE):
        return text
    lines = text.split("\n")
    was = "".join(f"{line.removeprefix(_WAS)}\n" for line in lines if line.startswith(_WAS))
    return was.removesuffix("\n") if _END in lines else was


def _ended(text: str) -> bool:
    return not text or text.endswith("\n")


# -- the file


@asynccontextmanager
async def leading(path: str, server: str) -> AsyncIterator[Before]:
    """Lead path to server for as long as the block lasts; what it said before.

    "": nothing is led anywhere, and what the system's says is what was before. What an earlier
    life left in the file is brought back first. Raises PreconditionError, RightsError.
    """
    try:
        yield await _whole(lambda: _lead(path, server))
    finally:
        await _whole(lambda: _back(path))


async def _whole(work: Callable[[], T]) -> T:
    """Do it in a thread to its end, also where whoever waits is cancelled: nobody else would."""
    working = asyncio.get_running_loop().run_in_executor(None, work)
    interrupted = False
    while not working.done():  # cancelled again meanwhile: finish, then obey
        try:
            await asyncio.wait({working})
        except asyncio.CancelledError:
            interrupted = True
    if interrupted:
        raise asyncio.CancelledError
    return working.result()


def _lead(path: str, server: str) -> Before:
    try:
        text = _text(path or PATH)
    except FileNotFoundError:
        if not path:
            return Before()
        raise NotFoundError(
            f"there is no {path} to lead names by", hint="make it, empty if there is no DNS server"
        ) from None
    except OSError as wrong:
        raise PreconditionError(f"{path or PATH} cannot be read: {wrong.strerror}") from wrong
    found = read(original(text))
    others = tuple(one for one in found.servers if arrival(one) != arrival(server))
    before = Before(others, found.search, found.ndots)
    if path:
        _refuse_of_machine(path)
        try:
            _write(path, led(text, server))
        except OSError as wrong:
            raise RightsError(
                f"{path} cannot be led to our resolver: {wrong.strerror}",
                hint="have it writable, or switch names off: NSM_LOCAL_DNS_SERVER_ENABLED=false",
            ) from wrong
    return before


def _back(path: str) -> None:
    if not path:
        return
    try:
        restore(path)
    except OSError as wrong:
        log.warning("resolv.conf not brought back", path=path, error=wrong.strerror)


def restore(path: str) -> bool:
    """Bring back what was in the file; whether it was ours. Blocks. Raises OSError.

    What somebody wrote over it meanwhile is theirs, and stays.
    """
    try:
        text = _text(path)
    except FileNotFoundError:
        return False
    was = original(text)
    if was is text:
        return False
    # first as long as it is: killed before the cut, there are only empty lines too many
    _write(path, was + "\n" * (_size(text) - _size(was)))
    os.truncate(path, _size(was))
    return True


def recover(path: str, server: tuple[str, int]) -> bool:
    """Bring back what a life that was killed left in the file; whether there was something.

    Whoever answers at server is alive, and the file still leads there. Blocks.
    """
    try:
        if not path or original(text := _text(path)) is text:
            return False
        _refuse_of_machine(path)
        family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(server)
            restored = restore(path)
    except FileNotFoundError:
        return False
    except (OSError, PreconditionError) as wrong:
        log.info("resolv.conf is left as it is", path=path, why=str(wrong))
        return False
    log.info("resolv.conf of before is back", path=path)
    return restored


def check_given(path: str) -> None:
    """Raises PreconditionError where path is the system's and was not given to this workload.

    Container runtimes and `ip netns exec` mount one over the machine's. Blocks.
    """
    if path != PATH:
        return
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = {line.split()[4] for line in file}
    if os.path.realpath(path) not in points:
        raise PreconditionError(
            f"{path} is this machine's, and not only this workload's",
            hint="NSM_RESOLV_CONF names another file, NSM_LOCAL_DNS_SERVER_ENABLED=true takes this"
            " one all the same, false says that no names are wanted",
        )


def private(name: str, text: str | None = None) -> str:
    """The resolv.conf of namespace name, at /etc/netns/NAME: as the system's, or text. Blocks.

    `ip netns exec NAME` mounts it over the system's. Take it away with `forget`.
    """
    path = f"{NETNS}/{name}/resolv.conf"
    if text is None:
        try:
            text = original(_text(PATH))
        except FileNotFoundError:
            text = ""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
    return path


def forget(name: str) -> None:
    """Take away what `private` made; nothing where it is not. Blocks."""
    folder = f"{NETNS}/{name}"
    with suppress(FileNotFoundError):
        os.unlink(f"{folder}/resolv.conf")
    for empty in (folder, NETNS):  # what somebody else has in there stays
        with suppress(OSError):
            os.rmdir(empty)


def _refuse_of_machine(path: str) -> None:
    """A file that programs outside our network namespace read must not lead into it."""
    try:
        if not os.path.samefile(path, PATH):
            return
    except FileNotFoundError:
        return
    net, mnt = _spaces("self")
    with suppress(OSError):  # not everybody may look at pid 1
        if _spaces("1")[0] == net:
            return
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            theirs = _spaces(pid)
            if theirs[1] == mnt and theirs[0] != net:
                break
    else:
        return
    raise PreconditionError(
        f"{path} is also that of programs outside this network namespace, such as pid {pid}",
        hint=f"start with `ip netns exec NAME` and a file {NETNS}/NAME/resolv.conf, which that"
        " mounts, or switch names off: NSM_LOCAL_DNS_SERVER_ENABLED=false",
    )


def _spaces(pid: str) -> tuple[str, str]:
    """The network namespace and the mount namespace of a process."""
    return os.readlink(f"/proc/{pid}/ns/net"), os.readlink(f"/proc/{pid}/ns/mnt")


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise PreconditionError(f"{path} has more than {LARGEST} bytes: no resolv.conf")
    return text


def _write(path: str, text: str) -> None:
    data = text.encode("utf-8", "surrogateescape")
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if os.write(file, data) != len(data):
            raise OSError(28, "it was written in part")
        os.ftruncate(file, len(data))
    finally:
        os.close(file)


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))
