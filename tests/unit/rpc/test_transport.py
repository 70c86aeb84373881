"""The transport's small rules: addresses, inode URLs, errors as statuses."""

import asyncio
import os
import socket
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from multidict import MultiDict

from nsm import errors, registration
from nsm.caller import inode_url, parse_inode_url
from nsm.errors import (
    Code,
    DeniedError,
    InvalidError,
    NotFoundError,
    NsmError,
    PeerError,
    RightsError,
    UnavailableError,
)
from nsm.identity.source import HeldIdentity, Identity
from nsm.registration import RegistrationPath
from nsm.rpc import addresses, registry
from nsm.rpc.addresses import Tcp, Unix
from nsm.rpc.fds import key_of
from nsm.rpc.peers import Peers
from nsm.rpc.status import MAX_TEXT, error_of, grpc_error, status_of
from tests.support.callers import Mesh

CLASSES = [
    c
    for c in vars(errors).values()
    if isinstance(c, type)
    and issubclass(c, NsmError)
    and c not in (NsmError, PeerError, RightsError)  # the last is about our machine: a denial
]


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("unix:///run/a.sock", Unix("/run/a.sock")),
        ("unix:/run/a.sock", Unix("/run/a.sock")),
        ("unix:///proc/self/fd/7", Unix("/proc/self/fd/7")),
        ("tcp://10.0.0.1:5001", Tcp("10.0.0.1", 5001)),
        ("tcp://:5001", Tcp("", 5001)),
        ("tcp://[fd00::1]:5001", Tcp("fd00::1", 5001)),
        ("registry:5002", Tcp("registry", 5002)),
        ("registry.nsm-system.svc:5002", Tcp("registry.nsm-system.svc", 5002)),
        ("dns:///registry:5002", Tcp("registry", 5002)),
    ],
)
def test_urls_are_read_as_upstream_reads_them(url: str, target: Any) -> None:
    assert addresses.parse(url) == target


@pytest.mark.parametrize(
    "url",
    [
        "",
        "registry",
        "unix://relative",
        "unix:///" + "x" * 200,
        "unix:///a\0b",
        "tcp://h:70000",
        "tcp://h:-1",
        "tcp://h:٣",
        "http://h:80",
        "tcp://[nonsense]:1",
        "tcp://a b:1",
        "tcp://h/p:1",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidError):
        addresses.parse(url)


def test_an_inode_url_goes_there_and_back() -> None:
    assert parse_inode_url(inode_url(4, 4026531833)) == (4, 4026531833)
    for wrong in ("inode://4", "inode://4/x", "inode://-4/1", "inode://4/1/2", "file:///x", ""):
        with pytest.raises(InvalidError):
            parse_inode_url(wrong)


def test_a_descriptor_is_known_by_what_fstat_would_say(tmp_path: Any) -> None:
    ours, theirs = socket.socketpair()
    fds = [
        os.open(tmp_path, os.O_PATH),
        os.open("/proc/self/ns/net", os.O_PATH),
        os.open("/dev/null", os.O_RDONLY),
        ours.detach(),
        theirs.detach(),
        os.memfd_create("x"),
    ]
    for fd in fds:
        assert key_of(fd) == (os.fstat(fd).st_dev, os.fstat(fd).st_ino)
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        key_of(fds[0])


def test_of_two_paths_in_an_answer_the_last_counts() -> None:
    paths = [RegistrationPath((text, "own"), 0) for text in ("first", "last")]
    twice = MultiDict((registration.PATH, registration.write(path)) for path in paths)
    assert registry._path_of(twice) == paths[1]
    assert registry._path_of(MultiDict()) == registry._path_of(None) == RegistrationPath()


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_the_wire_with_code_text_and_retry(kind: type[NsmError]) -> None:
    sent = kind("what, whose, where", hint="what to do")
    code, text = status_of(sent)
    came = error_of(grpc_error(sent), "unix:///s")
    assert text == str(came) == "what, whose, where; what to do"
    assert came.code == code == kind.code
    if kind.code is not Code.INTERNAL:
        assert type(came) is kind
        assert came.retry == kind.retry


def test_what_a_machine_does_not_allow_its_process_is_a_denial_to_others() -> None:
    assert type(error_of(grpc_error(RightsError("x")), "unix:///s")) is DeniedError


@pytest.mark.parametrize("code", [c for c in Code if c])
def test_every_status_of_a_peer_becomes_an_error_of_that_code(code: Code) -> None:
    came = error_of(GRPCError(Status(code.value), "all candidates have failed"), "unix:///s")
    assert (came.code, str(came)) == (code, "all candidates have failed")
    assert status_of(came) == (code, "all candidates have failed")


@pytest.mark.parametrize(
    ("told", "code"),
    [
        ("network service endpoint pong not found", Code.NOT_FOUND),
        ("network service endpoint candidates not found", Code.NOT_FOUND),
        ("network service frames is not found", Code.NOT_FOUND),
        ("network service frames of payload IP is not found: nobody has it", Code.NOT_FOUND),
        (
            "0. f --> code = NotFound desc = network service endpoint p not found; it",
            Code.NOT_FOUND,
        ),
        ("forwarder f is not available", Code.UNKNOWN),
        ("network service endpoint pong: its forwarder is not found", Code.UNKNOWN),
    ],
)
def test_who_gives_no_codes_is_known_by_words_to_have_found_nobody(told: str, code: Code) -> None:
    """Upstream's programs: all they say is UNKNOWN."""
    came = error_of(GRPCError(Status.UNKNOWN, told), "unix:///s")
    assert (came.code, str(came)) == (code, told)
    assert isinstance(came, NotFoundError) == (code is Code.NOT_FOUND)
    assert error_of(GRPCError(Status.INTERNAL, told), "unix:///s").code is Code.INTERNAL


def test_a_defect_tells_its_kind_and_not_its_text() -> None:
    code, text = status_of(KeyError("eyJhbGciOi"))
    assert code is Code.INTERNAL
    assert "KeyError" in text
    assert "eyJ" not in text


def test_what_ends_a_call_has_its_code() -> None:
    assert status_of(TimeoutError())[0] is Code.DEADLINE_EXCEEDED
    assert status_of(asyncio.CancelledError())[0] is Code.CANCELLED
    assert error_of(TimeoutError(), "tcp://h:1").code is Code.DEADLINE_EXCEEDED
    cut = error_of(StreamTerminatedError("the connection ended"), "tcp://h:1")
    assert cut.code is Code.UNAVAILABLE
    assert "tcp://h:1" in str(cut)
    with pytest.raises(KeyError):
        error_of(KeyError("defect"), "tcp://h:1")


def test_a_status_text_is_bounded() -> None:
    assert len(status_of(InvalidError("x" * 100_000))[1]) == MAX_TEXT


async def test_who_dials_while_we_end_is_told_so() -> None:
    """Whoever loses a stream to it dials again at once, and that is no defect."""
    async with Peers(HeldIdentity(Identity(Mesh().svid("a"), {}))) as peers:
        pass
    with pytest.raises(UnavailableError, match="stopping"):
        async with peers.link("unix:///nowhere"):
            pytest.fail("there is nobody")
