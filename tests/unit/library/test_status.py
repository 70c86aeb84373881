"""The status file is whole, also when its writer is cancelled in the middle of a line."""

import json
import os
import time

from nsm.process import client


async def test_no_line_is_lost_or_out_of_order_when_the_disk_is_slow(tmp_path, monkeypatch):
    path = tmp_path / "status"
    write = os.write

    def slow(file: int, data: bytes) -> int:
        time.sleep(0.05)
        return write(file, data)

    monkeypatch.setattr(client.os, "write", slow)
    async with client._status(str(path)) as lines:
        for number in range(3):
            lines.append({"n": number})
            while lines._waiting:  # until the writer is in the thread
                await client.asyncio.sleep(0)
        lines.append({"n": 3})
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
