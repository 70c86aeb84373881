"""A mesh for the tests of one module; the domain's own processes are each test's."""

from collections.abc import Iterator

import pytest

from tests.e2e.vl3.domain import LAB, Domain


@pytest.fixture(scope="module")
def lab_text() -> str:
    """Who there is; a module may have another."""
    return LAB


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, lab_text: str) -> Iterator[Domain]:
    """The mesh below, without any of the domain's processes."""
    made = Domain(tmp_path_factory.mktemp("v"), lab_text)
    with made.up():
        made.tell()
        yield made


@pytest.fixture
def domain(mesh: Domain) -> Iterator[Domain]:
    """The mesh; what a test started of the domain ends with the test, and leaves nothing."""
    yield mesh
    mesh.end_clients()
    errors = [line for program in mesh.programs for line in program.errors()]
    assert not errors, f"{len(errors)} lines of level error: {errors[0]}"
    told = mesh.guarded()
    assert not told, f"{len(told)} calls that may block ran on an event loop: {told[0]}"
