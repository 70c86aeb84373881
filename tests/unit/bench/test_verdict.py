"""When a bar holds, and how well a ratio is known."""

import random
import statistics

import pytest

from bench.verdict import Judged, interval, median_of, of_medians, slope, slope_of

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("value", "between", "most", "verdict"),
    [
        (0.98, None, False, "holds"),
        (0.96, None, False, "does not hold"),
        (0.96, (0.93, 0.98), False, "unclear"),
        (0.96, (0.95, 0.969), False, "does not hold"),
        (0.98, (0.90, 1.05), False, "unclear"),
        (0.98, (0.972, 1.05), False, "holds"),
        (1.4, (1.2, 1.6), True, "unclear"),
        (1.4, (1.2, 1.5), True, "holds"),
        (1.6, (1.51, 1.8), True, "does not hold"),
        (0.97, None, False, "holds"),
        (1.6, None, True, "does not hold"),
        (1.6, (1.4, 1.8), True, "unclear"),
        (0.97, None, True, "holds"),
    ],
)
def test_a_bar_holds_with_its_whole_interval_and_is_unclear_where_that_is_on_both_sides(
    value, between, most, verdict
):
    bar = 0.97 if value < 1 else 1.5
    assert Judged("x", value, bar, most=most, interval=between).verdict == verdict


def test_the_interval_is_around_the_median_and_narrower_with_more_pairs():
    few = [1 + 0.01 * (n % 7 - 3) for n in range(10)]
    many = few * 10
    low, high = interval(many)
    assert low <= statistics.median(many) <= high
    assert high - low < interval(few)[1] - interval(few)[0]
    assert interval([1.0] * 5) == (1.0, 1.0)
    assert interval(few) == interval(list(few))


def test_the_interval_covers_the_true_median_about_as_often_as_it_says():
    draw = random.Random(4)
    hits = 0
    for _ in range(60):
        low, high = interval([draw.gauss(1.0, 0.1) for _ in range(30)], resamples=200)
        hits += low <= 1.0 <= high
    assert 51 <= hits <= 60


def test_a_judged_ratio_is_told_with_its_interval_and_bar():
    told = str(median_of("veth: throughput ÷ by hand", [0.99, 1.0, 1.01], 0.97, most=False))
    assert told.split("  ")[-1].strip() == "holds"
    assert "1.000 (0.990 to 1.010)" in told
    assert "at least 0.97" in told
    assert str(Judged("at rest", 70.7123, 90, unit="MB")).split()[-6:] == (
        ["MB", "at", "most", "90", "MB", "holds"]
    )


def test_a_ratio_of_medians_does_not_mind_a_few_very_long_times():
    ours, floors = [2.0] * 20, [1.0] * 20
    ours[3] = 500.0
    floors[11] = 500.0
    judged = of_medians("x", ours, floors, 2.5)
    assert judged.value == 2.0
    assert judged.interval == (2.0, 2.0)


def test_a_slope_is_what_one_more_adds_whatever_was_there_and_whatever_came_once():
    points = [(n, 800.0 + 20 * n) for n in range(10, 110, 10)]
    assert slope(points) == 20
    points[2] = (30, 9999.0)
    judged = slope_of("one more", points, 21.0, "kB")
    assert judged.value == pytest.approx(20, abs=0.5)
    assert judged.interval[0] <= 20 <= judged.interval[1]
    assert judged.figure.endswith("kB")
    assert interval([(n, 5.0 * n) for n in range(1, 11)], slope) == (5, 5)
