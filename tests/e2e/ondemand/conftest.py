"""One mesh with an address plan for all tests; suppliers, routers and members are each test's."""

from collections.abc import Iterator

import pytest

from tests.e2e.ondemand.place import OPERATOR, Place


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The network is defined, and nobody offers it."""
    made = Place(tmp_path_factory.mktemp("d"))
    with made.up():
        made.now["plan"] = made.lend(NSM_PREFIX="", NSM_OPERATORS=OPERATOR)
        made.create()
        yield made


@pytest.fixture
def place(mesh: Place) -> Iterator[Place]:
    """The mesh; what a test started ends with it."""
    yield mesh
    mesh.end_clients()
    mesh.end_routers()
    errors = [line for program in mesh.programs for line in program.errors()]
    assert not errors, f"{len(errors)} lines of level error: {errors[0]}"
    told = mesh.guarded()
    assert not told, f"{len(told)} calls that may block ran on an event loop: {told[0]}"
