"""Asking a mesh: from where, as whom, and for how long."""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from nsm.errors import DeadlineError, InvalidError
from nsm.model import SECOND
from nsmctl import completion, show

if TYPE_CHECKING:
    from labs.seats import Seat
    from nsm.rpc.peers import Peers

T = TypeVar("T")
MANAGER = "unix:///var/lib/networkservicemesh/nsm.io.sock"
AGENT = "unix:///run/spire/sockets/agent.sock"  # as for every process
INTERRUPTED = 130  # exit code
PATIENCE = 5.0  # seconds for an identity, and for one answer

Lab = Annotated[str, typer.Option("--lab", help="Ask in this lab.", autocompletion=completion.up)]
Node = Annotated[
    str,
    typer.Option(
        "-n",
        "--node",
        help="From there in the lab: a node, endpoint or client.",
        autocompletion=completion.places,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Manager = Annotated[
    str,
    typer.Option("--manager", envvar="NSM_CONNECT_TO", help="The node's manager, without --lab."),
]
Identity = Annotated[
    str,
    typer.Option(
        "--identity",
        envvar="SPIFFE_ENDPOINT_SOCKET",
        help="Whoever gives identities, without --lab.",
    ),
]


def asked(
    ask: "Callable[[Seat, Peers], Awaitable[T]]",
    lab: str,
    node: str,
    manager: str,
    identity: str,
    *,
    also: str = "",
) -> T:
    """What ask returns, from a place in a lab or from this machine; also is whom else it asks.

    Ends the command with 130 at Ctrl-C, once ask has taken back what it takes back.
    """
    at = seat(lab, node, manager, identity)
    whom = f"{at.manager} or {also}" if also else at.manager
    answers: list[T] = []

    async def within() -> int:
        async with peers(at) as known:
            try:
                async with asyncio.timeout(PATIENCE):
                    answers.append(await ask(at, known))
            except TimeoutError as late:
                failure = DeadlineError(f"{whom} did not answer within {PATIENCE:.0f} s")
                for note in getattr(late.__cause__, "__notes__", ()):
                    failure.add_note(note)
                raise failure from None
        return 0

    if code := asyncio.run(interruptible(within())):
        show.finish(code)
    return answers[0]


@contextlib.asynccontextmanager
async def peers(seat: "Seat") -> "AsyncIterator[Peers]":
    """Connections of whoever sits there."""
    from nsm.identity.workload import workload_source
    from nsm.rpc.peers import Peers

    async with (
        workload_source(seat.identity, patience=PATIENCE) as source,
        Peers(source, dial_timeout=PATIENCE) as peers,
    ):
        yield peers


def seat(lab: str, node: str, manager: str, identity: str) -> "Seat":
    """From where to ask: a place in a lab, which this process is in from now on, or here."""
    from labs import engine, seats

    if not lab and not node:
        return seats.Seat("nsmctl", manager, identity)
    show.need_root()
    if not lab:
        raise InvalidError("-n means a place in a lab", hint="add --lab NAME")
    there, paths = engine.running(lab)
    nodes = [name for name, found in there.nodes.items() if found.kind == "node"]
    if not node and len(nodes) > 1:
        raise InvalidError(f"lab {lab} has several nodes", hint=f"add -n {'|'.join(nodes)}")
    return seats.take(there, paths, node or nodes[0])


def left(expires: int | None) -> str:
    """How long until then, in words; "" where nothing ends."""
    from labs.units import since

    if expires is None:
        return ""
    seconds = expires / SECOND - time.time()
    return since(seconds) if seconds > 0 else "over"


async def interruptible(work: Coroutine[Any, Any, int]) -> int:
    """The exit code of work; a first Ctrl-C, SIGTERM or hang-up cancels it, once.

    A wire is then closed in its own time, whatever is pressed meanwhile.
    """
    task = asyncio.current_task()
    assert task is not None
    heard = False

    def stop() -> None:
        nonlocal heard
        if not heard:
            heard = True
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    try:
        return await work
    except asyncio.CancelledError:
        if heard:
            return INTERRUPTED
        raise
