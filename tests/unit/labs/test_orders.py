"""The nursery lives through what is no order: whoever it bore has nobody else."""

import json
import os
from pathlib import Path

import pytest

from labs.nursery import Nursery

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("line", [b"", b"{", b"3", b"{}", b"\xff", b'{"again": "a"}{"again": "b"}'])
def test_what_is_no_order_is_refused_and_the_next_is_heard(tmp_path: Path, line: bytes) -> None:
    reader, writer = os.pipe()
    journal = os.open(tmp_path / "journal", os.O_WRONLY | os.O_CREAT)
    try:
        nursery = Nursery(journal, reader)
        os.write(writer, line + b'\n{"again": "n/nobody"}\n')
        nursery._read_orders(reader)
    finally:
        for fd in (reader, writer, journal):
            os.close(fd)
    told = [json.loads(one) for one in (tmp_path / "journal").read_text().splitlines()]
    assert [one["event"] for one in told] == ["refused", "refused"]
    assert "is no order" in told[0]["because"]
    assert (told[1]["name"], told[1]["because"]) == ("n/nobody", "it was never started here")
