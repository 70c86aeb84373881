"""In these tests the mesh's server and client run on the test's own loop: it is watched too."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsm.process.loopguard import LoopGuard

ROOT = Path(__file__).parents[3]
OURS, TESTS = f"{ROOT}/nsm/", f"{ROOT}/tests/"
SAY_SO = (" context_of", " ended")  # what tests call, on their loop, that says that it blocks


@pytest.fixture(scope="session")
def watching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoopGuard, Path]]:
    """The guard of this process, and the file it writes to."""
    told = tmp_path_factory.mktemp("own-guard") / "calls"
    guard = LoopGuard(str(told))
    yield guard, told
    guard.disarm()


@pytest.fixture(autouse=True)
def _nothing_of_ours_blocks_the_loop(
    request: pytest.FixtureRequest, watching: tuple[LoopGuard, Path]
) -> Iterator[None]:
    """While a coroutine test runs, no module of nsm makes a call that can block its loop."""
    guard, told = watching
    if not asyncio.iscoroutinefunction(getattr(request.node, "function", None)):
        yield
        return
    before = told.stat().st_size
    guard.arm()
    try:
        yield
    finally:
        guard.disarm()
    with told.open() as file:
        file.seek(before)
        calls = [json.loads(line) for line in file]
    found = [call for call in calls if _is_ours(call["stack"])]
    if found:
        shown = ["\n    ".join([call["what"], *call["stack"][:12]]) for call in found[:5]]
        pytest.fail("\n".join(["on the event loop's thread:", *shown]), pytrace=False)


def _is_ours(stack: list[str]) -> bool:
    """Whether nsm made the call, and not because a test called what says that it blocks."""
    here = [line for line in stack if line.startswith((OURS, TESTS))]
    if not here or not here[0].startswith(OURS):
        return False
    return not (here[0].endswith(SAY_SO) and here[1].startswith(TESTS))
