"""What is written down of an outage, what is read of a file, and what a report makes of it."""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from nsm.client import Change, Wire
from nsm.errors import PreconditionError
from nsm.heal import Cause, Trouble
from nsm.nsurl import parse
from nsm.outages import ENOUGH, LONGEST, Journal, Outage, journal, read, summed
from nsm.process import losses, metrics
from nsm.process.metrics import Figures


def outage(number: int = 0, cause: Cause = Cause.DATA, healed: float | None = 0.7) -> Outage:
    return Outage(
        connection=f"app-{number}",
        service="db",
        cause=cause,
        ended=1.0,
        noticed=0.2,
        healed=healed,
        flowed=False,
        stages={"unnoticed": 200.0},
    )


async def test_what_was_written_is_read_again_in_its_order(tmp_path: Path) -> None:
    path = str(tmp_path / "outages")
    written = [outage(number) for number in range(500)]
    async with journal(path) as kept:
        for one in written:
            kept.add(one)
            if not one.connection.endswith("7"):
                await asyncio.sleep(0)
    assert list(read([path])) == written


async def test_a_file_that_is_full_is_put_aside_and_no_more_than_that(tmp_path: Path) -> None:
    path = str(tmp_path / "outages")
    kept = Journal(path, largest=10_000)
    for number in range(301):
        kept.add(outage(number))
        await kept.flushed()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["outages", "outages.1"]
    assert all(one.stat().st_size < 10_500 for one in tmp_path.iterdir())
    found = [one.connection for one in read([path])]
    assert found == [f"app-{number}" for number in range(301 - len(found), 301)]
    assert len(found) > 30


async def test_a_place_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match=r"NSM_OUTAGE_LOG is .*No such file"):
        await journal(str(tmp_path / "none" / "outages")).__aenter__()


def line(**changed: object) -> bytes:
    said = json.loads(json.dumps(asdict(outage())))
    said |= {name: value for name, value in changed.items() if value is not ...}
    return json.dumps({k: v for k, v in said.items() if changed.get(k) is not ...}).encode()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"[" * 50_000, "it is no JSON"),
        (b'{"conn', "it is no JSON"),
        (b"\xff\xfe", "it is no JSON"),
        (b"[1]", "it is no JSON object"),
        (b'{"cause": "data"}', "it has no `connection`"),
        (line(noticed=...), "it has no `noticed`"),
        (line(cause="new"), "`cause` is 'new', and not one of control, data,"),
        (line(cause=["data"]), "`cause` is ['data'], and not one of control, data,"),
        (line(noticed="0.2"), "`noticed` is '0.2', and not a number of seconds"),
        (line(noticed=None), "`noticed` is None, and not a number"),
        (line(noticed=True), "`noticed` is True, and not a number"),
        (line(noticed=float("nan")), "`noticed` is nan, and not a number"),
        (line(healed=float("inf")), "`healed` is inf, and not a number of seconds, or null"),
        (line(healed=10**400), "`healed` is 1000"),
        (line(healed=-1), "`healed` is -1, and not a number"),
        (line(service={"a": 1}), "`service` is {'a': 1}, and not a text"),
        (line(flowed="no"), "`flowed` is 'no', and not true, false or null"),
        (line(tries=1.5), "`tries` is 1.5, and not a count"),
        (line(stages={"unnoticed": "x"}), "`stages` is {'unnoticed': 'x'}, and not an object"),
    ],
)
def test_a_line_that_is_no_outage_is_refused_with_what_is_wrong(
    tmp_path: Path, said: bytes, why: str
) -> None:
    path, refused = tmp_path / "outages", list[str]()
    path.write_bytes(line() + b"\n" + said + b"\n" + line() + b"\n")
    assert list(read([str(path), str(tmp_path / "none")], refused.append)) == [outage()] * 2
    (sentence,) = refused
    assert sentence.startswith(f"{path}, line 2 is no outage: {why}")
    assert len(sentence) < len(str(path)) + 200


def test_a_later_versions_line_is_read_and_one_without_an_end_is_one_line(tmp_path: Path) -> None:
    path, refused = tmp_path / "outages", list[str]()
    path.write_bytes(line(weather="fine") + b"\n" + b"x" * (3 * LONGEST) + b"\n" + line())
    assert list(read([str(path)], refused.append)) == [outage()] * 2
    assert len(refused) == 1
    with pytest.raises(PreconditionError, match=r"cannot be read: Is a directory; name files"):
        list(read([str(tmp_path)]))


def test_a_report_has_a_line_for_each_cause_and_a_percentile_of_many_only() -> None:
    some = [outage(n, healed=n / 100) for n in range(1, 101)]
    some += [outage(cause=Cause.CONTROL, healed=None), outage(cause=Cause.CONTROL, healed=3.0)]
    control, data = summed(some)
    assert (control.cause, control.n, control.lost, control.healed_max) == ("control", 2, 1, 3.0)
    assert (data.n, data.lost, data.cut, data.noticed_median) == (100, 0, 100, 0.2)
    assert (data.healed_median, data.healed_max) == (0.505, 1.0)
    assert data.healed_p99 is None
    (many,) = summed(outage(n, healed=n / 1000) for n in range(1, ENOUGH + 1))
    assert many.healed_p99 == pytest.approx(0.298, abs=0.001)
    (gone,) = summed([outage(healed=None)])
    assert (gone.healed_median, gone.healed_max) == (None, None)


async def test_a_wires_losses_are_written_when_they_end_or_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "figures", figures := Figures())
    path = str(tmp_path / "outages")
    wire = Wire("app-nsm-1", parse("kernel://db/nsm-1"), "nsm-1")
    async with losses.noted(path) as note:
        note(Change.UP, wire)  # the first time: nothing was lost
        wire.trouble = Trouble(cause=Cause.DATA, began=1.0, noticed=1.5, endpoint="a")
        note(Change.DOWN, wire)
        wire.trouble = wire.trouble.ended(3.0, 2.0, 2, {"request": 1000.0})
        monkeypatch.setattr(Wire, "endpoint", "b")
        note(Change.UP, wire)
        note(Change.CLOSED, wire)  # what is over is not given up
        wire.trouble = Trouble(cause=Cause.DELETED, began=9.0, noticed=9.0, endpoint="b")
        note(Change.DOWN, wire)
        note(Change.CLOSED, wire)
    first, second = read([path])
    assert (first.cause, first.noticed, first.healed, first.tries) == (Cause.DATA, 0.5, 2.0, 2)
    assert (first.endpoint, first.endpoint_after, first.connection) == ("a", "b", "app-nsm-1")
    assert first.stages == {"unnoticed": 500.0, "unasked": 500.0, "request": 1000.0}
    assert (second.cause, second.healed) == (Cause.DELETED, None)
    assert (figures.heals, figures.outages) == ({"data": 1}, {"data": 2.0})
    assert metrics.figures is not figures
