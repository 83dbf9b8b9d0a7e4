"""A whole run on a tiny model: what it leaves, what it shows, and how it resumes, refuses and gives up."""

import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from gradlite.errors import GradLiteError
from gradlite.train import callback as callback_module
from gradlite.train import trainer as trainer_module
from gradlite.train.config import TrainConfig
from gradlite.train.data import load_data
from gradlite.train.loss import summed_loss
from gradlite.train.run import _Run
from gradlite.train.trainer import NUM_CHECKPOINTS_KEPT, GradLiteTrainer

Train = Callable[..., Any]  # the fixture's function: settings → what the run left


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_a_model_a_card_and_records(train: Train, model_dir: Path) -> None:
    outcome = train(max_steps=12, lr=3e-3, eval_every=6)
    names = {entry.name for entry in outcome.path.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "loss.png", "metrics.jsonl"} <= names
    assert not [name for name in names if name.startswith(".writing")]
    assert (outcome.path / "loss.png").read_bytes().startswith(b"\x89PNG")

    record = outcome.record()
    assert record["status"] == "finished"
    assert record["steps"] == 12
    assert record["loss_after"] < record["loss_before"] * 0.95
    assert len(record["answers_before"]) == len(record["answers_after"]) == 3
    steps = [line["step"] for line in outcome.metrics() if "loss" in line]
    assert steps == list(range(1, 13))
    assert [line["step"] for line in outcome.metrics() if "eval_loss" in line] == [0, 6, 12]

    trained, before = weights(outcome.path), weights(model_dir)
    assert trained.keys() == before.keys()
    assert not torch.equal(trained["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    saved = json.loads((outcome.path / "config.json").read_text())
    assert saved["use_cache"] is True
    AutoTokenizer.from_pretrained(outcome.path)


def test_the_card_holds_a_config_that_reproduces_the_run(train: Train) -> None:
    outcome = train(name="first")
    card = (outcome.path / "README.md").read_text()
    assert f"{outcome.record()['loss_after']:.4f}" in card
    assert "\n\n- projected: " in card
    assert "\n- plain: " in card
    assert "base_model" not in yaml.safe_load(card.split("---")[1])  # a directory of this machine is nothing to the hub
    settings = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    again = train(**{**settings, "name": "second"})
    assert same(weights(outcome.path), weights(again.path))
    assert outcome.metrics() == again.metrics()


def test_the_plan_the_preview_and_the_progress_are_shown(train: Train) -> None:
    shown = train().shown
    for word in ("parameters", "projected", "plain", "frozen", "weights", "moments", "error memory", "34 examples"):
        assert word in shown
    assert "⟦" in shown
    assert "step 6/6" in shown
    for word in ("gradient", "tokens/s", "peak", "left", "held-out loss"):
        assert word in shown


def test_the_reported_loss_is_the_mean_over_all_held_out_tokens(train: Train) -> None:
    outcome = train(train_on="answer")
    model = AutoModelForCausalLM.from_pretrained(outcome.path)
    tokenizer = AutoTokenizer.from_pretrained(outcome.path)
    config = TrainConfig.from_sources(outcome.path / "config.yaml")
    total, count = 0.0, 0
    for tokens in load_data(config, tokenizer).held_out:
        with torch.no_grad():
            logits = model(torch.tensor([tokens.ids])).logits[0, :-1].float()
        labels = torch.tensor(tokens.labels("answer")[1:])
        total += float(functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    assert outcome.record()["held_out_tokens"] == count
    assert outcome.record()["loss_after"] == pytest.approx(total / count, rel=1e-5)


def test_accumulated_micro_batches_are_one_batch(train: Train) -> None:
    options: dict[str, Any] = {"max_steps": 3, "feedback": "off", "moments": "fp32", "basis": "random"}
    whole = train(name="whole", batch_size=8, **options).metrics()
    parts = train(name="parts", batch_size=2, accumulation=4, **options).metrics()
    for one, other in zip(whole, parts, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key] == pytest.approx(other[key], rel=1e-3), key


def test_a_packed_run_trains(train: Train) -> None:
    outcome = train(packing=True, max_steps=None, batch_size=1)
    assert outcome.record()["loss_after"] < outcome.record()["loss_before"]


class Interrupted(Exception):
    """Stands for a killed process."""


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    def arrange(step: int) -> None:
        original = _Run._record_step

        def record_then_die(self: _Run, report: callback_module.StepReport) -> None:
            original(self, report)
            if report.step == step:
                monkeypatch.setattr(_Run, "_record_step", original)
                raise Interrupted

        monkeypatch.setattr(_Run, "_record_step", record_then_die)

    return arrange


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16", "accumulation": 2, "max_steps": 8},
        {"dtype": "bfloat16", "hold": "int8"},
        {"dtype": "float32", "hold": "recompute-int8"},
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(train: Train, interrupt_after: Any, options: dict[str, Any]) -> None:
    settings = {"save_every": 3, "eval_every": 2, **options}
    whole = train(name="whole", **settings)
    interrupt_after(5)
    with pytest.raises(Interrupted):
        train(name="parts", **settings)
    with pytest.raises(GradLiteError, match="unfinished run"):
        train(name="parts", **settings)
    with pytest.raises(GradLiteError, match="lr"):
        train(name="parts", resume=True, **{**settings, "lr": 0.5})
    parts = train(name="parts", resume=True, **settings)
    assert "going on from" in parts.shown
    assert same(weights(whole.path), weights(parts.path))
    assert whole.metrics() == parts.metrics()
    assert whole.record()["answers_before"] == parts.record()["answers_before"]
    assert whole.record()["loss_after"] == parts.record()["loss_after"]


def test_schedule_and_warmup_are_followed(train: Train) -> None:
    def rates(**settings: Any) -> list[float]:
        lines = train(max_steps=6, lr=1e-3, warmup=2, overwrite=True, **settings).metrics()
        return [line["learning_rate"] for line in lines if "loss" in line]

    constant, cosine = rates(schedule="constant"), rates(schedule="cosine")
    assert constant[0] < constant[1] < constant[2] == constant[-1] == 1e-3
    assert cosine[2] == 1e-3 > cosine[3] > cosine[-1]


def test_a_bound_on_the_gradients_norm_changes_what_is_learned(train: Train) -> None:
    bounded = train(name="bounded", max_grad_norm=1e-4, method="adamw", method_options={"eps": 1.0}, lr=1.0)
    free = train(name="free", max_grad_norm=0.0, method="adamw", method_options={"eps": 1.0}, lr=1.0)
    assert bounded.record()["loss_after"] > free.record()["loss_after"] + 0.01


def test_two_checkpoints_are_kept_and_steps_are_counted_as_the_trainer_does(train: Train) -> None:
    outcome = train(max_steps=None, epochs=1.5, accumulation=2, save_every=2)
    record = outcome.record()
    assert record["steps"] == max(line["step"] for line in outcome.metrics() if "loss" in line)
    assert len(list((outcome.path / "checkpoints").iterdir())) == NUM_CHECKPOINTS_KEPT


def test_a_run_that_died_after_its_last_step_is_completed(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        raise Interrupted

    whole = train(name="whole", save_every=3)
    monkeypatch.setattr(_Run, "_finish", die)
    with pytest.raises(Interrupted):
        train(name="parts", save_every=3)
    monkeypatch.undo()
    monkeypatch.setattr("gradlite.evaluate.answers.MAX_NEW_TOKENS", 4)
    parts = train(name="parts", save_every=3, resume=True)
    assert "going on from" in parts.shown
    assert same(weights(whole.path), weights(parts.path))
    for key in ("num_tokens", "skipped_steps", "state_bytes", "loss_after"):
        assert parts.record()[key] == whole.record()[key], key


def test_a_finished_run_is_kept_unless_told_otherwise(train: Train) -> None:
    first = train()
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(GradLiteError, match="finished run"):
        train()
    again = train(resume=True)
    assert "nothing to resume" in again.shown
    assert (again.path / "model.safetensors").stat().st_mtime_ns == stamp
    replaced = train(overwrite=True, seed=1)
    assert replaced.record()["status"] == "finished"
    assert "overwrite: false" in (replaced.path / "README.md").read_text()
    assert (replaced.path / "model.safetensors").stat().st_mtime_ns != stamp


def test_overwrite_never_touches_a_directory_that_is_not_a_run(train: Train, tmp_path: Path) -> None:
    precious = tmp_path / "runs" / "run" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(GradLiteError, match="not a GradLite run"):
            train(**options)
    (precious.parent / "run.json").write_text('{"status": "finished"}')
    with pytest.raises(GradLiteError, match="not a GradLite run"):
        train(overwrite=True)
    assert precious.read_text() == "years of work"


def test_a_failed_overwrite_leaves_the_old_run(train: Train) -> None:
    old = train()
    with pytest.raises(GradLiteError):
        train(overwrite=True, include=["no-such-layer"])
    assert old.record()["status"] == "finished"
    assert (old.path / "model.safetensors").exists()


def poison(monkeypatch: pytest.MonkeyPatch, bad_steps: set[int], value: float) -> None:
    """Make the training loss of some steps `value` (counted from 1)."""
    original = GradLiteTrainer.compute_loss
    summed = summed_loss
    current: list[int] = [0]

    def compute(self: GradLiteTrainer, *args: Any, **keywords: Any) -> Any:
        current[0] = self.state.global_step + 1
        try:
            return original(self, *args, **keywords)
        finally:
            current[0] = 0

    def bad(*args: Any) -> Any:
        loss, count = summed(*args)
        return (loss + value if current[0] in bad_steps else loss), count

    monkeypatch.setattr(GradLiteTrainer, "compute_loss", compute)
    monkeypatch.setattr(trainer_module, "summed_loss", bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_a_finite_loss_is_skipped_counted_and_shown(
    train: Train, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    poison(monkeypatch, {2, 4}, value)
    outcome = train()
    assert outcome.record()["skipped_steps"] == 2
    assert "skipped 2" in outcome.shown
    lines = {line["step"]: line for line in outcome.metrics() if "loss" in line}
    assert lines[2]["loss"] is None
    assert lines[4]["loss"] is None
    assert lines[5]["loss"] is not None
    assert all(tensor.isfinite().all() for tensor in weights(outcome.path).values())


@pytest.mark.parametrize("save_every", [None, 2])
def test_ten_bad_steps_stop_the_run_and_keep_the_last_good_checkpoint(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, save_every: int | None
) -> None:
    poison(monkeypatch, set(range(4, 100)), float("nan"))
    with pytest.raises(GradLiteError, match="10 steps in a row") as error:
        train(max_steps=40, save_every=save_every)
    folder = tmp_path / "runs" / "run"
    assert not (folder / "model.safetensors").exists()
    checkpoints = sorted((folder / "checkpoints").iterdir())
    assert any(str(checkpoint) in str(error.value) for checkpoint in checkpoints)
    for checkpoint in checkpoints:
        assert all(tensor.isfinite().all() for tensor in weights(checkpoint).values())
    if save_every:  # none is written while steps are skipped: it would push a good one out
        assert max(int(checkpoint.name.split("-")[1]) for checkpoint in checkpoints) < 4
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 13


def test_a_run_of_bad_steps_alone_saves_no_model(train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    poison(monkeypatch, set(range(1, 100)), float("nan"))
    with pytest.raises(GradLiteError, match="every step"):
        train(max_steps=3)
    assert not (tmp_path / "runs" / "run" / "model.safetensors").exists()


def test_weights_that_went_bad_are_not_saved(train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = _Run._record_step

    def spoil(self: _Run, report: callback_module.StepReport) -> None:
        original(self, report)
        if report.step == 6:
            with torch.no_grad():
                self.model.get_output_embeddings().weight[0, 0] = float("nan")

    monkeypatch.setattr(_Run, "_record_step", spoil)
    with pytest.raises(GradLiteError, match="no longer finite"):
        train()
    assert not (tmp_path / "runs" / "run" / "model.safetensors").exists()


def test_a_tokenizer_with_tokens_that_the_model_lacks(train: Train, model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["yes"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(GradLiteError, match="but the model knows"):
        train(model=str(folder))


def test_more_tokens_than_a_model_has_positions(train: Train, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A model with a table of positions; the run that is to be replaced stays."""
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=24)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    kept = train().path / "model.safetensors"
    with pytest.raises(
        GradLiteError, match=r"has 24 positions, and the longest sequence has \d+ tokens; give --seq-len 24 or less"
    ):
        train(model=str(tmp_path / "gpt2"), overwrite=True)
    assert kept.exists()
    train(model=str(tmp_path / "gpt2"), name="short", seq_len=24, train_on="all", max_steps=2)


def test_several_processes_are_refused(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(GradLiteError, match="in one process"):
        train()


def test_the_private_methods_that_ours_replace_are_still_the_trainers() -> None:
    for name in (
        "_track_num_input_tokens", "_maybe_log_save_evaluate", "_get_output_dir", "_save_checkpoint", "training_step",
        "_clip_grad_norm", "_get_grad_norm",
    ):  # fmt: skip
        assert name in vars(GradLiteTrainer)
        assert name in vars(Trainer)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": "./nowhere"}, "not a directory with a config.json"),
        ({"dataset": "./nowhere.jsonl"}, "does not exist"),
        ({"seq_len": 8}, "nothing to train on"),
        ({"output_dir": f"{__file__}/runs"}, "not a directory that can be written to"),
        ({"include": ["no-such-layer"]}, "no-such-layer"),
        ({"report_to": ["wandb"]}, "not installed"),
    ],
)
def test_bad_input_gets_one_sentence_and_no_files(
    train: Train, tmp_path: Path, settings: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradlite.train.run.importlib.util.find_spec", lambda _name: None)
    with pytest.raises(GradLiteError, match=sentence) as error:
        train(**settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_that_goes_on_trains_in_its_first_step(train: Train) -> None:
    """The schedule that was saved had come to zero; the longer one has not."""
    settings: dict[str, Any] = {"schedule": "linear", "save_every": 2, "lr": 1e-2, "warmup": 0}
    train(max_steps=4, **settings)
    longer = train(max_steps=8, resume=True, **settings)
    rates = {line["step"]: line["learning_rate"] for line in longer.metrics() if "loss" in line}
    losses = [line["eval_loss"] for line in longer.metrics() if "eval_loss" in line]
    assert rates[5] > 1e-3
    assert losses[-1] != losses[-2]


def test_a_run_that_goes_on_saves_and_evaluates_as_often_as_it_is_told_now(train: Train) -> None:
    """Not as its checkpoint remembers."""
    train(max_steps=4, save_every=4, schedule="constant", warmup=0)
    longer = train(max_steps=10, resume=True, save_every=3, eval_every=3, schedule="constant", warmup=0)
    assert [line["step"] for line in longer.metrics() if "eval_loss" in line and line["step"] > 4] == [6, 9, 10]
    steps = {int(folder.name.rsplit("-", 1)[1]) for folder in (longer.path / "checkpoints").iterdir()}
    assert steps == {9, 10}


def test_a_process_that_got_the_number_of_one_that_is_gone_does_not_count(train: Train) -> None:
    path = train().path
    theirs = {"status": "running", "process": os.getppid(), "process_started": "1", "host": platform.node()}
    (path / "run.json").write_text(json.dumps({**json.loads((path / "run.json").read_text()), **theirs}))
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    if Path("/proc/self/stat").exists():
        train()


@pytest.mark.parametrize("alive", [True, False])
def test_a_directory_in_which_another_process_trains_is_left_alone(alive: bool, train: Train) -> None:
    path = train().path
    process = os.getppid() if alive else 2**22 + 1  # beyond what Linux gives
    record = {**json.loads((path / "run.json").read_text()), "status": "running", "process": process, "host": platform.node()}
    (path / "run.json").write_text(json.dumps(record))
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    if alive:
        with pytest.raises(
            GradLiteError, match=rf"process {process} is training in .*; wait for its end, or give another --name"
        ):
            train()
        train(overwrite=True)
    else:
        train()


def test_a_damaged_line_of_metrics_is_left_out_when_a_run_goes_on(train: Train) -> None:
    path = train(save_every=3).path
    metrics = path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss"\n' + metrics.read_text())
    lines = train(save_every=3, max_steps=8, resume=True).metrics()
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


def test_the_number_format_is_settled_once(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradlite.train.number_format.multiplies_bfloat16", lambda: False)
    outcome = train(dtype="auto", max_steps=2, save_every=2)
    assert "float32 instead" in outcome.shown
    assert yaml.safe_load((outcome.path / "config.yaml").read_text())["dtype"] == "float32"
    assert weights(outcome.path)["model.norm.weight"].dtype == torch.float32
    assert train(dtype="auto", max_steps=3, save_every=2, resume=True).record()["steps"] == 3
    monkeypatch.setattr("gradlite.train.number_format.multiplies_bfloat16", lambda: True)
    with pytest.raises(GradLiteError, match=r"other settings: dtype \('float32' then, 'bfloat16' now\)"):
        train(dtype="auto", max_steps=4, resume=True)
