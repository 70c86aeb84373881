"""The issuer and those it serves meet: it says what they need, and they have one default."""

import os
import subprocess
import sys
from pathlib import Path

from nsm.process import config, workload
from nsmctl import mesh

HERE = Path(__file__).parents[3]


def test_a_ready_issuer_says_what_its_processes_are_to_be_told(tmp_path):
    url = f"unix://{tmp_path}/issuer.sock"
    (tmp_path / "entries.json").write_text("[]")
    read_end, write_end = os.pipe()
    running = subprocess.Popen(
        [sys.executable, "-P", "-m", "nsm.process.issuer"], pass_fds=[write_end], cwd="/",
        stderr=subprocess.DEVNULL,
        env={
            "PATH": os.environ["PATH"], "PYTHONPATH": str(HERE), "NSM_TRUST_DOMAIN": "td.example",
            "NSM_LISTEN_ON": url, "NSM_ENTRIES": f"{tmp_path}/entries.json",
            "NSM_ISSUER_DIR": f"{tmp_path}/authority", "NSM_READY_FD": str(write_end),
            **config.for_children(),
        },
    )  # fmt: skip
    os.close(write_end)
    try:
        with open(read_end) as told:
            line = told.readline()
    finally:
        running.terminate()
        running.wait()
    assert f"ready: {url}" in line
    assert f"SPIFFE_ENDPOINT_SOCKET={url}" in line


def test_nsmctl_asks_where_every_process_asks():
    assert mesh.AGENT == workload.AGENT
