"""Everything that can go wrong, and what a person can do about it.

NsmError
 ├─ InvalidError            asked wrongly: bad name, bad URL, bad path        INVALID_ARGUMENT
 ├─ DeniedError             may not: identity, token or policy                PERMISSION_DENIED
 │   └─ RightsError         this process may not, on this machine             PERMISSION_DENIED
 ├─ UnauthenticatedError    no acceptable certificate                         UNAUTHENTICATED
 ├─ NotFoundError           no such service, endpoint, forwarder              NOT_FOUND
 ├─ TakenError              name, address or port belongs to somebody else    ALREADY_EXISTS
 ├─ ExhaustedError          a bound is reached: pool, streams, message size   RESOURCE_EXHAUSTED
 ├─ UnsupportedError        mechanism, payload, encoding nobody here speaks   UNIMPLEMENTED
 ├─ PreconditionError       the state it needs is not there                   FAILED_PRECONDITION
 ├─ UnavailableError        a peer cannot be reached, or is stopping          UNAVAILABLE
 ├─ DeadlineError           it took longer than the caller would wait         DEADLINE_EXCEEDED
 ├─ AbortedError            somebody else closed or replaced it meanwhile     ABORTED
 ├─ PeerError               a peer answered with a status of its own          (the peer's)
 └─ InternalError           a defect of ours, or of the kernel below us       INTERNAL

A message says what, whose, where, and what was tried; `hint` says what to do.
The class carries the gRPC code and whether trying again may help, so nobody
matches on texts. Only `nsm.rpc.status` turns these into statuses and back.
"""

from enum import IntEnum

REFUSED = "no sufficient privileges"  # how a policy's refusal ends; upstream's clients look for it


class Code(IntEnum):
    """gRPC status codes, so that this module needs no gRPC library."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class NsmError(Exception):
    """Base of all errors the mesh raises on purpose."""

    code = Code.UNKNOWN
    retry = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class InvalidError(NsmError):
    """The question itself is wrong; asking again the same way cannot help."""

    code = Code.INVALID_ARGUMENT


class DeniedError(NsmError):
    """The caller is known and may not do this."""

    code = Code.PERMISSION_DENIED


class RightsError(DeniedError):
    """This machine does not let this process do it: a capability is missing."""


class UnauthenticatedError(NsmError):
    """The peer's certificate proves nothing we accept."""

    code = Code.UNAUTHENTICATED


class NotFoundError(NsmError):
    """Nobody of that name is registered (now)."""

    code = Code.NOT_FOUND
    retry = True


class TakenError(NsmError):
    """Somebody else holds what was asked for."""

    code = Code.ALREADY_EXISTS


class ExhaustedError(NsmError):
    """A bound is reached; what frees a place is in the hint."""

    code = Code.RESOURCE_EXHAUSTED
    retry = True


class UnsupportedError(NsmError):
    """Nobody here speaks that mechanism, payload or encoding."""

    code = Code.UNIMPLEMENTED


class PreconditionError(NsmError):
    """Something that must be there first is not."""

    code = Code.FAILED_PRECONDITION


class UnavailableError(NsmError):
    """A peer cannot be reached now."""

    code = Code.UNAVAILABLE
    retry = True


class DeadlineError(NsmError):
    """The caller's time is used up."""

    code = Code.DEADLINE_EXCEEDED
    retry = True


class AbortedError(NsmError):
    """Somebody else's Close or Request overtook this one."""

    code = Code.ABORTED
    retry = True


class InternalError(NsmError):
    """A defect: ours, or something the kernel should not have said."""

    code = Code.INTERNAL


class PeerError(NsmError):
    """A peer answered with a status of its own, kept as it is."""

    def __init__(self, message: str, *, code: Code, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.retry = code in (
            Code.UNAVAILABLE,
            Code.DEADLINE_EXCEEDED,
            Code.ABORTED,
            Code.NOT_FOUND,
            Code.RESOURCE_EXHAUSTED,
            Code.UNKNOWN,
        )
