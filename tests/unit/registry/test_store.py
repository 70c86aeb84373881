"""What survives the registry: a real SQLite file, and every way it can be unusable."""

import asyncio
import contextlib
import os
import sqlite3
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from nsm.errors import PreconditionError, UnavailableError
from nsm.model import Endpoint, Match, Service
from nsm.registrar import Gone
from registry.store import SCHEMA, open_store

ENDPOINT = Endpoint(
    "nse-1",
    ("icmp",),
    {"icmp": {"app": "x"}},
    "tcp://10.0.0.5:5001",
    expires=1_790_000_000_123_456_789,
    registered=1_780_000_000_000_000_001,
    path_ids=("spiffe://td/a", "spiffe://td/r"),
    unknown=b"\xfa\x06\x01x",  # field 111, of a newer peer
)
SERVICE = Service("icmp", "IP", (Match({"app": "x"}, metadata={}),), ("spiffe://td/a",))


async def test_what_was_kept_is_there_at_the_next_start(tmp_path: Path) -> None:
    path = str(tmp_path / "r.sqlite")
    async with open_store(path) as (store, loaded):
        assert (loaded.endpoints, loaded.services) == ([], [])
        await store.keep(ENDPOINT, SERVICE, replace(ENDPOINT, name="nse-2"))
        await store.keep(Gone(Endpoint, "nse-2"), Gone(Service, "never was"))
    async with open_store(path) as (_, loaded):
        assert loaded.endpoints == [ENDPOINT]
        assert loaded.services == [SERVICE]


async def test_only_its_owner_may_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    async with open_store(str(path)) as (store, _):
        await store.keep(ENDPOINT)
        for file in tmp_path.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


async def test_changes_that_come_together_are_written_together(tmp_path: Path) -> None:
    async with open_store(str(tmp_path / "r.sqlite")) as (store, _):
        some = [replace(ENDPOINT, name=f"nse-{n}") for n in range(1000)]
        await asyncio.gather(*(store.keep(one) for one in some))
        assert store.transactions <= 3


async def test_changes_of_one_name_keep_their_order(tmp_path: Path) -> None:
    path = str(tmp_path / "r.sqlite")
    async with open_store(path) as (store, _):
        await asyncio.gather(
            *(store.keep(replace(ENDPOINT, url=f"tcp://1.1.1.1:{n}")) for n in range(1, 50)),
            store.keep(Gone(Endpoint, "nse-1")),
            store.keep(replace(ENDPOINT, url="tcp://9.9.9.9:9")),
        )
    async with open_store(path) as (_, loaded):
        assert [e.url for e in loaded.endpoints] == ["tcp://9.9.9.9:9"]


async def test_a_caller_that_gives_up_harms_no_other(tmp_path: Path) -> None:
    path = str(tmp_path / "r.sqlite")
    async with open_store(path) as (store, _), asyncio.TaskGroup() as group:
        impatient = group.create_task(store.keep(replace(ENDPOINT, name="gone")))
        group.create_task(store.keep(ENDPOINT))
        await asyncio.sleep(0)
        impatient.cancel()
    async with open_store(path) as (_, loaded):
        assert "nse-1" in {e.name for e in loaded.endpoints}


async def test_a_change_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = str(tmp_path / "r.sqlite")
    async with open_store(path) as (store, _):
        await store.keep(SERVICE)
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages}")  # a full disk, of a kind
        big = replace(ENDPOINT, labels={"icmp": {"k": "v" * 100_000}})
        with pytest.raises(UnavailableError) as refused:
            await store.keep(big)
        assert all(part in str(refused.value) for part in ("'nse-1'", path, "SQLITE_FULL"))
        store._connection.execute("PRAGMA max_page_count = 1000000")
        await store.keep(big)  # and it goes on
    async with open_store(path) as (_, loaded):
        assert loaded.endpoints == [big]


async def refusal(path: Path) -> str:
    with pytest.raises(PreconditionError) as refused:
        async with open_store(str(path)):
            pass
    assert str(path) in str(refused.value)
    return str(refused.value)


async def test_a_store_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    async with open_store(str(path)) as (store, _):
        await store.keep(SERVICE)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    before = path.read_bytes()
    text = await refusal(path)
    assert f"has schema {SCHEMA + 1}, and this one knows up to {SCHEMA}" in text
    assert path.read_bytes() == before


async def test_a_file_that_is_no_database_is_said_to_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    path.write_bytes(b"not a database at all, by no means" * 100)
    before = path.read_bytes()
    assert "is damaged: file is not a database" in await refusal(path)
    assert path.read_bytes() == before


async def test_a_file_with_a_hole_in_it_is_said_to_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    async with open_store(str(path)) as (store, _):
        await store.keep(*(replace(ENDPOINT, name=f"nse-{n}") for n in range(2000)))
    with path.open("r+b") as file:
        file.seek(3 * 4096)
        file.write(os.urandom(20 * 4096))
    assert "is damaged" in await refusal(path)


async def test_a_record_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    async with open_store(str(path)) as (store, _):
        await store.keep(ENDPOINT)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE records SET body = x'ff'")
        connection.commit()
    assert "the endpoint 'nse-1' cannot be read" in await refusal(path)


async def test_somebody_elses_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    assert "some other program" in await refusal(path)
    assert path.read_bytes() == before


async def test_one_file_serves_one_registry(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    async with open_store(str(path)):
        assert "in use by another process" in await refusal(path)
    async with open_store(str(path)):
        pass


async def test_a_directory_that_is_not_there_is_said(tmp_path: Path) -> None:
    text = await refusal(tmp_path / "none" / "r.sqlite")
    assert "No such file or directory" in text
    assert "NSM_STORE" in text
