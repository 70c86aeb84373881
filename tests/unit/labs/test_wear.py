"""What processes hold is what the kernel and they themselves say of them, and of nobody else."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from labs import wear
from labs.alive import Mark
from nsm.process.alive import started

SAYS = """
import json, signal, sys, threading
log = open(sys.argv[1], "a")
def say(*_):
    print("not json", file=log)
    print(json.dumps({"tasks": {"a": 2, "b": 5}}), file=log, flush=True)
signal.signal(signal.SIGUSR2, say)
files = [open("/dev/null") for _ in range(40)]
[threading.Thread(target=threading.Event().wait, daemon=True).start() for _ in range(3)]
print("ready", flush=True)
while True:
    signal.pause()
"""


@contextlib.contextmanager
def process(log: Path) -> Iterator[subprocess.Popen[bytes]]:
    log.write_text('{"tasks": {"of an earlier look": 99}}\n')
    command = [sys.executable, "-P", "-c", SAYS, str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as one:
        try:
            assert one.stdout
            assert one.stdout.readline() == b"ready\n"
            yield one
        finally:
            one.kill()


def test_each_process_is_counted_and_who_does_not_say_has_no_number_of_tasks(tmp_path: Path):
    with process(tmp_path / "a") as one, process(tmp_path / "b") as stopped:
        os.kill(stopped.pid, signal.SIGSTOP)
        marks = {"one": one.pid, "stopped": stopped.pid}
        of = {
            name: (Mark(pid, started(pid)), str(tmp_path / log))
            for (name, pid), log in zip(marks.items(), "ab", strict=True)
        }
        gone = Mark(one.pid, started(one.pid) - 1), str(tmp_path / "a")
        found = wear.held({**of, "whose number another has by now": gone})
    assert found.keys() == {"one", "stopped"}
    assert (found["one"].tasks, found["stopped"].tasks) == (7, None)
    assert found["one"].threads == found["stopped"].threads == 4
    assert 40 < found["one"].fds == found["stopped"].fds < 50
    assert found["one"].pss_kib > 1000
