"""Domains for the tests of one module; each test leaves them as it found them."""

from collections.abc import Iterator

import pytest

from tests.e2e.interdomain.domains import Domains
from tests.e2e.wires.nodes import tentative
from tests.support.spaces import kernel_state
from tests.support.wait import until

NODES = ("a", "b", "b2", "c")
PLACES = (
    "app", "near", "beside", "pong", "sealed", "floater", "here", "there",
)  # fmt: skip


def standing(domains: Domains) -> dict[str, object]:
    """All that a wire leaves in any namespace; nodes find their neighbours by themselves."""
    found = kernel_state(*(domains.space(place) for place in (*NODES, *PLACES)))
    own = {f"{domains.space(node).name} neighbours" for node in NODES}
    return {what: state for what, state in found.items() if what not in own}


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Domains]:
    with Domains(tmp_path_factory.mktemp("d")).up() as made:
        yield made


@pytest.fixture
async def mesh(domains: Domains):
    """The domains; afterwards nothing is left in any namespace, and nobody's loop was blocked."""
    spaces = [domains.space(place) for place in (*NODES, *PLACES)]
    await until(
        lambda: not tentative(*spaces), "addresses to be nobody else's", bar=2, record=False
    )
    before = standing(domains)
    yield domains
    domains.end_clients()
    now: dict[str, object] = {}

    def same() -> bool:
        now.update(standing(domains))
        return now == before

    try:
        await until(same, "nothing is left", bar=1, record=False)
    except AssertionError:
        assert now == before
    errors = [line for program in domains.programs for line in program.errors()]
    assert not errors, f"{len(errors)} lines of level error: {errors[0]}"
    told = domains.guarded()
    assert not told, f"{len(told)} calls that may block ran on an event loop: {told[0]}"
