"""Which records a row of a page stands for."""

from collections.abc import Callable

import pytest

from gradlite.compare.record import Record
from gradlite.report.rows import group

Make = Callable[..., Record]


def test_other_work_under_the_same_name_is_a_group_of_its_own(record: Make) -> None:
    records = [record(model=model, seed=seed, loss=loss) for model, loss in (("small", 2.5), ("big", 1.5)) for seed in (0, 1)]
    groups = group([*records, record(experiment="alone")])
    assert [one.experiment for one in groups] == ["trial, model small", "trial, model big", "alone"]
    means = [one.rows[0].loss.mean for one in groups[:2] if one.rows[0].loss]
    assert means == [2.5, 1.5]


def test_what_older_records_do_not_say_tells_nothing_apart(record: Make) -> None:
    old, new = record(seed=0), record(seed=1, held_out_rows=64, model_fingerprint="a")
    other = record(seed=2, held_out_rows=256, model_fingerprint="a")
    first, second = group([old, new, other])
    assert [one.seed for one in first.rows[0].runs] == [0, 1]
    assert [one.seed for one in second.rows[0].runs] == [2]
    assert (first.experiment, second.experiment) == ("trial, held out rows 64", "trial, held out rows 256")


def test_a_record_that_is_given_twice_counts_once(record: Make) -> None:
    (only,) = group([record(), record(seed=1), record()])
    assert [one.seed for one in only.rows[0].runs] == [0, 1]


@pytest.mark.parametrize(("full_rows", "peak"), [(True, 300), (False, 200)])
def test_memory_is_compared_on_equal_batches(record: Make, full_rows: bool, peak: int) -> None:
    """Where rows differ in length, seeds have batches of their own, and other rows may have the first seed only."""
    peaks = {0: 200, 1: 300, 2: 400}
    (only,) = group([record(seed=seed, peak=of_seed, full_rows=full_rows) for seed, of_seed in peaks.items()])
    assert only.rows[0].peak_above_weights_bytes == peak


def test_two_runs_of_one_seed_are_one_seed(record: Make) -> None:
    """The last one counts, as in the tables."""
    (only,) = group([record(run="one", loss=2.0), record(run="two", loss=3.0)])
    found = only.rows[0].loss
    assert found is not None
    assert (found.mean, found.count) == (3.0, 1)
