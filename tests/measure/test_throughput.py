"""Rates of steps."""

from gradlite.measure.throughput import Rates, rates


def test_median_and_spread() -> None:
    assert rates([10, 20, 30], [1.0, 1.0, 6.0]) == Rates(median=10.0, min=5.0, max=20.0)
    assert rates([], []) is None
