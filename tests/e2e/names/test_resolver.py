"""A workload's names: stock dig and getent in its namespace, unbound as the others' servers."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nsm.kernel.routing import Routing
from nsm.model import Connection, Segment
from nsm.model import Path as Way
from nsm.names import resolvconf, templates
from nsm.names.router import RouterNames
from nsm.names.server import Sockets
from tests.e2e.names.dig import Heard, dig
from tests.e2e.names.places import address, segment
from tests.support.nameserver import Nameserver, nameserver
from tests.support.spaces import Space

ROOT = Path(__file__).parents[3]
BEFORE = "search corp.example\nnameserver {}\noptions ndots:1\n"
CORP = """\
www 60 IN A 192.0.2.80
www 60 IN TXT "of the company"
long 60 IN TXT {long}
alias 60 IN CNAME www
"""
MANY = " ".join(f'"{n:03d}{"x" * 200}"' for n in range(10))


@dataclass
class Workload:
    """A namespace whose programs ask our resolver: a process, which is killed and started."""

    space: Space
    file: Path
    before: Nameserver
    router: RouterNames
    told: dict[str, tuple[list[str], list[str], list[str]]] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start; return when names are led to it."""
        self.process = await asyncio.create_subprocess_exec(
            *("ip", "netns", "exec", self.space.name, sys.executable, "-P"),
            *("-m", "tests.e2e.names.workload", str(self.file), json.dumps(self.told)),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert await self._says() == b"READY\n"

    async def tell(self, **told: tuple[list[str], list[str], list[str]]) -> None:
        """Its connections say this from now on."""
        self.told = dict(told)
        assert self.process
        assert self.process.stdin
        self.process.stdin.write(json.dumps(told).encode() + b"\n")
        assert await self._says() == b"TOLD\n"

    async def _says(self) -> bytes:
        assert self.process
        assert self.process.stdout
        return await self.process.stdout.readline()

    async def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it."""
        if self.process is not None:
            self.process.send_signal(how)
            await self.process.wait()
            self.process._transport.close()  # type: ignore[attr-defined]
            self.process = None

    async def dig(self, *words: str) -> Heard:
        """What a program in there hears of its resolver."""
        return await dig(self.space, "127.0.0.1", *words)

    async def getent(self, name: str) -> set[str]:
        """What libc in there makes of a name, of resolv.conf and all."""
        done = await asyncio.to_thread(self.space.run, "getent", "ahosts", name)
        return {line.split()[0] for line in done.stdout.splitlines()}


@asynccontextmanager
async def a_workload(folder: Path, file: Path | None = None) -> AsyncIterator[Workload]:
    """A workload at n 0, the server of before at 1, a router of `db` with member m at 2, and
    nobody at 3."""
    async with AsyncExitStack() as stack:
        spaces = stack.enter_context(segment(4))
        before = await stack.enter_async_context(
            nameserver(folder / "before", address(1), 53, space=spaces[1].name)
        )
        await before.serve(
            {
                "corp.example": CORP.format(long=MANY),
                "wide": "www A 192.0.2.90\nm.db A 192.0.2.91",
            },
            negative=60,
        )
        router = RouterNames(templates.parse_all(["{client}.{service}"]), apexes=["db"])
        router.cover(["172.16.0.0/16"])
        await stack.enter_async_context(
            router.serving([(address(2), 53)], Sockets(Routing(spaces[2].path).inside))
        )
        router.join(member("m"), ["172.16.2.5/32", "fd16::5/128"])
        name = spaces[0].name
        stack.callback(resolvconf.forget, name)
        path = Path(resolvconf.private(name, BEFORE.format(address(1))))
        made = Workload(spaces[0], path, before, router)
        made.told = {"w1": ([address(2)], ["db"], ["172.16.0.0/16"])}
        stack.push_async_callback(made.end, signal.SIGKILL)
        await made.start()
        yield made


def member(name: str) -> Connection:
    return Connection(id=f"c-{name}", service="db", path=Way((Segment(name, f"c-{name}"),)))


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Workload]:
    async with a_workload(tmp_path) as one:
        yield one


async def test_each_name_is_asked_of_whom_it_belongs_to(made: Workload) -> None:
    for how in ("+notcp", "+tcp", "+noedns"):
        assert (await made.dig("m.db", "A", how)).data == ["172.16.2.5"]
        assert (await made.dig("m.db", "AAAA", how)).data == ["fd16::5"]
        assert (await made.dig("www.corp.example", "A", how)).data == ["192.0.2.80"]
    assert (await made.dig("www.corp.example", "TXT")).data == ['"of the company"']
    heard = await made.dig("alias.corp.example")
    assert heard.data == ["www.corp.example.", "192.0.2.80"]
    assert (await made.dig("-x", "172.16.2.5")).data == ["m.db."]
    assert (await made.dig("m.db", "TXT")).status == "NOERROR"
    for name in ("none.db", "none.corp.example"):
        heard = await made.dig(name)
        assert heard.status == "NXDOMAIN"
        assert any(" SOA " in one for one in heard.authority)
    assert "ra" in heard.flags
    cut = await made.dig("long.corp.example", "TXT", "+ignore")
    assert "tc" in cut.flags
    assert len((await made.dig("long.corp.example", "TXT")).text) > 2000


async def test_programs_find_names_as_libc_looks_for_them(made: Workload) -> None:
    assert await made.getent("m.db") == {"172.16.2.5", "fd16::5"}
    assert await made.getent("www.corp.example") == {"192.0.2.80"}
    assert await made.getent("www") == {"192.0.2.80"}  # the search list of before
    assert await made.getent("m") == {"172.16.2.5", "fd16::5"}  # the connection's
    assert await made.getent("none") == set()
    heard = await made.dig("m", "A")
    assert heard.answer == ["m. CNAME m.db.", "m.db. A 172.16.2.5"]
    await made.tell(
        w1=([address(2)], ["b", "db"], []), w2=([address(2)], ["deep.corp.example"], [])
    )
    assert (await made.dig("m", "A")).data == ["m.db.", "172.16.2.5"]


async def test_no_name_that_resolved_before_stops_to(made: Workload) -> None:
    # the connection's search domains are those of the whole world around it
    await made.tell(w1=([address(2)], ["db.wide", "wide", "example", "corp.example"], []))
    assert (await made.dig("www.corp.example")).data == ["192.0.2.80"]
    assert (await made.dig("www.wide")).data == ["192.0.2.90"]
    assert await made.getent("www") == {"192.0.2.80"}
    assert (await made.dig("none.corp.example")).status == "NXDOMAIN"
    # where its servers are gone, too
    await made.tell(w1=([address(3)], ["wide", "example"], []))
    assert (await made.dig("www.corp.example")).data == ["192.0.2.80"]
    assert (await made.dig("none.wide")).status == "SERVFAIL"  # who would know, did not say
    # and an authority's no is a no
    await made.tell(w1=([address(2)], ["db"], []))
    assert (await made.dig("none.db")).status == "NXDOMAIN"


async def test_the_first_of_several_servers_that_knows_is_believed(made: Workload) -> None:
    await made.tell(w1=([address(3), address(2)], ["db"], []), w2=([address(3)], ["db"], []))
    loop = asyncio.get_running_loop()
    start = loop.time()
    assert (await made.dig("m.db")).data == ["172.16.2.5"]
    assert loop.time() - start < 2.5  # who does not answer is not waited for


async def test_an_answer_holds_as_long_as_it_says_and_not_beyond_its_connection(
    made: Workload,
) -> None:
    first = await made.dig("www.corp.example")
    none = await made.dig("none.corp.example")
    assert (await made.dig("m.db")).ttls == {5}
    await made.before.stop()
    made.router.leave("c-m")
    again = await made.dig("www.corp.example")
    assert again.data == first.data
    assert max(again.ttls) <= 60
    assert (await made.dig("none.corp.example")).status == none.status == "NXDOMAIN"
    assert (await made.dig("other.corp.example")).status == "SERVFAIL"
    assert (await made.dig("m.db")).data == ["172.16.2.5"]
    await made.tell(w1=([address(2)], ["db"], []))  # its prefixes changed: it says something else
    assert (await made.dig("m.db")).status == "NXDOMAIN"
    await made.before.start()
    assert (await made.dig("other.corp.example")).status == "NXDOMAIN"


async def test_a_name_is_there_a_moment_after_it_was_not(made: Workload) -> None:
    assert (await made.dig("new.db")).status == "NXDOMAIN"
    made.router.join(member("new"), ["172.16.2.9"])
    heard = await made.dig("new.db")
    assert max(heard.ttls) <= 5  # that there is none, is believed for a moment only
    await made.tell(w2=([address(2)], ["db"], []))
    assert (await made.dig("new.db")).data == ["172.16.2.9"]


async def test_resolv_conf_comes_back_whatever_happens(made: Workload) -> None:
    text = BEFORE.format(address(1))
    led = made.file.read_text()
    assert "\nnameserver 127.0.0.1\n" in led
    assert f"\nnameserver {address(1)}\n" not in led
    await made.end()
    assert made.file.read_text() == text
    await made.start()
    await made.end(signal.SIGKILL)
    assert made.file.read_text() == led
    await made.start()  # the next one knows what was before the first
    assert (await made.dig("www.corp.example")).data == ["192.0.2.80"]
    assert made.file.read_text() == led
    await made.end()
    assert made.file.read_text() == text


async def test_a_file_of_programs_elsewhere_is_never_led_into_a_namespace(
    made: Workload, tmp_path: Path
) -> None:
    await made.end()
    stand_in = tmp_path / "resolv.conf"  # mounted where nobody but the test sees it
    stand_in.write_text("nameserver 192.0.2.1\n")
    script = (
        f'mount --bind {stand_in} /etc/resolv.conf && "$@" </dev/null; echo "ended: $?";'
        " cat /etc/resolv.conf"
    )
    process = await asyncio.create_subprocess_exec(
        *("timeout", "60", "unshare", "--mount", "--propagation", "private", "sh", "-c", script),
        *("sh", "nsenter", f"--net={made.space.path}", sys.executable, "-P"),
        *("-m", "tests.e2e.names.workload", "/etc/resolv.conf"),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    heard, said = await process.communicate()
    assert b"is also that of programs outside this network namespace" in said, said
    assert b"/etc/netns/NAME/resolv.conf" in said
    assert heard == b"ended: 1\nnameserver 192.0.2.1\n"
