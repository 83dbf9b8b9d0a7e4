"""`gradlite compare`: flags become experiments, a mistake is one sentence, an interrupted comparison says how to go on."""

import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gradlite.cli.app import main
from gradlite.compare import dry_run as dry_run_module
from gradlite.compare import runner as runner_module
from gradlite.compare.experiment import Experiment
from gradlite.compare.record import HeldOut, Record
from gradlite.compare.runs import sweep
from gradlite.errors import GradLiteError

Call = Callable[..., tuple[int, str, str]]


class FakeRunner:
    """Has every run of the sweeps done at once."""

    seen: ClassVar[list[Experiment]] = []
    command = ""
    output_dir = Path()
    error: BaseException | None = None
    records: ClassVar[list[Record]] = []
    retry_failed = False

    def __init__(self, output_dir: Path, command: str, _console: object, on_record: object, retry_failed: bool) -> None:
        assert callable(on_record)
        self.on_record = on_record
        type(self).command, type(self).output_dir, type(self).retry_failed = command, output_dir, retry_failed

    def run(self, experiments: Sequence[Experiment]) -> list[Record]:
        type(self).seen = list(experiments)
        if self.error is not None:
            raise self.error
        records = [
            spec.record("ok", held_out=[HeldOut(step=spec.steps, loss=1.0, seconds=1.0)])
            for experiment in experiments
            for spec in sweep(experiment)
        ]
        type(self).records = records
        self.on_record(records)
        return records


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner_module, "Runner", FakeRunner)
    monkeypatch.setattr(FakeRunner, "error", None)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradlite", "compare", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_without_flags_the_papers_three_tables(call: Call) -> None:
    code, out, err = call()
    assert (code, err) == (0, "")
    assert [experiment.kind for experiment in FakeRunner.seen] == ["memory", "quality", "ablation"]
    assert FakeRunner.output_dir == Path("runs/compare/paper-small")
    assert (FakeRunner.output_dir / "tables.md").is_file()
    assert "Held-out loss" in out


def test_flags_override_the_preset(call: Call, tmp_path: Path) -> None:
    data = tmp_path / "secret" / "mine.jsonl"
    flags = "--tables 2,3 --methods adamw,gradlite --steps 7 --lr 1e-4,3e-4 --seeds 5 --batch-size 2 --seq-len 64"
    code, _, _ = call(*flags.split(), f"--dataset={data}", "--model", "some/model", "--output-dir", str(tmp_path / "out"))
    assert code == 0
    quality, ablation = FakeRunner.seen
    assert [entry.method for entry in quality.methods] == ["adamw", "gradlite"]
    assert {entry.method for entry in ablation.methods} == {"gradlite"}
    assert (quality.steps, quality.seeds, quality.batch_size, quality.seq_len) == (7, [5], 2, 64)
    assert quality.rates_of(quality.methods[0]) == [1e-4, 3e-4]
    assert (quality.dataset, quality.model) == (str(data), "some/model")
    assert FakeRunner.command == f"gradlite compare {flags} --dataset=mine.jsonl --model some/model --output-dir out"


def test_an_experiment_file(call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(json.dumps({"methods": [{"label": "A", "method": "adamw"}], "steps": 3}))
    code, _, _ = call("--experiment", "mine.yaml")
    assert code == 0
    assert [(one.name, one.steps) for one in FakeRunner.seen] == [("mine", 3)]
    assert FakeRunner.output_dir == Path("runs/compare/mine")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--preset paper", "there is no preset 'paper'"),
        ("--methods adamv", "unknown method 'adamv'; did you mean 'adamw'?"),
        ("--methods zzz", "unknown method 'zzz'; known are adamw,"),
        ("--methods adamw,lora,adamw", "--methods names 'adamw' twice."),
        ("--lr fast", "--lr is 'fast', but it must be numbers"),
        ("--lr -1", "--lr is -1.0, but it should be greater than 0."),
        ("--steps 0", "--steps is 0, but it should be greater than or equal to 1."),
        ("--steps three", "Invalid value for '--steps'"),
        ("--preset paper-small --experiment x.yaml", "--preset and --experiment exclude each other"),
        ("--experiment x.yaml --tables 1", "--tables belongs to --preset"),
        ("--experiment none.yaml", "none.yaml cannot be read"),
        ("--stepz 3", "No such option: --stepz"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(call: Call, arguments: str, sentence: str) -> None:
    code, out, err = call(*arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_failed_runs_are_done_again_when_asked(call: Call) -> None:
    call("--methods", "adamw", "--tables", "1")
    assert not FakeRunner.retry_failed
    call("--methods", "adamw", "--tables", "1", "--retry-failed")
    assert FakeRunner.retry_failed


def test_a_dry_run_runs_nothing(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(dry_run_module, "show_runs", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(FakeRunner, "error", AssertionError("nothing is to be run"))
    code, _, _ = call("--methods", "adamw", "--tables", "1", "--dry-run", "--output-dir", "there")
    assert code == 0
    ((experiments, directory, _, retry_failed),) = asked
    assert [experiment.name for experiment in experiments] == ["paper-small-memory"]
    assert (directory, retry_failed) == (Path("there"), False)


@pytest.mark.parametrize(
    ("failing", "code", "said"),
    [(("adamw", "gradlite"), 1, "2 of 2 runs failed"), (("adamw",), 0, "1 of 2 runs failed"), ((), 0, None)],
)
def test_failed_runs_are_counted_and_none_that_succeeded_is_a_failure(
    call: Call, monkeypatch: pytest.MonkeyPatch, failing: tuple[str, ...], code: int, said: str | None
) -> None:
    def run(_self: FakeRunner, experiments: Sequence[Experiment]) -> list[Record]:
        specs = [spec for experiment in experiments for spec in sweep(experiment)]
        return [spec.record("failed", "no luck") if spec.method in failing else spec.record("ok") for spec in specs]

    monkeypatch.setattr(FakeRunner, "run", run)
    got, out, _ = call("--methods", "AdamW,GradLite (int8)", "--tables", "1", "--seeds", "0,1")
    assert got == code
    assert ("2 further runs were not begun" in out) == bool(failing)
    assert (said in out and "--retry-failed" in out) if said else "failed" not in out


def test_in_a_pipe_tables_are_as_wide_as_they_must_be(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call("--methods", "adamw", "--tables", "1")
    assert "Process peak above weights (GB)" in out  # in one line


@pytest.mark.parametrize("is_fast", [True, False])
def test_a_cpu_that_is_slow_with_bfloat16_is_told(call: Call, monkeypatch: pytest.MonkeyPatch, is_fast: bool) -> None:
    monkeypatch.setattr("gradlite.measure.machine.multiplies_bfloat16", lambda: is_fast)
    monkeypatch.setattr(dry_run_module, "show_runs", lambda *_: None)
    assert ("--dtype float32" in call("--methods", "adamw", "--tables", "1", "--dry-run")[1]) == (not is_fast)
    assert ("--dtype float32" in call("--methods", "adamw", "--tables", "1")[1]) == (not is_fast)
    assert "--dtype float32" not in call("--methods", "adamw", "--tables", "1", "--dtype", "float32")[1]


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_being_ended_is_being_interrupted(call: Call, monkeypatch: pytest.MonkeyPatch, ending: signal.Signals) -> None:
    def run(_self: FakeRunner, _experiments: Sequence[Experiment]) -> list[Record]:
        signal.raise_signal(ending)
        raise AssertionError("went on")

    monkeypatch.setattr(FakeRunner, "run", run)
    before = signal.signal(ending, signal.SIG_DFL)  # ignored under nohup, and then left so
    try:
        code, _, error = call("--methods", "adamw", "--tables", "1")
    finally:
        signal.signal(ending, before)
    assert code == 130
    assert "the same command goes on" in error


def test_an_interrupted_comparison_says_how_to_go_on(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRunner, "error", KeyboardInterrupt())
    code, _, err = call("--tables", "2")
    assert code == 130
    assert "the same command goes on" in err


def test_an_error_of_the_comparison_is_told(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRunner, "error", GradLiteError("there is no data."))
    assert call("--tables", "2")[::2] == (2, "error: there is no data.\n")


@pytest.mark.parametrize("flags", [("--dry-run",), ("--steps", "5"), ("--methods", "adamw"), ("--retry-failed",)])
def test_the_theorem_takes_no_flags_of_the_other_comparisons(call: Call, flags: tuple[str, ...]) -> None:
    code, _, error = call("--preset", "theorem", *flags)
    assert code == 2
    assert f"--preset theorem has no {flags[0]}" in error
    assert not list(Path.cwd().iterdir())
