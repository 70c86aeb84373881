"""What chaos breaks is drawn from a number, and a file of it says the same."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from labs import lab as labfile
from labs import schedule, wear
from labs.paths import Paths
from labs.schedule import COST, OF_NODES, Site
from nsm.errors import InvalidError

SITES = st.builds(
    Site,
    st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True).map(tuple),
    st.lists(st.sampled_from("uvwxyz"), min_size=1, unique=True).map(tuple),
    st.lists(st.sampled_from("abc"), unique=True).map(tuple),
)
SEEDS = st.integers(-(2**31), 2**63)
CHAOS = labfile.read(labfile.find("chaos"))
HERE = schedule.site(CHAOS, Paths(CHAOS.name))


@settings(max_examples=200)
@given(SEEDS, st.floats(0.05, 5), SITES)
def test_a_number_draws_the_same_again_and_nobody_who_is_not_there(seed, minutes, site):
    faults = schedule.drawn(seed, minutes, site)
    assert faults == schedule.drawn(seed, minutes, site)
    assert sum(one.seconds + one.rest + COST for one in faults) <= minutes * 60
    for one in faults:
        there = site.nodes if one.do in OF_NODES else site.processes
        assert set(one.who) <= set(there) - set(site.routers if one.do == "restart" else ())
        assert 1 <= len(one.who) == len(set(one.who))
        assert one.do != "partition" or len(one.who) < len(there)
        assert (one.bits > 0) == (one.do == "rate")
        assert len(site.nodes) > 1 or there is site.processes


@settings(max_examples=100)
@given(SEEDS, SITES)
def test_what_is_written_is_read_again_as_it_was(seed, site):
    faults = schedule.drawn(seed, 2.0, site)
    text = yaml.safe_dump({"faults": schedule.written(faults)})
    assert schedule.read(yaml.safe_load(text)["faults"], site, "x.yaml") == faults


def test_an_hour_has_faults_of_every_kind_and_meets_everybody():
    faults = schedule.drawn(7, 60.0, HERE)
    assert {one.do for one in faults} == set(schedule.ODDS)
    assert {who for one in faults for who in one.who} == {*HERE.processes, *HERE.nodes}
    assert any(len(one.who) == 2 for one in faults if one.do == "kill")
    assert faults != schedule.drawn(8, 60.0, HERE)
    assert faults[:20] == schedule.drawn(7, 20.0, HERE)[:20], "more minutes add, and change nothing"


def test_whom_chaos_may_break_is_called_as_people_call_them():
    assert HERE.nodes == ("home-1", "home-2", "away-1")
    assert {"nsmgr@home-1", "forwarder@away-1", "client:sealed", "endpoint:hub", "issuer@away-1",
            "registry@home-1", "nsmgr-proxy@home-1"} <= set(HERE.processes)  # fmt: skip
    assert HERE.routers == ("router:flat-home-1", "router:flat-home-2")
    assert {"ipam@home-1", *HERE.routers} <= set(HERE.processes)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ({"do": "burn", "who": ["home-1"]}, "`do` is 'burn'; one of kill, restart"),
        ({"do": "kill", "who": ["nobody"]}, "`who` is \\['nobody'\\]; some of issuer@home-1"),
        ({"do": "kill", "who": "home-1"}, "`who` is 'home-1'"),
        ({"do": "unplug", "who": ["nsmgr@home-1"]}, "some of home-1, home-2, away-1"),
        ({"do": "partition", "who": ["home-1", "home-2", "away-1"]}, "everybody; name one side"),
        ({"do": "kill", "who": ["nsmgr@home-1"] * 2}, "nobody twice"),
        ({"do": "unplug", "who": ["home-1", "home-2"]}, "one node to unplug"),
        ({"do": "reboot", "who": ["home-1", "home-2"]}, "one node to .* start anew"),
        ({"do": "restart", "who": ["router:flat-home-1"]}, "'router:flat-home-1'.*some of issuer"),
        ({"do": "rate", "who": ["home-1"]}, "`bits` is missing"),
        ({"do": "kill", "who": ["nsmgr@home-1"], "seconds": -1}, "`seconds` is -1"),
        ({"do": "kill", "who": ["nsmgr@home-1"], "rest": True}, "`rest` is True"),
        ({"do": "kill", "who": ["nsmgr@home-1"], "when": 3}, "has not just"),
        ("kill", "has not just"),
    ],
)
def test_a_file_of_something_else_is_refused_with_what_it_should_say(fault, why):
    with pytest.raises(InvalidError, match=f"x.yaml: fault 1.*{why}"):
        schedule.read([fault], HERE, "x.yaml")
    with pytest.raises(InvalidError, match="`faults` is no list"):
        schedule.read(fault, HERE, "x.yaml")


def looks(**rows: list[int | None]) -> list[dict[str, wear.Held]]:
    of = {"pss_kib": 20_000, "fds": 20, "threads": 3, "tasks": 12}
    (count,) = {len(values) for values in rows.values()}
    return [
        {"nsmgr@n": wear.Held(**{**of, **{what: rows[what][n] for what in rows}})}
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"fds": [20] * 9}, []),
        ({"fds": [20, 20, 90, 20, 20, 20, 20, 20, 90]}, []),  # one look is no trend
        ({"fds": [20, 24, 28, 32, 36, 40, 44, 48, 52]}, ["nsmgr@n: fds went from 24 to 48"]),
        ({"tasks": [12] * 6 + [30] * 3}, ["nsmgr@n: tasks went from 12 to 30"]),
        ({"threads": [3] * 6 + [9] * 3}, ["nsmgr@n: threads went from 3 to 9"]),
        ({"pss_kib": [20_000] * 6 + [24_000] * 3}, []),
        ({"pss_kib": [20_000] * 6 + [40_000] * 3}, ["nsmgr@n: pss_kib went from 20000 to 40000"]),
        ({"fds": [1, 1, 1, 500, 500]}, []),  # too few looks
        ({"tasks": [None, None, None] + [30] * 6}, []),  # who does not say has not none
        ({"tasks": [12, None, 12, None, 12] + [30] * 4}, ["nsmgr@n: tasks went from 12 to 30"]),
    ],
)
def test_what_grows_from_look_to_look_is_told(rows, said):
    assert wear.growing(wear.trend(looks(**rows))) == said
