"""Processes that outlive whoever started them, and are found again."""

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from endpoints.supplier import house as at_work
from endpoints.supplier.house import House, bound, read
from endpoints.supplier.recipes import Recipe
from nsm.errors import InvalidError, PreconditionError, TakenError
from tests.support.wait import until
from tests.unit.endpoints.supplier.conftest import INHERITED, recipe, running

TELL = "readlink /proc/self/fd/0; ls /proc/self/fd | tr '\\n' ' '; echo; ps -o sid= -p $$; env"


async def test_a_router_is_told_what_its_recipe_says_and_has_nothing_else_of_ours(
    house: House,
) -> None:
    environment = {"NSM_POOL": "own", "NSM_ODD": "$(id) 'x'"}
    asked = recipe(TELL, environment=environment, namespace="/proc/self/ns/net")
    child = house.start(asked)
    assert await child.ended() == 0
    said = Path(house.log_of(asked)).read_text()
    told = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    for ours in ("PWD", "SHLVL", "_", "OLDPWD"):  # a shell's
        told.pop(ours, None)
    assert told == {
        **INHERITED,
        **environment,
        "NSM_NAME": "r",
        "NSM_SERVICE_NAMES": "net",
        "NSM_NAMESPACE": "/proc/self/ns/net",
    }
    null, fds, session = said.splitlines()[:3]
    assert null == "/dev/null"
    assert set(fds.split()) <= {"0", "1", "2", "3"}, fds  # 3 is ls's own
    assert int(session) == child.mark.pid
    child.release()


async def test_its_word_is_believed_until_it_says_otherwise(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "echo serving >$NSM_HEALTH_FILE; read x; exit 3"
    monkeypatch.setattr(at_work, "_command", lambda _: ("/bin/sh", "-c", code))
    module = replace(recipe(), argv=())
    child = house.start(module)
    assert await child.ended() == 3, "its input is empty"
    assert child.serving(), "it died, and could not say"
    health = Path(child.health)
    for said in ("", "prefix: none is lent\n", "serving and more\n"):
        health.write_text(said)
        assert not child.serving(), said
    health.unlink()
    assert not child.serving()
    os.mkfifo(health)
    assert not child.serving(), "and nobody waits for its writer"
    health.unlink()
    elsewhere = Path(house.folder, "elsewhere")
    elsewhere.write_text("serving\n")
    health.symlink_to(elsewhere)
    assert not child.serving(), "it is not its own file"
    health.unlink()
    health.write_text("serving\n")
    child.release()
    monkeypatch.setattr(at_work, "_command", lambda _: ("/bin/sleep", "600"))
    child = house.start(module)
    assert not child.serving(), "what the one before it said is not its word"
    child.release()
    monkeypatch.undo()
    stranger = house.start(recipe("exit 4", name="s"))
    assert stranger.serving(), "it is not known to say"
    assert await stranger.ended() == 4
    stranger.release()


async def test_it_outlives_us_and_the_next_life_finds_it(house: House, tmp_path: Path) -> None:
    asked = recipe()
    first = house.start(asked)
    first.release()
    found, noted = house.find(asked)
    assert found
    assert (found.mark, noted) == (first.mark, True)
    os.kill(found.mark.pid, signal.SIGKILL)
    assert await found.ended() is None, "it is not ours to reap"
    assert first.process
    os.waitpid(first.mark.pid, 0)
    found.release()
    assert house.find(asked) == (None, True)
    house.forget(asked)
    assert house.find(asked) == (None, False)


async def test_a_number_that_is_somebody_elses_by_now_is_not_ours(house: House) -> None:
    asked = recipe()
    child = house.start(asked)
    house._note(asked, replace(child.mark, start=1))
    child.release()
    (pid,) = running(Path(house.folder))
    assert os.path.exists(f"/proc/{pid}")
    assert house.find(asked) == (None, True)


async def test_what_nobody_could_find_never_begins(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """We are killed, or cannot write, before it is noted: its gate does not open."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(house, "_note", full)
    trace = tmp_path / "began"
    with pytest.raises(PreconditionError, match="router r of net cannot be started: No space"):
        house.start(recipe(f"touch {trace}"))
    assert not trace.exists()
    assert house.find(recipe()) == (None, False)
    gate = ["/bin/sh", "-c", at_work.GATE, "r", "/usr/bin/touch", str(trace)]
    assert subprocess.run(gate, stdin=subprocess.DEVNULL, check=False).returncode != 0
    assert not trace.exists()


async def test_what_cannot_be_started_is_said_with_its_place(house: House) -> None:
    where = "namespace /nowhere/here of router r of net is not there"
    with pytest.raises(PreconditionError, match=where):
        house.start(recipe(namespace="/nowhere/here"))
    with pytest.raises(PreconditionError, match=r"cannot be started: .*routers\.yaml:1"):
        house.start(recipe(log="/nowhere/log"))


def test_a_node_has_one_supplier_for_its_routers(house: House, tmp_path: Path) -> None:
    with (
        pytest.raises(TakenError, match="another supplier runs with NSM_STATE_DIR"),
        House(house.folder, {}),
    ):
        pass
    with House(str(tmp_path / "other"), {}):
        pass


def test_what_others_may_write_says_nothing_of_what_is_run(tmp_path: Path) -> None:
    file = tmp_path / "routers.yaml"
    with pytest.raises(InvalidError, match=r"routers\.yaml, which cannot be read: No such file"):
        read(str(file))
    file.write_text("net: {name: r}")
    file.chmod(0o644)
    assert read(str(file)) == (Recipe(service="net", name="r", where=f"{file}:1"),)
    for mode in (0o664, 0o646):
        file.chmod(mode)
        with pytest.raises(
            InvalidError, match=f"others than uid 0 may write: uid 0, mode 0{mode:o}"
        ):
            read(str(file))
    file.chmod(0o644)
    file.write_bytes(b"\xff")
    with pytest.raises(InvalidError, match="no UTF-8"):
        read(str(file))
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(InvalidError, match="NSM_STATE_DIR is"), House(str(folder), {}):
        pass


async def test_a_log_is_bounded_while_it_is_written(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_work, "LARGEST_LOG", 10)
    asked = recipe("echo 0123456789 12; sleep 0.2; echo last; exec sleep 9")
    child = house.start(asked)
    log = Path(house.log_of(asked))
    await until(lambda: log.read_text(), "its first word", bar=0.5)
    bound([str(log), "/nowhere/log"])
    await until(lambda: log.read_text() == "last\n", "its next word", bar=0.5)
    assert Path(f"{log}.1").read_text() == "0123456789 12\n"
    assert child.words() == "last", "it is shorter now than before it was started"
    child.release()


async def test_a_log_that_cannot_be_kept_is_emptied_all_the_same(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The disk is full, say: it would only become fuller, and the other logs as well."""
    monkeypatch.setattr(at_work, "LARGEST_LOG", 10)
    first, second = tmp_path / "first", tmp_path / "second"
    for log in (first, second):
        log.write_text("0123456789 12\n")
    Path(f"{first}.1").mkdir()
    bound([str(tmp_path), str(first), str(second)])
    assert (first.read_text(), second.read_text()) == ("", "")
    assert Path(f"{second}.1").read_text() == "0123456789 12\n"


async def test_no_link_beside_a_log_leads_to_what_is_ours(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its folder may be the router's, who is another user."""
    monkeypatch.setattr(at_work, "LARGEST_LOG", 10)
    ours, log, link = tmp_path / "ours", tmp_path / "log", tmp_path / "link"
    ours.write_text("a secret of more bytes\n")
    log.write_text("0123456789 12\n")
    Path(f"{log}.1").symlink_to(ours)
    link.symlink_to(ours)
    bound([str(log), str(link)])
    assert ours.read_text() == "a secret of more bytes\n"
    assert Path(f"{log}.1").read_text() == "0123456789 12\n"
    with pytest.raises(PreconditionError, match=r"cannot be started: .*routers\.yaml:1"):
        house.start(recipe(log=str(link)))
    assert ours.read_text() == "a secret of more bytes\n"


async def test_another_user_has_no_group_of_ours(house: House) -> None:
    os.setgroups([0, 4])
    try:
        child = house.start(asked := recipe("id -G", uid=65534))
        assert await child.ended() == 0
    finally:
        os.setgroups([0])
    assert Path(house.log_of(asked)).read_text().split() == ["0"]
    child.release()
