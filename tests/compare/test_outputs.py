"""Files beside the records: tables, and figures where there is something to draw."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from gradlite.compare.experiment import Experiment, load_experiment
from gradlite.compare.figures import memory_bars
from gradlite.compare.outputs import draw_figures, tables_of, write_tables
from gradlite.compare.record import ByCategory, Curve, HeldOut, Memory, Record, Spread
from gradlite.compare.runs import sweep


@pytest.fixture
def quality() -> Experiment:
    return load_experiment("paper-small-quality", {"learning_rates": [1e-4], "seeds": [0], "steps": 30})


@pytest.fixture
def records(quality: Experiment) -> list[Record]:
    """One run a method, the last one failed."""
    found = []
    for number, spec in enumerate(sweep(quality)):
        parts = ByCategory(
            weights=10**9,
            gradients=number * 10**8,
            optimizer_state=2 * 10**8,
            held_activations=10**8,
            temporaries=10**8,
        )
        total = sum(parts.model_dump().values())
        found.append(
            spec.record(
                "ok",
                curve=Curve(
                    step=list(range(1, 31)),
                    train_loss=[None if step == 7 else 2 - 0.01 * step * (1 + number / 9) for step in range(30)],
                    seconds=[step * (1.0 + number) for step in range(30)],
                ),
                held_out=[HeldOut(step=0, loss=2.0, seconds=0), HeldOut(step=30, loss=1.5 + number / 100, seconds=30)],
                memory=Memory(peak_bytes=total, peak_above_weights_bytes=total - 10**9, by_category_bytes=parts),
                tokens_per_second=Spread(median=100 + 20 * number, min=90, max=400),
            )
        )
    return [*found[:-1], sweep(quality)[-1].record("failed", "no such package")]


def test_tables_are_files(tmp_path: Path, quality: Experiment, records: list[Record]) -> None:
    other = load_experiment("paper-small-memory")
    write_tables(tmp_path / "new", [quality, other], records)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["paper-small-quality.csv", "tables.md"]
    text = (tmp_path / "new" / "tables.md").read_text()
    assert "## Held-out loss" in text
    assert "| failed: no such package |" in text
    memory = [spec.record("ok") for spec in sweep(other)[:2]]
    assert list(tables_of([quality, other], [*records, *memory])) == [
        "paper-small-quality",
        "paper-small-memory",
        "paper-small-memory-ratios",
        "paper-small-memory-categories",
    ]


def test_the_first_seed_of_the_tables_is_the_runs(quality: Experiment, records: list[Record]) -> None:
    other = records[0].model_copy(update={"seed": 1, "run": "x"})
    more = [other.model_copy(update={"lr": lr, "run": f"{lr}"}) for lr in (1e-3, 2e-3)]
    (table,) = tables_of([quality], [records[0], other, *more]).values()
    assert table.rows[0][1] == "0.0001: 1.5000"


def test_a_memory_experiment_without_baselines_has_no_ratios() -> None:
    own = load_experiment("paper-small-memory", {"baselines": []})
    assert list(tables_of([own], [sweep(own)[0].record("ok")])) == ["paper-small-memory", "paper-small-memory-categories"]


def test_tables_show_the_records_of_their_work_alone(quality: Experiment, records: list[Record]) -> None:
    """In the order of the experiment, whatever the order of the records; methods that were added come last."""
    added = records[0].model_copy(update={"label": "foam", "method": "foam", "options": {}})
    longer = records[1].model_copy(update={"steps": 31})
    (table,) = tables_of([quality], [added, longer, *reversed(records)]).values()
    assert [row[0] for row in table.rows] == [*(entry.label for entry in quality.methods), "foam"]
    assert table.rows[1][5] == "1"  # the longer run is no second one of this row


def test_bars_are_of_one_run_and_show_the_whole_peak(records: list[Record]) -> None:
    """Of three runs the one in the middle, not parts of all of them; added weights are a part, too."""

    def run(seed: int, gradients: int, state: int, adapter: int) -> Record:
        parts = ByCategory(
            weights=10**9 + adapter, gradients=gradients, optimizer_state=state, held_activations=0, temporaries=0
        )
        above = gradients + state + adapter
        memory = Memory(peak_bytes=10**9 + above, peak_above_weights_bytes=above, by_category_bytes=parts)
        return records[0].model_copy(
            update={"seed": seed, "memory": memory, "held_out": [], "full_rows": True, "run": f"r{seed}"}
        )

    runs = [run(0, 10**9, 5 * 10**9, 0), run(1, 2 * 10**9, 10**9, 5 * 10**8), run(2, 10**8, 10**8, 0)]
    assert memory_bars(runs) == {records[0].name: [2.0, 1.0, 0.0, 0.0, 0.5]}


def test_figures_are_drawn_of_what_was_measured(tmp_path: Path, quality: Experiment, records: list[Record]) -> None:
    drawn = draw_figures(tmp_path, [quality], records)
    assert [path.name for path in drawn] == [f"paper-small-quality-{name}.png" for name in ("memory", "losses", "trade-off")]
    for path in drawn:
        assert imread(path).std() > 0.01  # something is on it
    assert draw_figures(tmp_path, [quality], records[-1:]) == []


def test_a_memory_experiment_has_no_curves(tmp_path: Path, records: list[Record]) -> None:
    memory = load_experiment("paper-small-memory")
    measured: dict[str, Any] = {"memory": records[0].memory, "tokens_per_second": records[0].tokens_per_second}
    own = [spec.record("ok", **measured) for spec in sweep(memory)]
    names = [path.name for path in draw_figures(tmp_path, [memory], own)]
    assert names == ["paper-small-memory-memory.png", "paper-small-memory-trade-off.png"]
