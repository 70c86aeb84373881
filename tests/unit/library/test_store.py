"""A program's file that others read while it runs; what is refused is in the programs' tests."""

import contextlib
import sqlite3
from pathlib import Path

import pytest

from nsm.errors import PreconditionError
from nsm.store import Kept, looked_into, opened, transaction

KEPT = Kept(
    whose="the test",
    application=7,
    schema=1,
    tables="CREATE TABLE IF NOT EXISTS kept (x INTEGER)",
    alone=False,
)


def rows(connection: sqlite3.Connection) -> list[int]:
    return [x for (x,) in connection.execute("SELECT x FROM kept")]


def insert(connection: sqlite3.Connection, *tables: str) -> None:
    with transaction(connection):
        for table in tables:
            connection.execute(f"INSERT INTO {table} VALUES (3)")


def test_others_read_what_is_there_while_its_program_writes_and_after(tmp_path: Path) -> None:
    path = str(tmp_path / "a 50% file?.sqlite")
    connection, before = opened(path, KEPT, rows)
    with contextlib.closing(connection):
        assert before == []
        with transaction(connection):
            connection.execute("INSERT INTO kept VALUES (1)")
        with looked_into(path, KEPT) as look:
            assert rows(look) == [1]
            with pytest.raises(sqlite3.OperationalError, match="readonly database"):
                look.execute("INSERT INTO kept VALUES (2)")
        with pytest.raises(sqlite3.OperationalError, match="no such"):
            insert(connection, "kept", "nowhere")
    with looked_into(path, KEPT) as look:
        assert rows(look) == [1]


def test_looking_into_a_file_makes_none_and_takes_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "none.sqlite"
    with pytest.raises(PreconditionError, match="unable to open"), looked_into(str(path), KEPT):
        pass
    assert not path.exists()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (x)")
    with pytest.raises(PreconditionError, match="other program"), looked_into(str(path), KEPT):
        pass
