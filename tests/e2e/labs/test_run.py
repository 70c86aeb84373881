"""`nsmctl run`: it becomes the process, whatever lies in the working directory."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from nsm.process import config
from tests.support.wait import until

HERE = Path(__file__).parents[3]


@contextlib.contextmanager
def running(name: str, folder: Path, **variables: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """`nsmctl run NAME` in a folder, and the pipe on which it says that it is ready."""
    ready, ready_end = os.pipe()
    os.set_blocking(ready, False)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "nsmctl", "run", name],
        cwd=folder,
        env={
            "PATH": os.environ["PATH"], "PYTHONPATH": str(HERE), **config.for_children(),
            "NSM_READY_FD": str(ready_end), **variables,
        },
        pass_fds=[ready_end], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(ready_end)
    try:
        yield process, ready
    finally:
        process.kill()
        process.communicate()
        os.close(ready)


async def first_line(ready: int) -> str:
    def read() -> bytes:
        with contextlib.suppress(BlockingIOError):
            return os.read(ready, 4096)
        return b""

    return (await until(lambda: read(), "a process that nsmctl became is ready", bar=2.0)).decode()


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1:-1]


async def test_it_becomes_the_process_and_not_a_folder_of_that_name(tmp_path):
    for name in ("registry", "nsm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the folder was taken')\n")
        (tmp_path / name / "__main__.py").write_text("raise SystemExit('the folder was taken')\n")
    entries = tmp_path / "entries.json"
    who = {"id": "spiffe://run.test/registry", "uid": os.getuid(), "dns": ["registry.run.test"]}
    entries.write_text(json.dumps([who]))
    agent = f"unix://{tmp_path}/agent.sock"
    issuing = {
        "NSM_LISTEN_ON": agent, "NSM_TRUST_DOMAIN": "run.test", "NSM_ENTRIES": str(entries),
        "NSM_ISSUER_DIR": str(tmp_path / "authority"),
    }  # fmt: skip
    serving = {
        "NSM_NAME": "registry-here", "NSM_LISTEN_ON": "tcp://127.0.0.1:0",
        "SPIFFE_ENDPOINT_SOCKET": agent,
    }  # fmt: skip
    with running("issuer", tmp_path, **issuing) as (issuer, issuer_is_ready):
        assert (await first_line(issuer_is_ready)).startswith("issuer ")
        assert command_of(issuer.pid) == ["-P", "-m", "nsm.process.issuer"]
        with running("registry", tmp_path, **serving) as (registry, registry_is_ready):
            line = await first_line(registry_is_ready)
            assert line.startswith("registry registry-here ready: tcp://127.0.0.1:"), line
            assert command_of(registry.pid) == ["-P", "-m", "registry"]
            registry.send_signal(signal.SIGINT)
            assert registry.wait(10) == 130
        issuer.send_signal(signal.SIGTERM)
        assert issuer.wait(10) == 0


def test_what_cannot_be_run_is_exit_code_2_and_what_is_told_wrongly_too(tmp_path):
    with running("nothing", tmp_path) as (process, _):
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 2
        assert b"nothing" in errors
        assert b"registry" in errors  # what there is
    with running("registry", tmp_path, NSM_LISTEN_ON="nowhere") as (process, _):
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 2
        assert b"NSM_LISTEN_ON" in errors
