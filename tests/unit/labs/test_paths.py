"""A lab's name becomes part of paths that are removed: it is held against the grammar first."""

import pytest

from labs import paths, schema
from nsm.errors import InvalidError


def test_a_name_of_a_lab_is_what_a_lab_file_may_call_it():
    assert schema.document()["$defs"]["name"]["pattern"] == f"^{paths.NAME}$"
    assert paths.Paths("one-node").folder == "/run/vwire/labs/one-node"


@pytest.mark.parametrize("name", ["", ".", "..", "/etc", "a/b", "../x", "a\n", "A", "a-", "a" * 25])
def test_any_other_is_refused_before_a_path_is_made_of_it(name):
    with pytest.raises(InvalidError, match="1 to 24 characters"):
        paths.Paths(name)
