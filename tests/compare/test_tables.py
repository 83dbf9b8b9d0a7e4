"""Records → tables: medians, ratios, spreads, and rows of what failed."""

import csv
import io
from typing import Any

import pytest

from gradlite.compare.record import ByCategory, HeldOut, Memory, Record, Spread
from gradlite.compare.tables import (
    NONE,
    Table,
    category_table,
    memory_table,
    quality_table,
    ratio_table,
    to_csv,
    to_markdown,
)


def record(label: str, lr: float = 1e-4, seed: int = 0, loss: float | None = None, **changes: Any) -> Record:
    keys: dict[str, Any] = {
        "experiment": "e",
        "run": f"{label}-{lr}-{seed}",
        "label": label,
        "method": "adamw",
        "model": "m",
        "dataset": "d",
        "dtype": "float32",
        "lr": lr,
        "seed": seed,
        "batch_size": 2,
        "seq_len": 8,
        "steps": 3,
        "schedule": "cosine",
        "warmup_steps": 1,
        "status": "ok",
    }
    if loss is not None:
        keys["held_out"] = [HeldOut(step=0, loss=3.0, seconds=0), HeldOut(step=3, loss=loss, seconds=1)]
    return Record.model_validate({**keys, **changes})


def measured(label: str, gigabytes: float, speed: float, seed: int = 0, **changes: Any) -> Record:
    above = int(gigabytes * 1e9)
    parts = ByCategory(
        weights=10**9, gradients=above // 2, optimizer_state=above // 2, held_activations=0, temporaries=above % 2
    )
    memory = Memory(
        peak_bytes=10**9 + above,
        peak_above_weights_bytes=above,
        by_category_bytes=parts,
        process_peak_above_weights_bytes=2 * above,
    )
    spread = Spread(median=speed, min=speed - 1, max=speed + 1)
    speeds = {"tokens_per_second": spread, "samples_per_second": spread}
    return record(label, seed=seed, **{"memory": memory, **speeds, **changes})


def cell(table: Table, row: str, column: str) -> str:
    return next(cells for cells in table.rows if cells[0] == row)[table.columns.index(column)]


def test_memory_and_throughput() -> None:
    records = [
        *(
            measured("base", gigabytes, speed, seed)
            for seed, (gigabytes, speed) in enumerate([(2.0, 90), (2.1, 100), (9.0, 120)])
        ),
        measured("ours", 0.84, 160),
        record("bad", status="out_of_memory", reason="too much"),
        record("bad", seed=1, status="out_of_memory", reason="too much"),
    ]
    table, ratios = memory_table(records, "T"), ratio_table(records, "R", ["base", "absent"])
    assert cell(table, "base", "Peak above weights (GB)") == "2.100"
    assert cell(table, "base", "Tokens/s (runs' range)") == "90.0–120.0"
    assert cell(table, "base", "Runs") == "3"
    assert cell(ratios, "ours", "Peak ÷ base") == "0.40"
    assert cell(ratios, "ours", "Tokens/s ÷ base") == "1.60"
    assert cell(table, "ours", "Process peak above weights (GB)") == "1.680"
    assert cell(table, "bad", "Peak above weights (GB)") == NONE
    assert cell(ratios, "bad", "Tokens/s ÷ base") == NONE
    assert cell(table, "bad", "Remark") == "out of memory: too much"
    assert cell(table, "bad", "Runs") == "0"
    assert ratios.columns == ("Method", "Peak ÷ base", "Tokens/s ÷ base")
    assert table.notes == ("m on d, float32, 3 steps of 2 × 8 tokens at most.",)


def test_memory_of_a_run_too_short_for_it_is_remarked() -> None:
    table = memory_table([measured("a", 1.0, 1, steps=2), measured("b", 1.0, 1, steps=3)], "T")
    assert cell(table, "a", "Remark").startswith("memory of step 2, not 3: ")
    assert cell(table, "b", "Remark") == ""


def test_bytes_by_category() -> None:
    table = category_table([measured("a", 2.0, 1), record("bad", status="failed", reason="x")], "T")
    assert table.columns[1:] == (
        "Weights (GB)",
        "Gradients (GB)",
        "Optimizer state (GB)",
        "Held activations (GB)",
        "Temporaries (GB)",
    )
    assert table.rows == (("a", "1.000", "1.000", "1.000", "0.000", "0.000"), ("bad", *[NONE] * 5))


def test_quality_takes_the_best_rate_of_the_first_seed_and_the_mean_of_all_seeds() -> None:
    records = [
        record("a", 1e-4, 0, 1.2),
        record("a", 2e-4, 0, 1.0),
        record("a", 4e-4, 0, None, status="failed", reason="diverged"),
        record("b", 1e-4, 0, 1.1, options={"max_grad_norm": None}),
        record("a", 2e-4, 1, 1.4),
        record("b", 1e-4, 1, 1.1, options={"max_grad_norm": None}),
    ]
    by_other_names = sorted(records, key=lambda one: (-one.seed, -one.lr))
    for order in (records, by_other_names):
        table = quality_table(order, "T", ["a"])
        assert cell(table, "a", "Held-out loss by learning rate, first seed (nats/token)") == (
            "0.0001: 1.2000, 0.0002: 1.0000, 0.0004: failed"
        )
        assert cell(table, "a", "Best rate") == "0.0002"
        assert cell(table, "a", "Held-out loss, mean over seeds (nats/token)") == "1.2000"
        assert cell(table, "a", "Lowest–highest seed") == "1.0000–1.4000"
        assert cell(table, "a", "Seeds") == "2"
        assert cell(table, "a", "Remark") == "failed: diverged"
        assert cell(table, "b", "Against a (%)") == "-8.33"
        assert cell(table, "b", "Remark") == "gradients not clipped"
        assert table.notes[-1] == "Held-out loss before training: 3.0000."


def test_the_sweep_is_the_first_seeds_however_many_rates_another_ran() -> None:
    """Seed 0 chose 2e-4 for seed 1, which a later call gave more rates."""
    records = [
        measured("a", 1.0, 10, 0, lr=1e-4, held_out=[HeldOut(step=3, loss=1.2, seconds=1)]),
        measured("a", 2.0, 20, 0, lr=2e-4, held_out=[HeldOut(step=3, loss=1.0, seconds=1)]),
        *(
            measured("a", 4.0, 40, 1, lr=lr, held_out=[HeldOut(step=3, loss=loss, seconds=1)])
            for lr, loss in ((1e-4, 0.8), (2e-4, 0.9), (4e-4, 1.0))
        ),
    ]
    own, most = quality_table(records, "T", first_seed=0), quality_table(records, "T")
    assert cell(own, "a", "Best rate") == "0.0002"
    assert cell(own, "a", "Held-out loss by learning rate, first seed (nats/token)") == "0.0001: 1.2000, 0.0002: 1.0000"
    assert cell(own, "a", "Held-out loss, mean over seeds (nats/token)") == "0.9500"
    assert cell(most, "a", "Best rate") == "0.0001"
    assert cell(quality_table(records, "T", first_seed=7), "a", "Best rate") == "0.0001"  # which ran nothing
    assert cell(memory_table(records, "T", first_seed=0), "a", "Peak above weights (GB)") == "2.000"
    assert cell(category_table(records, "T", first_seed=0), "a", "Gradients (GB)") == "1.000"


def test_a_difference_is_of_the_seeds_that_both_rows_have() -> None:
    records = [
        *(record("a", seed=seed, loss=loss) for seed, loss in enumerate((1.0, 2.0, 9.0))),
        *(record("b", seed=seed, loss=loss) for seed, loss in enumerate((1.1, 2.2))),
        record("c", seed=3, loss=1.0),
    ]
    table = quality_table(records, "T", ["a"])
    assert cell(table, "b", "Against a (%)") == "+10.00"
    assert cell(table, "c", "Against a (%)") == NONE


def test_memory_is_of_runs_with_equal_batches() -> None:
    """Rows of any length: only the first seed's batches are the same for every row; the best rate is the row."""
    losses = {"held_out": [HeldOut(step=3, loss=1.0, seconds=1)]}
    worse = {"held_out": [HeldOut(step=3, loss=2.0, seconds=1)]}
    records = [
        measured("a", 2.0, 100, 0, **losses),
        measured("a", 8.0, 10, 0, lr=2e-4, **worse),
        measured("a", 4.0, 50, 1, **losses),
        measured("b", 1.0, 200, 0, **losses),
    ]
    table = memory_table(records, "T")
    assert (cell(table, "a", "Peak above weights (GB)"), cell(table, "a", "Runs")) == ("2.000", "1")
    assert cell(ratio_table(records, "T", ["a"]), "b", "Peak ÷ a") == "0.50"
    assert cell(category_table(records, "T"), "a", "Gradients (GB)") == "1.000"


def test_the_first_seeds_batches_are_those_of_all_rows() -> None:
    """Also where another seed is lower, and in runs that only measure, of rows of any length."""
    speeds = {"full_rows": False}
    records = [measured("a", 2.0, 100, 3, **speeds), measured("a", 4.0, 50, 0, **speeds), measured("b", 1.0, 200, 3, **speeds)]
    table = memory_table(records, "T", first_seed=3)
    assert [cell(table, row, "Peak above weights (GB)") for row in "ab"] == ["2.000", "1.000"]


def test_several_rates_of_runs_that_only_measure() -> None:
    records = [measured("a", 2.0, 100, lr=2e-4), measured("a", 4.0, 50, lr=1e-4), measured("b", 1.0, 200)]
    table = memory_table(records, "T", first_seed=0)
    assert (cell(table, "a", "Peak above weights (GB)"), cell(table, "a", "Runs")) == ("4.000", "1")
    assert (cell(table, "a", "Remark"), cell(table, "b", "Remark")) == ("at rate 0.0001 of several", "")


@pytest.mark.parametrize(
    ("asked", "options", "remark"),
    [
        (1.0, {"max_grad_norm": None}, "gradients not clipped"),
        (1.0, {"max_grad_norm": None, "clip_grad_norm": 1.0}, ""),
        (0.0, {"max_grad_norm": None}, ""),
        (1.0, {"max_grad_norm": 1.0}, ""),
    ],
)
def test_a_method_that_could_not_clip_is_remarked(asked: float, options: dict[str, Any], remark: str) -> None:
    table = quality_table([record("a", loss=1.0, max_grad_norm=asked, options=options)], "T")
    assert cell(table, "a", "Remark") == remark


def test_held_out_rows_that_are_not_evaluated_are_noted() -> None:
    fewer = record("a", loss=1.0, held_out_rows=200, evaluated_rows=187)
    (_, note, _) = quality_table([fewer, record("b", loss=1.0, held_out_rows=200)], "T").notes
    assert note.startswith("Of 200 held-out rows 187 are evaluated: ")
    assert len(quality_table([record("a", loss=1.0, held_out_rows=9, evaluated_rows=9)], "T").notes) == 2


def test_what_makes_rows_no_fair_comparison_is_noted() -> None:
    same: dict[str, Any] = {"versions": {"torch": "2.13"}, "machine": {"num_threads": 2}}
    records = [record("a", loss=1.0, **same), record("b", loss=1.0, **same), record("c", loss=1.0)]
    assert len(quality_table(records, "T").notes) == 2
    other = record("d", versions={"torch": "2.11", "fira": "1"}, machine={"num_threads": 1})
    strange = other.model_copy(update={"held_out": [HeldOut(step=0, loss=3.1, seconds=0)]})
    assert quality_table([*records, strange], "T").notes[1:-1] == (
        "Not all runs have the same torch: 2.13, 2.11.",
        "Not all runs have the same num threads: 2, 1.",
        "Runs began at different held-out losses (3.000, 3.100): not all had the same model and data.",
    )


def test_huge_pages_of_some_runs_only_are_noted() -> None:
    """Older records do not have the key, nor had their processes the pages."""
    with_them, without = record("a", machine={"huge_pages": True}), record("b", machine={"num_threads": 2})
    assert any("huge pages" in note for note in quality_table([with_them, without], "T").notes)
    older = record("c", machine={"huge_pages": False})
    assert not any("huge pages" in note for note in quality_table([without, older], "T").notes)


def test_a_best_rate_at_the_edge_of_the_sweep_is_remarked() -> None:
    def remark(*losses: float) -> str:
        records = [record("a", lr, loss=loss) for lr, loss in zip((1e-4, 2e-4, 4e-4), losses, strict=False)]
        return cell(quality_table(records, "T"), "a", "Remark")

    assert remark(1.0, 1.1, 1.2) == "best rate is the lowest tried"
    assert remark(1.2, 1.1, 1.0) == "best rate is the highest tried"
    assert remark(1.2, 1.0, 1.1) == ""
    assert remark(1.0, 1.1) == "best rate is the lowest tried"
    assert remark(1.1, 1.0) == "best rate is the highest tried"
    assert remark(1.0) == ""


def test_training_that_did_harm_is_remarked() -> None:
    one_seed = [record("C", seed=0, loss=2.9), record("C", seed=1, loss=3.05)]  # from 3.0; the mean fell
    rose = quality_table([record("A", loss=3.1), record("B", loss=2.9), *one_seed], "t")
    assert [row[-1] for row in rose.rows] == ["held-out loss rose", "", ""]


def test_a_row_without_a_good_run() -> None:
    table = quality_table([record("a", status="failed", reason="x"), record("b", loss=1.0)], "T", ["a"])
    assert cell(table, "a", "Best rate") == NONE
    assert cell(table, "b", "Against a (%)") == NONE


def test_a_hair_less_is_no_negative_zero() -> None:
    table = quality_table([record("a", loss=2.0), record("b", loss=1.99999)], "T", ["a"])
    assert cell(table, "b", "Against a (%)") == "+0.00"


def test_what_is_to_be_known_of_a_good_run_is_remarked() -> None:
    table = quality_table([record("a", loss=1.0, reason="2 steps were skipped")], "T")
    assert cell(table, "a", "Remark") == "2 steps were skipped"


def test_markdown_and_csv() -> None:
    table = Table("T", ("a", "b (GB)"), (("x|y", "1,5"),), ("Note.",))
    assert to_markdown(table) == "## T\n\n| a | b (GB) |\n| --- | --- |\n| x\\|y | 1,5 |\n\nNote.\n"
    assert list(csv.reader(io.StringIO(to_csv(table)))) == [["a", "b (GB)"], ["x|y", "1,5"]]
