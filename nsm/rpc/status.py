"""Errors on the wire: a gRPC status has a code and a text, and both survive (`wire.md` §3.9).

One of the two places where errors are translated. A defect of ours leaves as
INTERNAL without its text, because nobody checked what that text may contain.
"""

import asyncio
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from h2.exceptions import H2Error

from nsm.errors import (
    AbortedError,
    Code,
    DeadlineError,
    DeniedError,
    ExhaustedError,
    InvalidError,
    NotFoundError,
    NsmError,
    PeerError,
    PreconditionError,
    TakenError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)

MAX_TEXT = 4096  # characters of a status message: some stacks bound headers at 8 KiB

# Upstream's programs say everything as UNKNOWN, a hop's NOT_FOUND that they pass on too; who
# waits for "not found" to choose anew has only their words for it (`wire.md` §3.9).
_NOT_FOUND = re.compile(r"\bnetwork service [^:;]{1,512} not found\b")

_CLASSES: dict[Code, type[NsmError]] = {
    c.code: c
    for c in (
        InvalidError,
        DeniedError,
        UnauthenticatedError,
        NotFoundError,
        TakenError,
        ExhaustedError,
        UnsupportedError,
        PreconditionError,
        UnavailableError,
        DeadlineError,
        AbortedError,
    )
}


def status_of(error: BaseException) -> tuple[Code, str]:
    """The code and text with which error leaves this process."""
    if isinstance(error, NsmError):
        return error.code, _cut(str(error))
    if isinstance(error, GRPCError):
        return Code(error.status.value), _cut(error.message or "")
    if isinstance(error, asyncio.CancelledError):
        return Code.CANCELLED, "cancelled"
    if isinstance(error, TimeoutError):
        return Code.DEADLINE_EXCEEDED, "it took longer than there was time for"
    return Code.INTERNAL, f"a defect here ({type(error).__name__}); this process's log has it"


def grpc_error(error: BaseException) -> GRPCError:
    """What to raise so that grpclib sends `status_of(error)`."""
    code, text = status_of(error)
    return GRPCError(Status(code.value), text)


def expected(error: BaseException) -> bool:
    """Whether error is one that somebody raised on purpose, so no log needs its traceback."""
    return isinstance(error, NsmError | GRPCError | asyncio.CancelledError | TimeoutError)


def error_of_status(code: Code, text: str) -> NsmError:
    """The error that a peer's status stands for; its text is kept verbatim."""
    if code == Code.UNKNOWN and _NOT_FOUND.search(text):
        code = Code.NOT_FOUND
    found = _CLASSES.get(code)
    return found(text) if found else PeerError(text, code=code)


def error_of(error: BaseException, url: str) -> NsmError:
    """What went wrong in a call to url, as one of ours."""
    if isinstance(error, NsmError):
        return error
    if isinstance(error, GRPCError):
        return error_of_status(Code(error.status.value), error.message or f"no text, from {url}")
    if isinstance(error, TimeoutError):
        return DeadlineError(f"no answer from {url} in time")
    if isinstance(error, ssl.SSLCertVerificationError):
        return UnauthenticatedError(
            f"the certificate of {url} does not chain to any bundle here: {error.verify_message}",
            hint="each needs the other's bundle, a certificate that holds, a right clock",
        )
    if isinstance(error, StreamTerminatedError):
        return UnavailableError(f"the call to {url} was cut off: {error}")
    if isinstance(error, OSError):
        return UnavailableError(f"cannot talk to {url}: {error.strerror or error}")
    if isinstance(error, ProtocolError | H2Error):
        return UnavailableError(f"the call to {url} was cut off: {error or type(error).__name__}")
    raise error


@contextmanager
def errors(url: str) -> Iterator[None]:
    """Whatever a call to url raises leaves this block as an NsmError; defects as they are."""
    try:
        yield
    except NsmError:
        raise
    except (GRPCError, OSError, StreamTerminatedError, ProtocolError, H2Error) as error:
        raise error_of(error, url) from error


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
