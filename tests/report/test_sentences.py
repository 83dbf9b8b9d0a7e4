"""Every sentence is made of the records' numbers, and only of those that are there."""

from collections.abc import Callable
from typing import Any

from gradlite.compare.record import Record
from gradlite.report.read import TrainedRun, read
from gradlite.report.rows import group
from gradlite.report.sentences import of_group, of_run
from gradlite.report.training import sections

Make = Callable[..., Record]


def test_best_least_fastest_and_failed(record: Make) -> None:
    records = [
        record("AdamW", "adamw", loss=1.0, peak=900, speed=100.0),
        *(record("Ours", "gradlite", loss=loss, peak=300, speed=150.0, seed=seed) for seed, loss in enumerate((0.9, 0.96))),
        record("Ours", "gradlite", loss=1.5, lr=1e-3),
        record("Small", "lora", loss=1.2, peak=200, speed=300.0),
        record("Big", "galore", status="out_of_memory", reason="killed.", memory=None, tokens_per_second=None, held_out=[]),
    ]
    said = of_group(group(records)[0])
    assert said == [
        "4 methods, 6 runs, tiny on sums, float32, batches of 2 × 8 tokens, 30 steps.",
        "Lowest held-out loss: Ours with 0.9300 nats per token (learning rate 0.0001, mean of 2 seeds); "
        "next is AdamW with 1.0000.",
        "Least peak memory: Small with 300 bytes, 200 bytes above the weights; AdamW has 1 kB.",
        "Fastest: Small with 300 tokens/s; AdamW has 100.",
        "1 of 6 runs has no result: Big (out of memory: killed).",
    ]


def test_nothing_is_said_of_what_was_not_measured(record: Make) -> None:
    bare = record(memory=None, tokens_per_second=None, held_out=[])
    assert of_group(group([bare])[0]) == ["1 method, 1 run, tiny on sums, float32, batches of 2 × 8 tokens, 30 steps."]


def test_overlapping_seeds_are_told(record: Make) -> None:
    first = [record("A", loss=loss, seed=seed) for seed, loss in enumerate((1.0, 1.2))]
    second = [record("B", loss=loss, seed=seed) for seed, loss in enumerate((1.19, 1.3))]
    assert "their seeds overlap" in of_group(group([*first, *second])[0])[1]


def test_a_run(run_folder: Any) -> None:
    run = read([run_folder()])
    assert isinstance(run, TrainedRun)
    assert of_run(run) == [
        "tiny on sums, 30 steps: finished.",
        "The held-out loss (77 tokens) fell from 2.0000 to 1.0000 nats per token (−50.0 %).",
        "Peak memory 1 GB; 100 tokens/s at the end; 1:01 in all.",
        "At step 30 the bases held 80.0 % of the gradient's energy, the mean over layers; least in layer 10, 60.0 %.",
    ]


def test_a_run_that_only_began(run_folder: Any) -> None:
    run = read([run_folder(metrics=[{"step": 0, "eval_loss": 2.0}], status="running")])
    assert isinstance(run, TrainedRun)
    assert of_run(run) == ["tiny on sums, 0 steps: not finished, as far as metrics.jsonl goes."]


def test_skipped_steps_are_steps_too(run_folder: Any) -> None:
    skipped = [{"step": step, "loss": None, "skipped_steps": step} for step in range(1, 5)]
    run = read([run_folder(metrics=[{"step": 0, "eval_loss": 2.0}, *skipped])])
    assert isinstance(run, TrainedRun)
    assert of_run(run)[0] == "tiny on sums, 4 steps: finished."


def test_a_run_of_another_method_names_it_and_leaves_out_what_is_not_its(run_folder: Any) -> None:
    folder = run_folder()
    own = (folder / "config.yaml").read_text() + "refresh_interval: 5\n"
    for method, shown in (("gradlite", True), ("lora", False)):
        (folder / "config.yaml").write_text(f"{own}method: {method}\nlora_rank: 8\n")
        run = read([folder])
        assert isinstance(run, TrainedRun)
        assert of_run(run)[0] == f"tiny on sums, method {method}, 30 steps: finished."
        (settings,) = sections(run)[0].folded
        keys = [row[0] for row in settings.rows]
        assert ("refresh_interval" in keys) is shown
        assert {"method", "lora_rank", "lr"} <= set(keys)
