"""What a courier knows of the numbers that came: as ranges, whatever their order."""

import random

import pytest

from labs.sequences import Heard, Ranges, Silence


def ranges(*numbers: int) -> Ranges:
    made = Ranges()
    for number in numbers:
        made.add(number)
    return made


@pytest.mark.parametrize("seed", range(20))
def test_ranges_hold_what_a_set_would(seed: int) -> None:
    draw = random.Random(seed)
    made, wanted = Ranges(), set()
    for number in (draw.randrange(60) for _ in range(80)):
        assert made.add(number) == (number not in wanted)
        wanted.add(number)
        assert [n for r in made for n in r] == sorted(wanted)
    window = range(10, 50)
    assert {n for r in made.within(window) for n in r} == wanted & {*window}
    assert {n for r in made.without(window) for n in r} == {*window} - wanted
    other = ranges(*draw.sample(range(60), 20))
    both = wanted | {n for r in other for n in r}
    assert [n for r in made.joined(other) for n in r] == sorted(both)
    assert made.count == len(wanted)
    assert Ranges(made.pairs()).pairs() == made.pairs()
    assert all(a.stop < b.start for a, b in zip([*made], [*made][1:], strict=False))


def test_an_hour_without_a_loss_takes_the_room_of_one_range() -> None:
    heard = Heard()
    for number in range(720_000):
        heard.take(number, number / 200)
    assert heard.numbers.pairs() == [(0, 720_000)]
    assert not heard.silences


def test_what_comes_twice_and_what_comes_late_is_counted() -> None:
    heard = Heard()
    for when, number in enumerate((0, 1, 3, 2, 3, 4, 1)):
        heard.take(number, when / 200)
    assert (heard.duplicates, heard.reordered) == (2, 1)
    assert heard.numbers.pairs() == [(0, 5)]


def test_a_silence_is_from_the_last_arrival_to_the_next() -> None:
    heard = Heard()
    for number, when in ((0, 1.0), (1, 1.005), (140, 1.7), (141, 1.705), (142, 1.79)):
        heard.take(number, when)
    assert [*heard.silences] == [Silence(1, 140, 0.695)]
