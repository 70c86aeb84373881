"""`nsmctl vl3` as an operator types it, against a registry, a manager and an address plan."""

import asyncio
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nsm.identity.source import HeldIdentity, Identity
from nsm.model import Endpoint, Service
from nsm.rpc.peers import Peers
from nsm.rpc.prefixes import keep_prefix
from tests.e2e.ipam.plans import OPERATOR, SETTINGS
from tests.e2e.registry.realms import ROOT, Program, Realm, realms
from tests.support.wait import until

NAMES = ("registry", "nsmgr", "ipam", "operator", "guest")
PAGE = ROOT / "docs" / "vl3.md"


@dataclass(frozen=True)
class Said:
    """What a command ended with."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out, self
        return json.loads(self.out)


@dataclass
class Site:
    """A domain of one manager, its registry and its address plan."""

    realm: Realm
    registry: Program
    nsmgr: Program
    plan: Program

    async def typed(self, line: str, who: str = "operator") -> asyncio.subprocess.Process:
        """Start a line; it goes on."""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "nsmctl", *shlex.split(line)),
            cwd="/",
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT),
                "COLUMNS": "120",
                "NSM_CONNECT_TO": self.nsmgr.url,
                "NSM_PREFIX_SERVER_URL": self.plan.url,
                "SPIFFE_ENDPOINT_SOCKET": f"unix://{self.realm.folder}/agent.sock",
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            group=self.realm.gids[who],
            extra_groups=(),
        )

    async def nsmctl(self, line: str, who: str = "operator") -> Said:
        """What a line ends with."""
        process = await self.typed(line, who)
        out, err = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode is not None
        assert b"\x1b" not in out + err
        return Said(process.returncode, out.decode(), err.decode())

    async def vl3(self, line: str, *, code: int = 0, who: str = "operator") -> str:
        """What `nsmctl vl3` says, on both its outputs."""
        said = await self.nsmctl(f"vl3 {line}", who)
        assert said.code == code, said
        return said.out + said.err

    async def offer(self, name: str, *services: str) -> None:
        """A router registers; its service comes first if it is not there."""
        async with self.realm.client(name, self.nsmgr) as client:
            for service in services:
                await client.register_service(Service(name=service, payload="IP"))
            url = "tcp://192.0.2.1:5003"
            await client.register_endpoint(Endpoint(name=name, services=services, url=url))

    @asynccontextmanager
    async def holding(self, name: str, pool: str, *families: int) -> AsyncIterator[list[str]]:
        """Prefixes that a router holds, as ours do. (Not grpcio: it breaks what forks.)"""
        held: list[str] = []
        source = HeldIdentity(Identity(self.realm.svid(name), self.realm.known))
        async with Peers(source, dial_timeout=5) as peers, asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    keep_prefix(
                        peers, self.plan.url, pool=pool, family=family,
                        on_lent=lambda prefix, _: held.append(prefix),
                    )
                )
                for family in families
            ]  # fmt: skip
            await until(lambda: len(held) == len(families), "prefixes of a router", bar=1.0)
            yield sorted(held)
            for task in tasks:
                task.cancel()

    async def retire(self, name: str) -> None:
        """A router goes."""
        async with self.realm.client(name, self.nsmgr) as client:
            await client.unregister_endpoint(Endpoint(name=name))


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with realms(tmp_path) as all_of_them:
        (realm,) = await all_of_them.make("td", programs=NAMES)
        registry = await realm.start("registry", NSM_MAX_PER_OWNER="3")
        excluded = str(tmp_path / "excluded.yaml")
        nsmgr = await realm.start(
            "nsmgr", "nsmgr", NSM_REGISTRY_URL=registry.url, NSM_EXCLUDED_PREFIXES_PATH=excluded
        )
        plan = await realm.start("ipam", "ipam", **SETTINGS | {"NSM_PREFIX": ""})
        yield Site(realm, registry, nsmgr, plan)


TWO = "--prefix 172.16.0.0/16 --prefix 2001:db8:10::/64"
BOTH = "172.16.0.0/16, 2001:db8:10::/64"


async def test_a_network_is_made_seen_joined_and_forgotten(site: Site) -> None:
    assert "no networks; `nsmctl vl3 create` makes one" in await site.vl3("list")
    made = await site.vl3(f"create orders-db {TWO}")
    assert made == f"orders-db  {BOTH}  made its pool and service\n"
    assert f"orders-db  {BOTH}  was there\n" == await site.vl3(f"create orders-db {TWO}")
    found = await site.nsmctl("services --json")
    assert found.json == [{"name": "orders-db", "payload": "IP", "matches": []}]
    await site.offer("vl3-a", "orders-db")
    await site.offer("vl3-b", "orders-db")
    async with site.holding("vl3-a", "orders-db", 4, 6) as held:
        assert held == ["172.16.0.0/24", "2001:db8:10::/112"]
        shown = await site.vl3("show orders-db")
        listed = (await site.nsmctl("vl3 list --json")).json
    lines = shown.splitlines()
    assert lines[0] == f"orders-db  {BOTH}  2 routers"
    assert lines[2].split() == ["172.16.0.0/24", "vl3-a", "spiffe://td/vl3-a", "held"]
    assert lines[3].split()[:2] == ["2001:db8:10::/112", "vl3-a"]
    assert lines[4].split() == ["vl3-b", "spiffe://td/vl3-b", "nothing", "held"]
    (one,) = listed
    assert one["pool"]["lengths"] == {"ipv4": 24, "ipv6": 112}
    assert one["service"] == {"payload": "IP", "identity": OPERATOR}
    assert one["routers"][0]["prefixes"] == ["172.16.0.0/24", "2001:db8:10::/112"]
    assert [lease["ends"] for lease in one["leases"]] == [None, None]
    refused = await site.vl3("delete orders-db", code=1)
    assert refused == ("orders-db has 2 routers: vl3-a, vl3-b\n  end them first, or say --force\n")
    await site.retire("vl3-a")
    await site.retire("vl3-b")

    async def left() -> bool:
        return "held" not in await site.vl3("show orders-db")

    await until(left, "the address plan to notice that a router went", bar=3.0)
    assert await site.vl3("delete orders-db") == f"orders-db  {BOTH}  forgot its service and pool\n"
    gone = await site.vl3("delete orders-db", code=1)
    assert "there is no orders-db: no service, and no such pool; the address plan has none" in gone
    assert (await site.nsmctl("services --json")).json == []


@pytest.mark.long
async def test_what_was_done_by_half_is_seen_and_completed(site: Site) -> None:
    await site.vl3(f"create orders-db {TWO}")
    await site.registry.stop(signal.SIGKILL)  # it keeps nothing: this one has no store
    await site.registry.start()
    shown = await site.vl3("show orders-db")
    assert f"orders-db  {BOTH}  no service\n" in shown
    (advice,) = re.findall(r"`nsmctl (.*)` completes it", shown)
    assert "no service" in await site.vl3("list")
    done = await site.nsmctl(advice)
    assert done.out == f"orders-db  {BOTH}  made its service\n"
    await site.plan.stop(signal.SIGKILL)  # nor does this one
    await site.plan.start(**SETTINGS | {"NSM_PREFIX": ""})
    assert "orders-db  no pool\n" in await site.vl3("show orders-db")
    assert re.search(r"orders-db +no pool +0", await site.vl3("list"))
    assert await site.vl3(f"create orders-db {TWO}") == f"orders-db  {BOTH}  made its pool\n"
    await site.plan.stop(signal.SIGKILL)
    await site.plan.start(**SETTINGS | {"NSM_PREFIX": "10.0.0.0/16"})
    assert await site.vl3("delete orders-db") == "orders-db    forgot its service\n"
    listed = await site.vl3("list")
    assert re.search(r"- +10\.0\.0\.0/16 +for routers that name no pool +0", listed)
    await site.vl3("create payroll --prefix 10.1.0.0/16 --router-prefix-length 28")
    await site.registry.stop(signal.SIGKILL)
    await site.registry.start()
    assert await site.vl3("delete payroll") == "payroll  10.1.0.0/16  forgot its pool\n"


@pytest.mark.long
async def test_what_cannot_be_made_whole_is_taken_back(site: Site) -> None:
    for number in (1, 2, 3):  # as many names as the registry gives one identity
        await site.vl3(f"create n{number} --prefix 10.{number}.0.0/16")
    refused = await site.vl3("create n4 --prefix 10.4.0.0/16", code=1)
    assert "raise NSM_MAX_PER_OWNER" in refused
    assert "n4" not in await site.vl3("list")
    taken = await site.vl3("create n5 --prefix 10.1.8.0/24", code=1)
    assert "10.1.8.0/24 of pool 'n5' overlaps 10.1.0.0/16 of pool 'n1'" in taken
    other = await site.vl3("create n1 --prefix 10.9.0.0/16", code=1)
    assert "pool 'n1' is there with 10.1.0.0/16, lending /24" in other
    assert [one["state"] for one in (await site.nsmctl("vl3 list --json")).json] == [
        "0 routers"
    ] * 3


async def test_a_pool_that_is_held_keeps_its_service(site: Site) -> None:
    await site.vl3(f"create orders-db {TWO}")
    async with site.holding("vl3-a", "orders-db", 4):
        refused = await site.vl3("delete orders-db", code=1)
        assert "spiffe://td/vl3-a holds 172.16.0.0/24" in refused
        shown = await site.vl3("show orders-db")
        assert f"orders-db  {BOTH}  0 routers" in shown
        assert "172.16.0.0/24 (none registered)" in " ".join(shown.split())
        forced = await site.vl3("delete orders-db --force")
        assert forced == f"orders-db  {BOTH}  forgot its service and pool\n"


async def test_a_service_that_is_its_routers_is_left_to_them(site: Site) -> None:
    await site.offer("vl3-a", "orders-db")
    assert f"orders-db  {BOTH}  made its pool\n" == await site.vl3(f"create orders-db {TWO}")
    await site.retire("vl3-a")
    refused = await site.vl3("delete orders-db", code=1)
    assert "network service 'orders-db' belongs to spiffe://td/vl3-a" in refused
    assert f"orders-db  {BOTH}  0 routers\n" in await site.vl3("show orders-db")
    forced = await site.vl3("delete orders-db --force")
    assert f"orders-db  {BOTH}  forgot its pool\n" in forced
    assert "its service stays: network service 'orders-db' belongs to" in forced


@pytest.mark.long
async def test_what_is_no_network_is_let_alone(site: Site) -> None:
    async with site.realm.client("nse", site.nsmgr) as client:
        await client.register_service(Service(name="frames", payload="ETHERNET"))
    for line in ("create frames --prefix 10.0.0.0/16", "show frames", "delete frames --force"):
        refused = await site.vl3(line, code=1)
        assert "frames is a service of payload ETHERNET, which vL3 is not" in refused
    assert await site.vl3("list") == "no networks; `nsmctl vl3 create` makes one\n"


WRONG = (
    ("create @meet --prefix 10.0.0.0/16", 2, "'@meet' says no name"),
    ("create orders@ --prefix 10.0.0.0/16", 2, "'orders@' says no domain"),
    ("create a/b --prefix 10.0.0.0/16", 2, "no client could ask for 'a/b'"),
    ("create orders", 2, "--prefix"),
    ("create orders --prefix 10.0.0.1/16", 2, "10.0.0.1/16' is none"),
    ("create orders --prefix 10.0.0.0/24 --router-prefix-length 16", 2, "a length from 24 to"),
    ("list --domain 'a b'", 2, "'a b' is no domain"),
    ("show orders@meet", 3, "NSM_PROXY_REGISTRY_URL is not set"),
    ("show orders --address-plan ''", 2, "say --address-plan tcp://HOST:5006"),
    ("show orders --address-plan tcp://a:1,tcp://b:1", 2, "2 address plans"),
    ("show orders --address-plan tcp://127.0.0.1:1", 4, "tcp://127.0.0.1:1"),
)


@pytest.mark.long
async def test_a_line_that_cannot_be_obeyed_says_why(site: Site) -> None:
    for line, code, says in WRONG:
        assert says in await site.vl3(line, code=code)
    refused = await site.nsmctl("vl3 show orders --address-plan tcp://127.0.0.1:1 --json")
    assert (refused.code, refused.json["code"]) == (4, "UNAVAILABLE")


async def test_who_is_no_operator_changes_nothing(site: Site) -> None:
    refused = await site.vl3(f"create orders-db {TWO}", code=1, who="guest")
    assert refused == (
        "spiffe://td/guest may not manage the address plan's pools;"
        " add it to NSM_OPERATORS of the address plan\n"
    )
    assert (await site.nsmctl("services --json")).json == []


@pytest.mark.long
async def test_an_address_plan_that_hangs_is_told_and_left_by_ctrl_c(site: Site) -> None:
    assert site.plan._process
    site.plan._process.send_signal(signal.SIGSTOP)
    try:
        said = await site.vl3("list", code=1)
        assert re.search(r"or the address plan at tcp://\S+ did not answer within 5 s", said)
        process = await site.typed("vl3 list")
        await until(lambda: _asks(process.pid), "nsmctl to ask", bar=2.0)
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), 20)
        assert (process.returncode, err) == (130, b"")
    finally:
        site.plan._process.send_signal(signal.SIGCONT)


def _asks(pid: int) -> bool:
    """Whether it listens to signals of its own: from then on it asks."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16)
    return bool(caught >> (signal.SIGHUP - 1) & 1)


async def test_every_line_of_the_page_does_as_printed(site: Site) -> None:
    shown = re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    steps = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", "".join(shown), re.MULTILINE)
    assert len(steps) >= 4
    for line, printed in steps:
        assert line.startswith("nsmctl vl3 ")
        said = await site.nsmctl(line.removeprefix("nsmctl "))
        assert said.code == 0, said
        assert said.out.split() == printed.split(), line
