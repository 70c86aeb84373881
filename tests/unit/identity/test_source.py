"""An identity of one moment, and waiting for the next."""

import asyncio
from pathlib import Path

import pytest

from nsm.errors import InvalidError, NsmError, PreconditionError
from nsm.identity.authority import Authority, write_atomically
from nsm.identity.files import file_source
from nsm.identity.source import HeldIdentity, Identity, Svid
from nsm.identity.spiffe import SpiffeId
from tests.support.wait import until

DOMAIN = Authority.create("td.example")
ME = SpiffeId.parse("spiffe://td.example/a")


def identity() -> Identity:
    return Identity(DOMAIN.issue(ME), {"td.example": DOMAIN.certificates})


async def test_whoever_waits_gets_the_next_identity() -> None:
    first, second = identity(), identity()
    held = HeldIdentity(first)
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(held.changed(first)) for _ in range(3)]
        await asyncio.sleep(0)
        assert held.replace(second)
    assert [task.result() for task in waiting] == [second] * 3
    assert held.identity is second
    assert await held.changed(first) is second


async def test_the_same_again_wakes_nobody() -> None:
    first = identity()
    held = HeldIdentity(first)
    assert not held.replace(Identity(first.svid, dict(first.bundles)))
    assert held.identity is first


def test_a_key_is_in_no_repr() -> None:
    assert "key" not in repr(identity())


def test_authorities_of_all_domains_are_listed_once() -> None:
    other = Authority.create("other.example")
    one = Identity(
        DOMAIN.issue(ME),
        {"td.example": DOMAIN.certificates, "other.example": other.certificates * 2},
    )
    assert one.authorities == (*DOMAIN.certificates, *other.certificates)


class Files:
    def __init__(self, directory: Path) -> None:
        self.cert, self.key, self.ca = (directory / name for name in ("cert", "key", "ca"))
        self.write(DOMAIN.issue(ME))
        self.ca.write_bytes(DOMAIN.bundle_pem())

    def write(self, svid: Svid) -> None:
        write_atomically(self.key, svid.key_pem(), mode=0o600)
        write_atomically(self.cert, svid.chain_pem(), mode=0o644)

    def source(self, every: float = 0.02):  # type: ignore[no-untyped-def]
        return file_source(self.cert, self.key, {"td.example": self.ca}, every=every)


async def test_renewed_files_are_read_again(tmp_path: Path) -> None:
    files = Files(tmp_path)
    async with files.source() as source:
        first = source.identity
        assert first.svid.id == ME
        renewed = DOMAIN.issue(ME)
        files.write(renewed)
        assert (await asyncio.wait_for(source.changed(first), 5)).svid == renewed


async def test_a_renewed_bundle_is_read_again(tmp_path: Path) -> None:
    files = Files(tmp_path)
    other = Authority.create("td.example")
    async with files.source() as source:
        first = source.identity
        write_atomically(files.ca, DOMAIN.bundle_pem() + other.bundle_pem(), mode=0o644)
        changed = await asyncio.wait_for(source.changed(first), 5)
        assert changed.bundles == {"td.example": (*DOMAIN.certificates, *other.certificates)}
        assert changed.svid == first.svid


async def test_half_a_renewal_leaves_the_last_good_identity(tmp_path: Path) -> None:
    files = Files(tmp_path)
    renewed = DOMAIN.issue(ME)
    async with files.source() as source:
        first = source.identity
        write_atomically(files.key, renewed.key_pem(), mode=0o600)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(source.changed(first), 0.2)
        write_atomically(files.cert, renewed.chain_pem(), mode=0o644)
        assert (await asyncio.wait_for(source.changed(first), 5)).svid == renewed


async def test_files_that_vanish_leave_the_last_good_identity(tmp_path: Path) -> None:
    files = Files(tmp_path)
    async with files.source() as source:
        first = source.identity
        files.cert.unlink()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(source.changed(first), 0.2)
        renewed = DOMAIN.issue(ME)
        files.write(renewed)
        assert (await asyncio.wait_for(source.changed(first), 5)).svid == renewed


@pytest.mark.parametrize("which", ["cert", "key", "ca"])
async def test_a_missing_file_is_named_at_the_start(tmp_path: Path, which: str) -> None:
    files = Files(tmp_path)
    path: Path = getattr(files, which)
    path.unlink()
    with pytest.raises(PreconditionError, match=str(path)):
        async with files.source():
            pass


@pytest.mark.parametrize("which", ["cert", "key", "ca"])
async def test_a_file_without_end_is_refused(tmp_path: Path, which: str) -> None:
    files = Files(tmp_path)
    path: Path = getattr(files, which)
    path.write_bytes(b"x" * (5 * 1024 * 1024))
    with pytest.raises(NsmError, match=str(path)):
        async with files.source():
            pass


async def test_a_bundle_of_workloads_is_refused(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.ca.write_bytes(DOMAIN.issue(ME).chain_pem())
    with pytest.raises(InvalidError, match="no authority's"):
        async with files.source():
            pass


async def test_an_error_of_the_block_leaves_it_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        async with Files(tmp_path).source():
            raise KeyError
    assert len(asyncio.all_tasks()) == 1


async def test_a_block_that_is_cancelled_ends_cancelled(tmp_path: Path) -> None:
    entered = asyncio.Event()

    async def use() -> None:
        async with Files(tmp_path).source():
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(use())
    await entered.wait()
    task.cancel()
    await until(task.done, "the cancelled block to end", bar=0.5)
    assert task.cancelled()
    assert len(asyncio.all_tasks()) == 1
