import os
import resource
import socket
import subprocess
import time

import pytest

from nsm.caller import Caller, Credentials
from nsm.errors import DeniedError, InvalidError
from nsm.identity.source import Handshake
from nsm.model import SECOND, Endpoint
from nsmgr.excluded import ExcludedPrefixes, parse
from nsmgr.namespaces import open_of_caller
from nsmgr.registry import Locals, public_url, with_labels
from tests.support.certs import Authority
from tests.support.wait import until


def test_excluded_prefixes_are_read_whatever_the_case_of_the_key():
    assert parse("prefixes: [10.0.0.1/8]\n") == ("10.0.0.0/8",)
    assert parse("Prefixes:\n- 10.0.0.0/8\n- '2001:db8::/32'\n") == ("10.0.0.0/8", "2001:db8::/32")
    assert parse("") == parse("other: 1") == ()


def test_a_broken_file_leaves_the_last_good_prefixes(tmp_path):
    file = tmp_path / "excluded.yaml"
    excluded = ExcludedPrefixes(str(file))
    excluded.read()
    assert excluded.prefixes == ()
    for text, expected in (
        ("prefixes: [10.0.0.0/8]", ("10.0.0.0/8",)),
        ("prefixes: [not a prefix]", ("10.0.0.0/8",)),
        ("- a list", ("10.0.0.0/8",)),
        ("prefixes: [", ("10.0.0.0/8",)),
        ("prefixes: [10.1.0.0/16, 10.2.0.0/16]", ("10.1.0.0/16", "10.2.0.0/16")),
    ):
        file.write_text(text)
        excluded.read()
        assert excluded.prefixes == expected, text
    file.unlink()
    excluded.read()
    assert excluded.prefixes == ()


def caller(pid=None, pidfd=None):
    authority = Authority("td")
    own, peer = authority.svid("/own"), authority.svid("/peer")
    shown = Handshake(own, peer.id, peer.leaf, peer.not_after)
    process = Credentials(pid, 0, 0, pidfd) if pid else None
    return Caller(shown, process=process, unix=bool(pid))


async def test_a_caller_may_name_its_own_namespace_by_path():
    own = os.getpid()
    pidfd = os.pidfd_open(own)
    for url in (f"file:///proc/{own}/ns/net", "file:///proc/thread-self/ns/net"):
        fd = await open_of_caller(url, caller(own, pidfd))
        try:
            assert os.fstat(fd).st_ino == os.stat("/proc/self/ns/net").st_ino
        finally:
            os.close(fd)
    os.close(pidfd)


async def test_a_number_that_is_another_process_s_by_now_opens_nothing():
    with subprocess.Popen(["/bin/true"]) as dead:
        pidfd = os.pidfd_open(dead.pid)
    before = len(os.listdir("/proc/self/fd"))
    # We have the number that the dead one had: as if it had been given to us.
    with pytest.raises(DeniedError, match="ended while its network namespace was looked for"):
        await open_of_caller("file:///proc/self/ns/net", caller(os.getpid(), pidfd))
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(pidfd)


@pytest.mark.parametrize(
    ("url", "pid", "error"),
    [
        ("file:///proc/1/ns/net", os.getpid(), DeniedError),
        (f"file:///proc/{os.getpid()}/ns/net", None, DeniedError),
        ("file:///proc/self/ns/mnt", os.getpid(), InvalidError),
        ("file:///etc/passwd", os.getpid(), InvalidError),
        (f"file:///proc/{os.getpid()}/../1/ns/net", os.getpid(), InvalidError),
    ],
    ids=["another's", "nobody asks", "another kind", "no namespace", "around a corner"],
)
async def test_nobody_else_s_namespace_can_be_named_by_path(url, pid, error):
    with pytest.raises(error):
        await open_of_caller(url, caller(pid))


def endpoint(name, expires):
    return Endpoint(name, ("svc",), {"svc": {}}, "tcp://me:1", expires)


async def test_an_endpoint_of_this_node_is_known_until_it_expires_and_its_socket_closed_then():
    locals_ = Locals()
    read, write = os.pipe()
    os.close(write)
    locals_.put(endpoint("nse", time.time_ns() + SECOND // 20), "unix:x", read)
    assert [one.endpoint.name for one in locals_.of("svc")] == ["nse"]
    assert locals_.of("other") == []
    await until(lambda: locals_.get("nse") is None, "a registration to end", bar=0.1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)


async def test_a_registration_renewed_is_the_later_one():
    locals_ = Locals()
    locals_.put(endpoint("nse", time.time_ns() + SECOND // 50), "unix:x", None)
    locals_.put(endpoint("nse", time.time_ns() + 600 * SECOND), "unix:y", None)
    locals_.put(endpoint("short", time.time_ns() + SECOND // 20), "unix:z", None)
    await until(lambda: locals_.get("short") is None, "the short one to end", bar=0.1)
    assert locals_.get("nse").url == "unix:y"
    locals_.close()
    assert locals_.get("nse") is None


def test_the_nodes_labels_are_added_and_never_overwrite():
    assert with_labels({"svc": {"nodeName": "mine"}, "b": {}}, {"nodeName": "n1", "x": "y"}) == {
        "svc": {"nodeName": "mine", "x": "y"},
        "b": {"nodeName": "n1", "x": "y"},
    }


async def test_other_nodes_are_told_the_first_tcp_url_with_an_address_they_can_use():
    assert await public_url(("unix:///s", "tcp://10.0.0.5:5001"), "") == "tcp://10.0.0.5:5001"
    assert await public_url(("unix:///s",), "") == "unix:///s"
    told = await public_url(("tcp://:5001",), "tcp://127.0.0.1:5002")
    assert told == "tcp://127.0.0.1:5001"
    assert await public_url(("tcp://[::]:5001",), "tcp://127.0.0.1:5002") == told


async def test_a_renewed_registration_of_the_same_socket_keeps_its_url(tmp_path):
    locals_ = Locals()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "nse"))
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            fd = os.open(tmp_path / "nse", os.O_PATH)
            locals_.put(endpoint("nse", time.time_ns() + 600 * SECOND), f"unix:{fd}", fd)
        assert len(os.listdir("/proc/self/fd")) == before + 1
        url = locals_.get("nse").url
        (tmp_path / "nse").unlink()
        with socket.socket(socket.AF_UNIX) as again:
            again.bind(str(tmp_path / "nse"))
            fd = os.open(tmp_path / "nse", os.O_PATH)
            locals_.put(endpoint("nse", time.time_ns() + 600 * SECOND), f"unix:{fd}", fd)
            assert locals_.get("nse").url != url
        locals_.close()
        assert len(os.listdir("/proc/self/fd")) == before


async def test_whose_socket_nobody_listens_at_is_found_also_where_no_file_can_be_opened(tmp_path):
    locals_, inf = Locals(), time.time_ns() + 600 * SECOND
    for name in ("there", "gone", "forwarder"):
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / name))
            listening.listen()
            if name == "there":
                there = listening.dup()
            fd = os.open(tmp_path / name, os.O_PATH)
        service = "fwd" if name == "forwarder" else "svc"
        locals_.put(Endpoint(name, (service,), expires=inf), f"unix:{fd}", fd)
    with there:
        before = set(os.listdir("/proc/self/fd"))
        assert await locals_.deserted("fwd") == {"gone"}
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.open("/", os.O_PATH)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            assert await locals_.deserted("fwd") == set()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert set(os.listdir("/proc/self/fd")) == before
    assert await locals_.deserted("fwd") == {"gone", "there"}
    locals_.close()
