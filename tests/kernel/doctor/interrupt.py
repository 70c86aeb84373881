"""Runs a command, sends it a signal once it has told that it waits, and prints its exit code.

python interrupt.py SIGINT COMMAND...
"""

import signal
import subprocess
import sys

with subprocess.Popen(sys.argv[2:], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as running:
    assert running.stderr is not None
    running.stderr.readline()
    running.send_signal(signal.Signals[sys.argv[1]])
    sys.stderr.buffer.write(running.stderr.read())
sys.stdout.write(f"{running.returncode}\n")
