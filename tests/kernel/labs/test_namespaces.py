"""Looking for a namespace's door leaves none open behind us: an open one keeps it alive."""

import dataclasses
import errno
import os
import subprocess
from collections.abc import Iterator

import pytest

from nsm.kernel import namespaces
from nsm.kernel.namespaces import Home
from nsm.kernel.netlink import NamespaceGoneError, Refusal
from nsm.kernel.state import Namespace


@pytest.fixture
def stranger() -> Iterator[int]:
    """The pid of somebody in a network namespace of his own."""
    running = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE, text=True
    )
    assert running.stdout
    running.stdout.readline()
    yield running.pid
    running.kill()
    running.communicate()


def doors_open() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith("net:"):
            found.append(target)
    return sorted(found)


def known(home: Home, pid: int) -> Namespace:
    fd = home.opened_pid(pid, "w")
    try:
        return dataclasses.replace(home.known(fd, "w"), handle=b"")
    finally:
        os.close(fd)


def test_a_namespace_is_found_by_whoever_is_in_it(stranger):
    with Home() as home:
        namespace = known(home, stranger)
        before = doors_open()
        for fd in (home.find(namespace), home.find_number(namespace.nsid)):
            assert os.fstat(fd).st_ino == namespace.inode
            os.close(fd)
        assert doors_open() == before


def test_a_search_that_meets_an_error_leaves_no_door_open(stranger, monkeypatch):
    with Home() as home:
        namespace = known(home, stranger)
        before = doors_open()

        def no_files() -> int:
            raise OSError(errno.EMFILE, "no")

        def refused(*_: object, **__: object) -> int:
            raise Refusal(errno.EPERM, "no")

        monkeypatch.setattr(namespaces, "cookie_here", no_files)
        with pytest.raises(NamespaceGoneError):
            home.find(namespace)
        monkeypatch.setattr(namespaces, "number", refused)
        with pytest.raises(NamespaceGoneError):
            home.find_number(namespace.nsid)
        assert doors_open() == before
