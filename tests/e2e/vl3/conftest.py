"""A domain for the tests of one module: two routers, three members, of both families."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.vl3.domain import Domain
from tests.e2e.vl3.names import MEMBERS, ROUTERS
from tests.support.spaces import Space


@contextmanager
def _domain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Domain]:
    with Domain(tmp_path_factory.mktemp("v")).up() as made:
        made.tell()
        yield made


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Domain]:
    """The mesh below, without any of the domain's processes."""
    with _domain(tmp_path_factory) as made:
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


@pytest.fixture
def spaces(mesh: Domain) -> dict[str, Space]:
    """By name."""
    return {name: mesh.space(name) for name in (*ROUTERS, *MEMBERS)}
