"""A comparison as a whole: processes, records, going on after a stop, and rows of methods that fail."""

import io
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gradlite.compare import dry_run
from gradlite.compare import runner as runner_module
from gradlite.compare.dry_run import show_runs
from gradlite.compare.experiment import PRESETS, Experiment, load_experiment
from gradlite.compare.record import HeldOut, Record, read_record, write_record
from gradlite.compare.runner import Runner
from gradlite.compare.runs import RunSpec, sweep
from gradlite.errors import GradLiteError
from gradlite.methods import check_options
from gradlite.train.words import in_time

MakeSpec = Callable[..., RunSpec]
Process = Callable[[Sequence[str], Any, Callable[[Mapping[str, Any]], None]], int]


def experiment(model_dir: Path, sums: Path, **changes: object) -> Experiment:
    work = {
        "model": str(model_dir),
        "dataset": str(sums),
        "held_out_from_last": 10,
        "held_out_rows": 2,
        "dtype": "float32",
        "seq_len": 96,
        "steps": 2,
        "learning_rates": [1e-3],
        "seeds": [0, 1],
        "methods": [{"label": "AdamW", "method": "adamw"}, {"label": "GradLite", "method": "gradlite"}],
        "baselines": ["AdamW"],
    }
    return load_experiment("paper-small-quality", {**work, **changes})


def make_runner(directory: Path, screen: io.StringIO | None = None, retry_failed: bool = False) -> Runner:
    console = Console(file=screen or io.StringIO(), width=200)
    return Runner(directory, "gradlite compare", console, lambda _: None, retry_failed)


class Workers:
    """In the place of processes: writes the record that is asked for, or none and an exit code."""

    def __init__(self, outcome: Callable[[RunSpec], Record | int]) -> None:
        self.outcome = outcome
        self.runs: list[str] = []

    def __call__(self, command: Sequence[str], errors: Any, on_step: Callable[[Mapping[str, Any]], None]) -> int:
        spec = RunSpec.model_validate_json(Path(command[3]).read_text())
        self.runs.append(spec.run)
        on_step({"step": 1, "loss": 2.0, "tokens_per_second": 10.0, "peak_bytes": 10})
        outcome = self.outcome(spec)
        if isinstance(outcome, int):
            errors.write("a trace\nthe last line\nnotice: 3 rows were left out.\n")
            errors.flush()
            return outcome
        write_record(Path(command[4]), outcome)
        return 0


def good(spec: RunSpec) -> Record:
    return spec.record("ok", held_out=[HeldOut(step=spec.steps, loss=1.0, seconds=1.0)])


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[RunSpec], Record | int]], Workers]:
    def install(outcome: Callable[[RunSpec], Record | int]) -> Workers:
        made = Workers(outcome)
        monkeypatch.setattr(runner_module, "_run_process", made)
        return made

    return install


def records_in(output_dir: Path) -> list[Record]:
    return [read_record(path) for path in sorted((output_dir / "records").glob("*.json"))]


Install = Callable[[Callable[[RunSpec], Record | int]], Workers]


@pytest.mark.slow
def test_a_real_comparison_and_its_continuation(tmp_path: Path, model_dir: Path, sums: Path) -> None:
    work, screen = experiment(model_dir, sums, seeds=[0]), io.StringIO()
    records = make_runner(tmp_path, screen).run([work])
    assert [(record.label, record.status) for record in records] == [("AdamW", "ok"), ("GradLite", "ok")]
    assert sorted(record.run for record in records) == [record.run for record in records_in(tmp_path)]
    assert "run 2 of 2  GradLite  rate 0.001  seed 0" in screen.getvalue()
    assert make_runner(tmp_path).run([work]) == records


def test_runs_that_have_a_record_are_not_done_again(tmp_path: Path, model_dir: Path, sums: Path, workers: Install) -> None:
    work = experiment(model_dir, sums)
    stopped = workers(lambda spec: good(spec) if spec.label == "AdamW" else _interrupt())
    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path).run([work])
    assert len(stopped.runs) == 2
    second = workers(good)
    records = make_runner(tmp_path).run([work])
    assert [record.run.removeprefix("paper-small-quality-") for record in records] == [
        "adamw-lr0.001-seed0",
        "gradlite-lr0.001-seed0",
        "adamw-lr0.001-seed1",
        "gradlite-lr0.001-seed1",
    ]
    assert second.runs == [record.run for record in records[1:]]


def _interrupt() -> int:
    raise KeyboardInterrupt


def test_a_method_that_fails_keeps_its_row_and_is_tried_again_only_when_asked(
    tmp_path: Path, model_dir: Path, sums: Path, workers: Install
) -> None:
    work = experiment(model_dir, sums)
    workers(lambda spec: -signal.SIGKILL if spec.label == "AdamW" else 3)
    first, second = make_runner(tmp_path).run([work])
    assert (first.status, first.label) == ("out_of_memory", "AdamW")
    assert first.reason is not None
    assert "SIGKILL" in first.reason
    assert (second.status, second.reason) == ("failed", "the process ended with exit code 3: the last line")
    again = workers(good)
    assert [record.status for record in make_runner(tmp_path).run([work])] == ["out_of_memory", "failed"]
    assert again.runs == []
    assert {record.status for record in make_runner(tmp_path, retry_failed=True).run([work])} == {"ok"}
    assert len(again.runs) == 4


def test_what_no_run_can_have_stops_everything(tmp_path: Path, model_dir: Path, sums: Path, workers: Install) -> None:
    only = workers(lambda _: 2)
    with pytest.raises(GradLiteError, match="the last line"):
        make_runner(tmp_path).run([experiment(model_dir, sums)])
    assert len(only.runs) == 1


def test_records_of_other_work_are_refused(tmp_path: Path, model_dir: Path, sums: Path, workers: Install) -> None:
    workers(good)
    make_runner(tmp_path).run([experiment(model_dir, sums)])
    with pytest.raises(GradLiteError, match=r"is the record of other work \(its steps differ: 2, not 3\)"):
        make_runner(tmp_path).run([experiment(model_dir, sums, steps=3)])


def test_a_failed_run_is_done_anew_with_a_corrected_option(
    tmp_path: Path, model_dir: Path, sums: Path, workers: Install
) -> None:
    def work(**options: object) -> Experiment:
        row = {"label": "LoRA", "method": "lora", "options": options}
        return experiment(model_dir, sums, methods=[row], baselines=[], seeds=[0])

    workers(lambda spec: spec.record("failed", "no such option"))
    make_runner(tmp_path).run([work(rank=300)])
    again = workers(good)
    with pytest.raises(
        GradLiteError,
        match=r"its options differ: \{'rank': 300\}, not \{'rank': 3\}\); choose another --output-dir, or give --retry-failed",
    ):
        make_runner(tmp_path).run([work(rank=3)])
    (record,) = make_runner(tmp_path, retry_failed=True).run([work(rank=3)])
    assert (record.status, record.options["rank"]) == ("ok", 3)
    assert len(again.runs) == 1
    with pytest.raises(GradLiteError, match=r"its options differ: .*\); choose another --output-dir, or delete it"):
        make_runner(tmp_path, retry_failed=True).run([work(rank=4)])


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"method": "lora", "options": {"rnk": 3}},
            r"^paper-small-quality, row 'A': method 'lora' has no option 'rnk'; did you mean 'rank'\?$",
        ),
        (
            {"method": "lora", "options": {"rank": -4}},
            r"^paper-small-quality, row 'A': method 'lora': rank is -4, but it should be greater than or equal to 1",
        ),
        (
            {"method": "gradlite", "options": {"hold": "int9"}},
            r"^paper-small-quality, row 'A': method 'gradlite': hold is 'int9', but it should be 'exact',",
        ),
        ({"method": "gradlite", "options": {"rank": -4}}, r"rank"),
        (
            {"method": "gradlite", "options": {"checkpointing": True}},
            r"^paper-small-quality, row 'A': method 'gradlite' has no option 'checkpointing'; known",
        ),
        ({"method": "adamw", "options": {"lr": 1e-3}}, r"^paper-small-quality, row 'A': method 'adamw' has no option 'lr'"),
        (
            {"method": "gradlite", "options": {"refresh_interval": 0}},
            r"^paper-small-quality, row 'A': refresh_interval must be a whole number from 1, not 0",
        ),
        (
            {"method": "gradlite", "options": {"betas": [0.9, 1.5]}},
            r"^paper-small-quality, row 'A': betas must be two numbers in \[0, 1\)",
        ),
        (
            {"method": "gradlite", "options": {"basis": "random", "feedback": "feedback"}},
            r"^paper-small-quality, row 'A': basis=\"random\" never moves",
        ),
        (
            {"method": "ia3", "options": {"weight_decay": 0.1}},
            r"^paper-small-quality, row 'A': method 'ia3' has no use for weight decay",
        ),
    ],
)
def test_options_are_checked_before_anything_runs(
    tmp_path: Path, model_dir: Path, sums: Path, workers: Install, row: dict[str, object], sentence: str
) -> None:
    work, only = experiment(model_dir, sums, methods=[{"label": "A", **row}], baselines=[]), workers(good)
    with pytest.raises(GradLiteError, match=sentence):
        make_runner(tmp_path).run([work])
    with pytest.raises(GradLiteError, match=sentence):
        show_runs([work], tmp_path, Console(file=io.StringIO()))
    assert only.runs == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "./nowhere"}, r"^model '\./nowhere' is not a directory with a config\.json"),
        ({"dataset": "nowhere.jsonl"}, r"^dataset 'nowhere\.jsonl' does not exist"),
        ({"held_out_from_last": 40}, r"^dataset '.*sums\.jsonl' has 40 rows, and held_out_from_last puts 40 aside"),
        ({}, r"file' is not a directory that can be written to; choose another --output-dir\.$"),
    ],
)
def test_places_are_checked_before_anything_is_made(
    tmp_path: Path, model_dir: Path, sums: Path, workers: Install, changes: dict[str, Any], sentence: str
) -> None:
    work, only = experiment(model_dir, sums, **changes), workers(good)
    (tmp_path / "file").touch()
    directory = tmp_path / ("out" if changes else "file")
    if "held_out_from_last" not in changes:  # a run reads the data itself
        with pytest.raises(GradLiteError, match=sentence):
            make_runner(directory).run([work])
    with pytest.raises(GradLiteError, match=sentence):
        show_runs([work], directory, Console(file=io.StringIO()))
    assert (only.runs, {path.name for path in tmp_path.iterdir()}) == ([], {"file", "sums.jsonl"})


def test_the_options_of_shipped_experiments_are_accepted() -> None:
    for names in PRESETS.values():
        for name in names.values():
            for entry in load_experiment(name).methods:
                check_options(entry.method, entry.options)


def test_the_count_of_runs_covers_all_experiments(tmp_path: Path, model_dir: Path, sums: Path, workers: Install) -> None:
    workers(good)
    first = experiment(model_dir, sums)
    second = experiment(model_dir, sums, name="other", seeds=[0], steps=3)
    screen = io.StringIO()
    make_runner(tmp_path, screen).run([first, second])
    shown = [line.split("  ")[0] for line in screen.getvalue().splitlines()]
    assert shown == [f"run {number} of 6" for number in range(1, 7) for _ in range(2)]


def test_work_that_another_experiment_has_done_is_not_done_again(
    tmp_path: Path, model_dir: Path, sums: Path, workers: Install
) -> None:
    workers(good)
    done = make_runner(tmp_path).run([experiment(model_dir, sums)])
    same = {"label": "defaults", "method": "gradlite"}
    other = {"label": "rank 8", "method": "gradlite", "options": {"rank": 8}}
    second = experiment(model_dir, sums, name="other", methods=[same, other], baselines=["defaults"])
    again = workers(good)
    records = make_runner(tmp_path).run([second])
    assert again.runs == [record.run for record in records if record.label == "rank 8"]
    taken = next(record for record in records if record.label == "defaults")
    original = next(record for record in done if record.label == "GradLite" and record.seed == 0)
    names = {"experiment": "other", "run": "other-defaults-lr0.001-seed0", "label": "defaults", "taken_from": original.run}
    assert taken == original.model_copy(update=names)
    assert taken in records_in(tmp_path)

    (tmp_path / "records" / f"{original.run}.json").unlink()  # to do it anew: what was taken from it must not bring it back
    anew = workers(good)
    make_runner(tmp_path).run([experiment(model_dir, sums)])
    assert anew.runs == [original.run]
    (tmp_path / "records" / f"{original.run}.json").unlink()
    alone = workers(good)
    make_runner(tmp_path).run([second])
    assert alone.runs == [taken.run]


def test_tables_are_given_all_that_is_there(tmp_path: Path, model_dir: Path, sums: Path, workers: Install) -> None:
    workers(good)
    work = experiment(model_dir, sums)
    make_runner(tmp_path).run([work])
    given: list[Sequence[Record]] = []
    part = work.model_copy(update={"methods": work.methods[:1]})
    Runner(tmp_path, "", Console(file=io.StringIO()), given.append).run([part])
    assert {record.label for record in given[0]} == {"AdamW", "GradLite"}
    assert len(given[-1]) == 4


def test_tables_show_what_another_call_wrote_meanwhile(tmp_path: Path, model_dir: Path, sums: Path, workers: Install) -> None:
    work = experiment(model_dir, sums, seeds=[0])
    ours, theirs = sweep(work)
    write_record(tmp_path / "records", ours.record("ok"))
    part = work.model_copy(update={"methods": work.methods[1:]})
    read: list[int] = []

    def other_call_writes(spec: RunSpec) -> Record:
        write_record(tmp_path / "records", good(ours))
        write_record(tmp_path / "records", good(ours).model_copy(update={"run": "later"}))
        return good(spec)

    given: list[Sequence[Record]] = []
    runner = Runner(tmp_path, "", Console(file=io.StringIO()), given.append)
    read.append(len(runner.records))
    workers(other_call_writes)
    runner.run([part])
    assert read == [1]
    assert {record.run: len(record.held_out) for record in given[-1]} == {ours.run: 1, theirs.run: 1, "later": 1}
    (tmp_path / "records" / "later.json").unlink()
    assert {record.run for record in runner.records} == {ours.run, theirs.run}


def test_an_interrupted_worker_is_ended(make_spec: MakeSpec, tmp_path: Path) -> None:
    """The process itself is interrupted while its worker waits: the worker must be gone afterwards."""
    program = (
        "import os, signal, sys\nfrom gradlite.compare.runner import _run_process\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which is ignored in a shell's background
        'worker = \'import os, time; print("step {}", flush=True); open(%r, "w").write(str(os.getpid())); time.sleep(60)\'\n'
        "try:\n    _run_process([sys.executable, '-c', worker % sys.argv[1]], sys.stderr, lambda step: None)\n"
        "except KeyboardInterrupt:\n    print('stopped')"
    )
    note = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", program, str(note)], stdout=subprocess.PIPE, text=True)
    try:
        while not (note.exists() and note.read_text()):
            assert parent.poll() is None
            time.sleep(0.01)
        parent.send_signal(signal.SIGINT)
        out, _ = parent.communicate(timeout=30)
    finally:
        parent.kill()
    assert out == "stopped\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_sweeps_are_checked_before_anything_runs(tmp_path: Path, model_dir: Path, sums: Path, workers: Install) -> None:
    work = experiment(model_dir, sums)
    broken = tmp_path / "records" / f"{sweep(work)[-1].run}.json"
    broken.parent.mkdir()
    broken.write_text("{")
    only = workers(good)
    with pytest.raises(GradLiteError, match="is no whole record"):
        make_runner(tmp_path).run([work])
    assert only.runs == []


def test_a_dry_run_lists_what_is_due_and_does_nothing(model_dir: Path, sums: Path, tmp_path: Path) -> None:
    work = experiment(model_dir, sums)
    done, failed = sweep(work)
    write_record(tmp_path / "records", done.record("ok", held_out=[HeldOut(step=2, loss=1.0, seconds=1.0)]))
    write_record(tmp_path / "records", failed.record("failed", "no luck"))
    before = sorted(tmp_path.rglob("*"))
    shown = {}
    for retry in (False, True):
        screen = io.StringIO()
        show_runs([work], tmp_path, Console(file=screen, width=200), retry)
        shown[retry] = screen.getvalue()
    assert done.run not in shown[True]
    assert f"{failed.run} " not in shown[False]
    assert f"{failed.run} " in shown[True]
    assert "adamw-lr0.001-seed1" in shown[False]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_lists_shared_work_once_and_no_seeds_of_a_sweep_that_is_not_done(
    model_dir: Path, sums: Path, tmp_path: Path
) -> None:
    row = {"label": "GradLite", "method": "gradlite"}
    work = experiment(model_dir, sums, methods=[row], learning_rates=[1e-3, 2e-3], baselines=[])
    other = experiment(
        model_dir, sums, name="other", methods=[{**row, "label": "same"}], learning_rates=[1e-3, 2e-3], baselines=[]
    )
    screen = io.StringIO()
    show_runs([work, other], tmp_path, Console(file=screen, width=200))
    assert "other-same" not in screen.getvalue()
    write_record(tmp_path / "records", good(sweep(work)[0]))
    screen = io.StringIO()
    show_runs([work], tmp_path, Console(file=screen, width=200))
    assert f"{sweep(work)[1].run} " in screen.getvalue()
    assert "seed1" not in screen.getvalue()
    assert "1 more at the best rate of each sweep" in screen.getvalue()


def test_other_work_of_the_same_experiment_is_refused(tmp_path: Path, model_dir: Path, sums: Path, workers: Install) -> None:
    """Whatever its rate, under which its file has another name: its rows would be left out of the tables."""
    workers(good)
    make_runner(tmp_path).run([experiment(model_dir, sums)])
    with pytest.raises(GradLiteError, match=r"of other work \(its steps differ: 2, not 3\); choose another --output-dir"):
        make_runner(tmp_path).check([experiment(model_dir, sums, steps=3, learning_rates=[2e-3])])
    make_runner(tmp_path).check([experiment(model_dir, sums, learning_rates=[2e-3])])
    make_runner(tmp_path).check([experiment(model_dir, sums, name="other", steps=3)])


def test_a_dry_run_adds_up_each_experiments_own_speed(
    model_dir: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {torch.float32: 1e9, torch.bfloat16: 1e6}
    monkeypatch.setattr(dry_run, "_operations_per_second", speeds.__getitem__)
    monkeypatch.setattr(dry_run, "_size_and_loading", lambda *_: (1000, 7.0))
    works = [experiment(model_dir, sums, name=dtype, dtype=dtype) for dtype in ("float32", "mixed")]
    tokens, evaluated = 4 * 2 * 4 * 96, 4 * 2 * 2 * 96  # in 4 runs: 2 steps of 4 rows; 2 rows before and after
    in_products = [1.5 * 1000 * (6 * tokens + 2 * evaluated) / speed for speed in speeds.values()]
    screen = io.StringIO()
    dry_run.show_runs(works, tmp_path, Console(file=screen, width=200))
    assert f"8 runs, {2 * tokens:,} tokens at most; about {in_time(8 * 7 + sum(in_products))} " in " ".join(
        screen.getvalue().split()
    )


@pytest.mark.parametrize(("seconds", "num_products"), [(2.0, 1), (0.25, 4), (1e-6, 20)])
def test_the_speed_of_products_is_found_in_a_moment(monkeypatch: pytest.MonkeyPatch, seconds: float, num_products: int) -> None:
    """Where one in bfloat16 takes seconds, one is enough."""
    reads = itertools.count()
    monkeypatch.setattr("gradlite.compare.dry_run.time.perf_counter", lambda: next(reads) * seconds)
    assert dry_run._operations_per_second(torch.float32) == pytest.approx(2 * 1024**3 / seconds)
    assert next(reads) == 2 * num_products


def test_tables_forget_a_run_that_is_begun_anew(tmp_path: Path, model_dir: Path, sums: Path, workers: Install) -> None:
    """It may be interrupted."""
    work = experiment(model_dir, sums)
    workers(lambda spec: spec.record("failed", "no luck"))
    make_runner(tmp_path).run([work])
    workers(good)
    seen: list[set[str]] = []
    runner = Runner(tmp_path, "", Console(file=io.StringIO()), lambda records: seen.append({one.run for one in records}), True)
    runner.run([work])
    first, second = (spec.run for spec in sweep(work))
    assert seen[:2] == [{second}, {first, second}]


def test_a_dry_run_tells_a_memory_experiment_with_too_few_steps(model_dir: Path, sums: Path, tmp_path: Path) -> None:
    for steps, kind, told in ((2, "memory", True), (3, "memory", False), (2, "quality", False)):
        screen = io.StringIO()
        work = experiment(model_dir, sums, steps=steps, kind=kind)
        show_runs([work], tmp_path, Console(file=screen, width=200))
        assert ("paper-small-quality: memory of step 2, not 3" in screen.getvalue()) == told
