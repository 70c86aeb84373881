"""How memory is counted: what is somebody's own, and what of files two have between them."""

import mmap
import os
import subprocess
import sys

import pytest

from bench.memory import files, own, pss

pytestmark = pytest.mark.unit
SIZE = 32 * 1024 * 1024
HOLD = """
import mmap, sys
path, size = sys.argv[1], int(sys.argv[2])
with open(path, "rb") as file:
    held = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ)
    sum(held[n] for n in range(0, size, mmap.PAGESIZE))
    print("held", flush=True)
    sys.stdin.read()
"""


def test_memory_of_our_own_is_counted_in_full_and_a_file_is_not():
    before = own(os.getpid())
    with mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(b"x" * SIZE)
        assert own(os.getpid()) - before == pytest.approx(SIZE, rel=0.05)
        assert pss(os.getpid()) > own(os.getpid())


def test_a_file_that_two_have_counts_once_whoever_else_has_it(tmp_path):
    path = tmp_path / "library"
    path.write_bytes(b"x" * SIZE)
    words = [sys.executable, "-c", HOLD, str(path), str(SIZE)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holders = [subprocess.Popen(words, **pipes) for _ in range(3)]
    try:
        for holder in holders:
            assert holder.stdout.readline() == b"held\n"
        one, two, _ = (holder.pid for holder in holders)
        assert SIZE < files([one, two]) < 1.8 * SIZE
        assert files([one, two]) - files([one]) < SIZE // 4
        assert own(one) < SIZE
    finally:
        for holder in holders:
            holder.communicate()
