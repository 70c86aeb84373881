import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm import path
from nsm.errors import InvalidError
from nsm.model import Connection, Path, Segment


def asked(*names: str, index: int = 0) -> Connection:
    segments = tuple(Segment(name, f"id-{name}") for name in names)
    return Connection(id=segments[index].id, path=Path(segments, index))


def test_a_first_request_gains_the_hop_and_its_own_id():
    conn, back = path.enter(asked("nsc"), "nsmgr")
    assert back == 0
    assert [s.name for s in conn.segments] == ["nsc", "nsmgr"]
    assert conn.index == 1
    assert conn.id == conn.segments[1].id != "id-nsc"


def test_the_caller_gets_its_own_id_and_index_back_with_all_segments():
    conn, back = path.enter(asked("nsc"), "nsmgr")
    left = path.leave(conn, back)
    assert (left.id, left.index, len(left.segments)) == ("id-nsc", 0, 2)


def test_a_refresh_finds_its_segment_again():
    conn, _ = path.enter(asked("nsc", "nsmgr", "forwarder"), "nsmgr")
    assert conn.id == "id-nsmgr"
    assert len(conn.segments) == 3


def test_a_hop_that_was_replaced_gets_a_new_id_and_the_rest_stays_until_it_is_cut():
    conn, _ = path.enter(asked("nsc", "nsmgr-old", "forwarder"), "nsmgr-new")
    assert conn.segments[1].name == "nsmgr-new"
    assert conn.segments[1].id not in ("id-nsmgr-old", "")
    assert conn.segments[2].name == "forwarder"
    assert [s.name for s in path.end(conn).segments] == ["nsc", "nsmgr-new"]


def test_an_in_process_client_behind_a_server_adds_no_hop():
    conn, back = path.enter(asked("nsc", "nsmgr", index=1), "nsmgr")
    assert (conn.index, back, len(conn.segments)) == (1, 1, 2)


def test_without_a_path_one_begins():
    conn, back = path.enter(Connection(id="own"), "nsc")
    assert (conn.id, conn.index, back, conn.segments[0].name) == ("own", 0, 0, "nsc")
    assert path.enter(Connection(), "nsc")[0].id


def test_an_index_behind_the_end_is_refused_in_upstreams_words():
    with pytest.raises(InvalidError, match=r"Path.Index\+1==3 should be less or equal len\(Path"):
        path.enter(Connection(id="x", path=Path((Segment("a", "x"),), 2)), "nsmgr")


def test_an_id_that_is_not_the_segments_is_refused_in_upstreams_words():
    with pytest.raises(InvalidError, match=r"Current PathSegment.Id=='id-nsc' should be equal"):
        path.enter(Connection(id="other", path=asked("nsc").path), "nsmgr")


def test_a_path_nobody_honest_sends_is_refused_before_it_is_walked():
    with pytest.raises(InvalidError, match="10000 segments"):
        path.enter(asked(*map(str, range(10_000))), "nsmgr")
    with pytest.raises(InvalidError, match="more than 512 bytes"):
        path.enter(asked("x" * 513), "nsmgr")


def test_the_first_writer_of_a_metric_wins():
    conn = path.measured(asked("nsc"), client_interface="KERNEL/nsm-1")
    conn = path.measured(conn, client_interface="other", server_interface="VXLAN/x")
    assert conn.segments[0].metrics == {
        "client_interface": "KERNEL/nsm-1",
        "server_interface": "VXLAN/x",
    }


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=8, unique=True))
def test_through_any_hops_and_back_the_first_caller_has_what_it_came_with(names):
    first = asked(names[0])
    conn, backs = first, []
    for name in names[1:]:
        conn, back = path.enter(conn, name)
        backs.append(back)
    assert [s.name for s in conn.segments] == names
    for back in reversed(backs):
        conn = path.leave(conn, back)
    assert (conn.id, conn.index) == (first.id, 0)
    again = conn
    for name in names[1:]:
        again, _ = path.enter(again, name)
    assert [s.id for s in again.segments] == [s.id for s in conn.segments]


def hop(name, **metrics):
    return Segment(name, name, metrics=metrics)


def test_where_the_time_of_a_request_went_is_read_from_what_each_hop_wrote():
    local = (
        hop("nsc"),
        hop("nsmgr", took_ms="8"),
        hop("forwarder", took_ms="6", find_ms="2", kernel_ms="1"),
        hop("nse", took_ms="0.5"),
    )
    shares = path.stages(Connection(id="nsc", path=Path(local)), 10.0)
    assert (shares["calling"], shares["manager"], shares["find"]) == (2.0, 2.0, 2.0)
    assert (shares["forwarder"], shares["kernel"], shares["endpoint"]) == (2.5, 1.0, 0.5)
    assert sum(shares.values()) == 10.0


def test_between_two_nodes_both_managers_and_both_forwarders_are_added_up():
    remote = (
        hop("nsc"),
        hop("nsmgr-1", took_ms="20"),
        hop("forwarder-1", took_ms="18", find_ms="3", kernel_ms="1"),
        hop("nsmgr-2", took_ms="12"),
        hop("forwarder-2", took_ms="9", find_ms="2", kernel_ms="1"),
        hop("nse", took_ms="1"),
    )
    shares = path.stages(Connection(id="nsc", path=Path(remote)), 21.0)
    assert shares["manager"] == 2.0 + 3.0
    assert (shares["find"], shares["kernel"], shares["endpoint"]) == (5.0, 2.0, 1.0)
    assert sum(shares.values()) == 21.0


def test_a_handshake_between_nodes_is_a_stage_of_its_own_where_there_was_one():
    sealed = (
        hop("nsc"),
        hop("nsmgr", took_ms="8"),
        hop("forwarder", took_ms="7", kernel_ms="1", handshake_ms="2.5"),
        hop("nse", took_ms="1"),
    )
    shares = path.stages(Connection(id="nsc", path=Path(sealed)), 9.0)
    assert (shares["handshake"], shares["forwarder"], shares["kernel"]) == (2.5, 2.5, 1.0)
    assert sum(shares.values()) == 9.0
    plain = path.stages(Connection(id="nsc", path=Path((hop("nsc"), *sealed[1:2]))), 9.0)
    assert "handshake" not in plain


def test_between_two_domains_the_proxies_are_a_stage_and_hops_behind_them_stay_what_they_are():
    far = (
        hop("nsc"),
        hop("nsmgr-1", took_ms="20"),
        hop("forwarder-1", took_ms="18", find_ms="3"),
        hop("proxy-1", took_ms="13", border="out"),
        hop("proxy-2", took_ms="10", border="in"),
        hop("nsmgr-2", took_ms="8"),
        hop("forwarder-2", took_ms="4"),
        hop("nse", took_ms="1"),
    )
    shares = path.stages(Connection(id="nsc", path=Path(far)), 21.0)
    assert (shares["manager"], shares["proxy"]) == (2.0 + 4.0, 3.0 + 2.0)
    assert (shares["forwarder"], shares["endpoint"]) == (2.0 + 3.0, 1.0)
    assert sum(shares.values()) == 21.0
    one = path.stages(Connection(id="nsc", path=Path((*far[:4], *far[5:]))), 21.0)
    assert (one["manager"], one["proxy"], one["forwarder"]) == (2.0 + 4.0, 5.0, 2.0 + 3.0)


def test_hops_that_write_nothing_count_with_the_one_before():
    upstream = (hop("nsc"), hop("nsmgr"), hop("forwarder", took_ms="x"), hop("nse", took_ms="1"))
    shares = path.stages(Connection(id="nsc", path=Path(upstream)), 5.0)
    assert (shares["calling"], shares["endpoint"], shares["manager"]) == (4.0, 1.0, 0.0)
