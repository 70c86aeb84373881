"""What the bench is asked for is measured, or named as missing; and what it measures is of the
kind it says."""

import pytest

from bench import lane, parts
from bench.__main__ import main, where
from bench.mesh import mesh, must_be
from bench.parts import PARTS, QUICK, in_meshes
from bench.wires import KINDS
from nsm.kernel.tunnels import Engine

pytestmark = pytest.mark.unit

BOTH = (Engine("kernel", "made one"), Engine("userspace", "made one"))
NONE = (Engine("", "this kernel has none"), Engine("", "there is no wireguard-go"))
GO = (NONE[0], BOTH[1])


def test_a_machine_with_both_wireguards_measures_all_of_it_here():
    assert where(KINDS, PARTS, BOTH, use_lane=True) == (list(KINDS), [], [])


def test_what_the_lane_cannot_measure_is_missing_and_it_is_not_started_for_nothing():
    here, in_lane, missing = where(KINDS, PARTS, GO, use_lane=True)
    assert here == ["veth", "vxlan", "wireguard-go"]
    assert in_lane == ["same", "paths", "setup", "bringups"]
    assert [one.partition(":")[0] for one in missing] == (
        ["requests of wireguard", "memory of wireguard"]
    )
    _, in_lane, missing = where(["wireguard"], ["memory"], GO, use_lane=True)
    assert in_lane == []
    assert missing == [
        "memory of wireguard: this kernel has none, and in the lane is no mesh",
    ]


def test_a_kind_that_nobody_makes_here_is_missing_and_why():
    assert where(KINDS, ["paths"], NONE, use_lane=False) == (
        ["veth", "vxlan"],
        [],
        [
            "wireguard-go: there is no wireguard-go",
            "wireguard: this kernel has none, and the lane was not to be used",
        ],
    )
    assert where(["veth"], ["paths"], NONE, use_lane=False) == (["veth"], [], [])


@pytest.mark.parametrize("words", [["--no-lane"], ["--quick"]])
def test_who_asks_for_nothing_that_can_be_had_is_told_so_by_the_exit_code(
    words, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("bench.machine.engines", lambda: GO)
    monkeypatch.setattr(lane, "add", lambda *_: pytest.fail("the lane was not asked for"))
    asked = ["bench", *words, "--kinds", "wireguard", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", asked)
    assert main() == 3
    assert "not measured: wireguard: this kernel has none" in capsys.readouterr().out


def test_a_part_that_no_kind_has_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("bench.machine.engines", lambda: BOTH)
    asked = ["bench", "--kinds", "veth", "--only", "bringups", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", asked)
    assert main() == 3
    assert "not measured: bringups of veth: there is none" in capsys.readouterr().out


def test_of_memory_a_quick_run_names_the_kinds_it_leaves_out(monkeypatch):
    def refused(*_):
        raise RuntimeError("no mesh in a unit test")

    monkeypatch.setattr(parts, "mesh", refused)
    found = parts.measure(["vxlan", "veth"], ["memory"], QUICK, lambda _: None)
    assert found.missing == [
        "memory of vxlan: no mesh in a unit test",
        "memory of veth: with --quick, that of vxlan alone is",
    ]


def test_each_wireguard_has_a_mesh_of_its_own():
    assert in_meshes(KINDS) == [["veth", "vxlan", "wireguard"], ["wireguard-go"]]
    assert in_meshes(["wireguard-go", "veth"]) == [["wireguard-go", "veth"]]
    assert in_meshes([]) == []
    with pytest.raises(ValueError, match="all of wireguard, wireguard-go"), mesh(*KINDS[2:]):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_figure_of_a_device_of_another_kind_is_refused(kind):
    own = {"wireguard-go": "tun"}.get(kind, kind)
    must_be(kind, own)
    for other in {"veth", "vxlan", "wireguard", "tun", ""} - {own}:
        with pytest.raises(RuntimeError, match=f"no figure of it is one of {kind}"):
            must_be(kind, other)
