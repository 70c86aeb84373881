"""resolv.conf there and back, whatever is in it and whoever writes it."""

import asyncio
import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm.errors import NotFoundError, PreconditionError, RightsError
from nsm.names import resolvconf
from nsm.names.resolvconf import Before, leading, led, original, read

TEXT = "# by hand\nsearch a.example b.example.\nnameserver 192.0.2.1\noptions ndots:5 edns0\n"
lines = st.lists(
    st.one_of(
        st.sampled_from(
            ["nameserver 192.0.2.1", "search a b", "", "# was: x", "# no line end before", " "]
        ),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12),
    ),
    max_size=8,
)


@given(lines, st.booleans())
def test_what_was_there_comes_back_to_the_last_byte(some: list[str], ended: bool) -> None:
    text = "\n".join(some) + ("\n" if ended else "")
    there = led(text, "127.0.0.1")
    assert original(there) == text
    assert led(there, "127.0.0.1") == there
    assert len(there.encode()) > len(text.encode())  # one write covers it all
    assert read(there).servers == ("127.0.0.1",)
    assert read(there).search == read(text).search
    assert read(there).ndots == read(text).ndots


def test_what_a_file_says_is_what_libc_understands() -> None:
    assert read(TEXT) == Before(("192.0.2.1",), ("a.example", "b.example"), 5)
    wild = (
        "nameserver\nnameserver x\nnameserver ::1 # c\n;nameserver 192.0.2.9\n#search x\ndomain d\n"
        "search .\noptions ndots:x ndots:99999 ndots:\n" + "nameserver 192.0.2.1\n" * 5
    )
    assert read(wild) == Before(("::1", "192.0.2.1", "192.0.2.1"), (), 15)
    assert read("") == Before()


async def test_the_file_leads_to_us_for_a_block_and_back(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(TEXT)
    inode = path.stat().st_ino

    async def fails() -> None:
        async with leading(str(path), "127.0.0.1") as before:
            assert before == Before(("192.0.2.1",), ("a.example", "b.example"), 5)
            words = [line.split() for line in path.read_text().splitlines() if line[0] != "#"]
            assert ["nameserver", "127.0.0.1"] in words
            assert ["search", "a.example", "b.example."] in words
            assert ["options", "ndots:5", "edns0"] in words
            assert ["nameserver", "192.0.2.1"] not in words
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fails()
    assert path.read_text() == TEXT
    assert path.stat().st_ino == inode  # a mounted file cannot be replaced


async def test_the_file_comes_back_also_where_the_end_is_impatient(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(TEXT)
    led_there = asyncio.Event()

    async def hold() -> None:
        async with leading(str(path), "127.0.0.1"):
            led_there.set()
            await asyncio.Event().wait()

    task = asyncio.get_running_loop().create_task(hold())
    await led_there.wait()
    assert path.read_text() != TEXT
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert path.read_text() == TEXT


async def test_who_finds_what_a_killed_one_left_knows_what_was_before(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(led(TEXT, "127.0.0.1"))
    async with leading(str(path), "127.0.0.2") as before:
        assert before.servers == ("192.0.2.1",)
    assert path.read_text() == TEXT


def test_killed_before_the_cut_it_is_back_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(led(TEXT, "127.0.0.1"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "truncate", killed)
        with pytest.raises(KeyboardInterrupt):
            resolvconf.restore(str(path))
    assert path.read_text().rstrip("\n") == TEXT.rstrip("\n")
    assert read(path.read_text()) == read(TEXT)


async def test_what_somebody_else_wrote_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(TEXT)
    async with leading(str(path), "127.0.0.1"):
        path.write_text("nameserver 192.0.2.77\n")
    assert path.read_text() == "nameserver 192.0.2.77\n"
    async with leading(str(path), "127.0.0.1"):
        path.unlink()
    assert not path.exists()


@pytest.mark.parametrize(
    ("written", "ours"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("::ffff:0.0.0.0", "127.0.0.1"),
        ("::", "::1"),
        ("0:0:0:0:0:0:0:1", "::1"),
    ],
)
async def test_our_own_address_is_no_server_of_before_however_it_is_written(
    tmp_path: Path, written: str, ours: str
) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(f"nameserver {written}\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\n")
    async with leading(str(path), ours) as before:
        assert before.servers == ("192.0.2.1", "fe80::1%eth0")


async def test_a_file_that_is_not_there_or_cannot_be_written_is_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "resolv.conf")
    with pytest.raises(NotFoundError, match=path):
        async with leading(path, "127.0.0.1"):
            pass
    Path(path).write_text("#" * 65_537)
    with pytest.raises(PreconditionError, match=r"no resolv\.conf"):
        async with leading(path, "127.0.0.1"):
            pass
    Path(path).write_text(TEXT)

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(resolvconf, "_write", read_only)
    with pytest.raises(RightsError, match=r"Read-only.*NSM_LOCAL_DNS_SERVER_ENABLED"):
        async with leading(path, "127.0.0.1"):
            pass
