import pytest

from tests.support.callers import Mesh


@pytest.fixture
def mesh():
    return Mesh()
