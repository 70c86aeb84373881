"""The file of domains: what it may say, and the line of whatever is wrong with it."""

import pytest

from nsm.errors import InvalidError
from nsm.places import Place, parse_map
from nsm.rpc import addresses


def test_a_file_says_where_domains_are() -> None:
    text = """
    # our own and a friend's
    Cluster2.:
      registry: [tcp://10.0.0.1:5002, "tcp://[fd00::1]:5002"]
      nsmgr-proxy: tcp://10.0.0.1:5004
    floating.example: {registry: [unix:///run/r.sock]}
    nothing: {}
    """
    assert parse_map(text, "f", addresses.parse) == {
        "cluster2": Place(
            ("tcp://10.0.0.1:5002", "tcp://[fd00::1]:5002"), ("tcp://10.0.0.1:5004",)
        ),
        "floating.example": Place(("unix:///run/r.sock",)),
        "nothing": Place(),
    }
    assert parse_map("", "f", addresses.parse) == {}
    assert parse_map("# nothing yet\n", "f", addresses.parse) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: {registry: [tcp://h:1]\n", "f:2: "),
        ("a:\n\tregistry: x\n", "f:2: "),
        ("a\n", "f:1: the file is no mapping"),
        ("a:\n- registry\n", "f:2: domain 'a' is no mapping"),
        ("a:\nb:\n", "f:1: domain 'a' is no mapping"),
        ("a: {}\nA.: {}\n", "f:2: domain 'a' is there twice"),
        ("a: {}\na: {}\n", "f:2: 'a' is there twice in the file"),
        ("a: {}\na b: {}\n", "f:2: 'a b' is no domain's name"),
        ("? [a]\n: {}\n", "f:1: a key of the file is no text"),
        ("a:\n  Registry: []\n", "f:2: domain 'a' has no 'Registry'"),
        ("a:\n  registry:\n  - {}\n", "f:3: a URL, or a list of URLs"),
        ("a:\n  registry: {}\n", "f:2: a URL, or a list of URLs"),
        ("a:\n  registry:\n  - tcp://h:1\n  - tcp://h\n", "f:4: 'tcp://h' is no address"),
        (f"a: {{registry: [{', '.join(['tcp://h:1'] * 17)}]}}\n", "f:1: 17 URLs, more than 16"),
        ("a: " + "[" * 3000 + "\n", "f:1: more than 8 levels"),
        ("a: &x {registry: [*x]}\n", "f:1: "),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, says: str) -> None:
    with pytest.raises(InvalidError) as wrong:
        parse_map(text, "f", addresses.parse)
    assert says in wrong.value.message
    assert "a domain has the form" in wrong.value.hint
