"""Registration entries: all selectors must hold, and a wrong file names its line."""

import os
from pathlib import Path

import pytest

from nsm.errors import InvalidError, PreconditionError
from nsm.identity.attest import _INTERPRETERS, Process
from nsm.identity.entries import Entry, load, parse
from nsm.identity.spiffe import SpiffeId

ME = SpiffeId.parse("spiffe://td.example/a")
HOUR = 3600 * 10**9
NETNS = os.stat("/proc/self/ns/net")
SEEN = Process(
    pid=7,
    uid=1000,
    gid=100,
    netns=(NETNS.st_dev, NETNS.st_ino),
    cgroups=("/", "/system.slice/x.service"),
    program="/usr/bin/x",
    digest="ab" * 32,
)


def one(text: str) -> Entry:
    (entry,) = parse(f"- id: spiffe://td.example/a\n  {text}", "td.example", "e.yaml")
    return entry


def refusal(text: str) -> str:
    with pytest.raises(InvalidError) as refused:
        parse(text, "td.example", "e.yaml")
    return str(refused.value)


def test_a_whole_entry_is_read() -> None:
    text = """
    # who is who
    - id: spiffe://td.example/a
      uid: 1000
      gid: 100
      netns: "net:[4026531833]"
      cgroup: /system.slice/x.service/
      exe-sha256: ABABABABABABABABABABABABABABABABABABABABABABABABABABABABABABABAB
      dns: [a.example, b]
      ttl: 2h
      renew: 30s
    - {id: spiffe://td.example/b, uid: 0}
    """
    first, second = parse(text, "td.example", "e.yaml")
    assert first == Entry(
        id=ME,
        uid=1000,
        gid=100,
        netns="net:[4026531833]",
        cgroup="/system.slice/x.service",
        exe_sha256="ab" * 32,
        dns=("a.example", "b"),
        ttl=2 * HOUR,
        renew=30 * 10**9,
    )
    assert second == Entry(id=SpiffeId.parse("spiffe://td.example/b"), uid=0)


def test_json_is_read_too() -> None:
    text = '[\n\t{"id": "spiffe://td.example/a",\n\t"uid": 5, "dns": ["x"]}\n]'
    assert parse(text, "td.example", "e.json") == (Entry(id=ME, uid=5, dns=("x",)),)


def test_an_empty_file_registers_nobody() -> None:
    assert parse("", "td.example", "e.yaml") == ()
    assert parse("# nobody\n", "td.example", "e.yaml") == ()


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("- id: spiffe://td.example/a\n  uid: x", 2, "no user's or group's number"),
        ("- id: spiffe://td.example/a\n  uid: -1", 2, "no user's or group's number"),
        ("- id: spiffe://td.example/a\n  gid: 4294967295", 2, "no user's or group's number"),
        ("- id: spiffe://td.example/a\n  uid: [1]", 2, "one value is expected"),
        ("- id: spiffe://td.example/a\n  uid:", 2, "one value is expected"),
        ("- uid: 1", 1, "has no id"),
        ("- id: spiffe://td.example/a", 1, "has no selector"),
        ("- id: spiffe://td.example/a\n  dns: [a]", 1, "has no selector"),
        ("- id: spiffe://other/a\n  uid: 1", 1, "no workload of the trust domain"),
        ("- id: spiffe://td.example\n  uid: 1", 1, "no workload of the trust domain"),
        ("- id: nsc\n  uid: 1", 1, "no SPIFFE id"),
        ("- id: spiffe://td.example/a\n  uid: 1\n  user: 1", 3, "nothing an entry has"),
        ("- id: spiffe://td.example/a\n  uid: 1\n  uid: 2", 3, "twice"),
        ("- id: spiffe://td.example/a\n  netns: node-1", 2, "no network namespace"),
        ("- id: spiffe://td.example/a\n  netns: net:[1", 2, "no network namespace"),
        ("- id: spiffe://td.example/a\n  cgroup: x", 2, "no cgroup's path"),
        ("- id: spiffe://td.example/a\n  cgroup: /", 2, "no cgroup's path"),
        ("- id: spiffe://td.example/a\n  cgroup: /a/../b", 2, "no cgroup's path"),
        ("- id: spiffe://td.example/a\n  uid: 1\n  exe-sha256: abc", 3, "64 hexadecimal digits"),
        ("- id: spiffe://td.example/a\n  exe-sha256: " + "ab" * 32, 1, "has a digest and no uid"),
        ("- id: spiffe://td.example/a\n  uid: 1\n  dns: a", 3, "a list of DNS names"),
        ("- id: spiffe://td.example/a\n  uid: 1\n  dns: [A_b]", 3, "no DNS name"),
        ("- id: spiffe://td.example/a\n  uid: 1\n  ttl: 1m", 3, "no duration from 600 s"),
        ("- id: spiffe://td.example/a\n  uid: 1\n  ttl: 1000d", 3, "no duration from 600 s"),
        ("- id: spiffe://td.example/a\n  uid: 1\n  ttl: soon", 3, "no duration"),
        (
            "- id: spiffe://td.example/a\n  uid: 1\n  ttl: 1h\n  renew: 1h",
            1,
            "after it has expired",
        ),
        ("- id: spiffe://td.example/a\n  uid: 1\n- x", 3, "an entry is no mapping"),
        ("id: spiffe://td.example/a", 1, "a list of entries"),
        ("- id: spiffe://td.example/a\n  uid: 1\n - x", 3, ""),
        ("- id: [", 1, ""),
        ('[\n {"id": "spiffe://td.example/a",\n "uid": }\n]', 3, ""),
        ("- id: *nobody", 1, ""),
    ],
)
def test_a_wrong_file_names_its_line(text: str, line: int, words: str) -> None:
    why = refusal(text)
    assert why.startswith(f"e.yaml:{line}: ") or not words
    assert f"e.yaml:{line}:" in why or text.endswith("[")
    assert words in why


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "- " * 50_000,
        "\0",
        "- id: !!python/object/apply:os.system [x]\n  uid: 1",
        "a: &a [x]\nb: &b [*a, *a]\n",
    ],
)
def test_a_hostile_file_is_only_refused(text: str) -> None:
    refusal(text)


def test_a_file_that_is_not_there_or_has_no_end_is_named(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="cannot read"):
        load(tmp_path / "none.yaml", "td.example")
    with pytest.raises(PreconditionError, match="over 4194304 bytes"):
        load(Path("/dev/zero"), "td.example")
    os.mkfifo(tmp_path / "fifo")
    assert load(tmp_path / "fifo", "td.example") == ()


@pytest.mark.parametrize(
    "text",
    [
        "uid: 1000",
        "gid: 100",
        pytest.param(f'netns: "net:[{NETNS.st_ino}]"', id="the same in every run"),
        "netns: /proc/self/ns/net",
        "cgroup: /system.slice",
        "cgroup: /system.slice/x.service",
        "uid: 1000\n  exe-sha256: " + "ab" * 32,
        "uid: 1000\n  gid: 100\n  cgroup: /system.slice/",
    ],
)
def test_an_entry_fits_who_has_all_it_asks_for(text: str) -> None:
    assert one(text).fits(SEEN)


@pytest.mark.parametrize(
    "text",
    [
        "uid: 0",
        "gid: 0",
        'netns: "net:[1]"',
        "netns: /run/netns/there-is-none-of-that-name",
        "netns: /etc/passwd",
        "cgroup: /system",
        "cgroup: /system.slice/x.service/y",
        "uid: 1000\n  exe-sha256: " + "cd" * 32,
        "uid: 1000\n  gid: 0",
        "uid: 1\n  cgroup: /system.slice",
    ],
)
def test_an_entry_fits_nobody_who_lacks_one_of_them(text: str) -> None:
    assert not one(text).fits(SEEN)


def test_what_could_not_be_read_fits_nothing() -> None:
    blind = Process(7, 1000, 100, None, None, None)
    assert one("uid: 1000").fits(blind)
    for text in ("netns: /proc/self/ns/net", "cgroup: /system.slice"):
        assert not one(text).fits(blind)
    assert not one("uid: 1000\n  exe-sha256: " + "ab" * 32).fits(blind)
    assert "cannot be read" in str(blind)


def test_a_path_out_of_our_own_cgroup_is_in_none() -> None:
    outside = Process(7, 1000, 100, None, ("/../system.slice/x",), None)
    assert not one("cgroup: /system.slice").fits(outside)


@pytest.mark.parametrize(
    ("name", "runs_others"),
    [
        ("python3.11", True),
        ("python3.13t", True),
        ("bash", True),
        ("sh", True),
        ("busybox", True),
        ("node", True),
        ("perl5.36.0", True),
        ("ld-linux-x86-64.so.2", True),
        ("sshd", False),
        ("shadowd", False),
        ("forwarder", False),
        ("nodeinfo", False),
    ],
)
def test_interpreters_are_known(name: str, runs_others: bool) -> None:
    assert bool(_INTERPRETERS.fullmatch(name)) is runs_others
