"""Runs a command, interrupts it once it has told that it waits, and prints its exit code."""

import signal
import subprocess
import sys

with subprocess.Popen(sys.argv[1:], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as running:
    assert running.stderr is not None
    running.stderr.readline()
    running.send_signal(signal.SIGINT)
    sys.stderr.buffer.write(running.stderr.read())
sys.stdout.write(f"{running.returncode}\n")
