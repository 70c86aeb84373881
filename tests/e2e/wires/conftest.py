"""Nodes for the tests of one module, and the loop guard of their processes."""

from collections.abc import Iterator

import pytest

from tests.e2e.wires.nodes import Nodes, two_nodes

LAB = two_nodes("""
name: wires
services:
  echo:
    payload: ethernet
    endpoints:
      pong: {on: two, prefixes: [172.16.1.0/24]}
  pair:                             # room for one wire at a time
    payload: ethernet
    endpoints:
      single: {on: two, prefixes: [172.16.2.0/31]}
clients:
  app: {on: one, connect: ["kernel://echo/nsm-1"]}
  near: {on: two, connect: ["kernel://echo/nsm-1"]}
""")


@pytest.fixture(scope="module")
def lab_text() -> str:
    return LAB


@pytest.fixture(scope="module")
def mesh(lab_text: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A mesh for all tests of a module; each leaves it as it found it."""
    with Nodes(lab_text, tmp_path_factory.mktemp("w")).up() as made:
        yield made


@pytest.fixture
def nodes(mesh: Nodes) -> Iterator[Nodes]:
    yield mesh
    mesh.end_clients()
    errors = [line for program in mesh.programs for line in program.errors()]
    assert not errors, f"{len(errors)} lines of level error: {errors[0]}"
    told = mesh.guarded()
    assert not told, f"{len(told)} calls that may block ran on an event loop: {told[0]}"
