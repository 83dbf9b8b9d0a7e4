"""One training run, from its configuration to its directory."""

import importlib.util
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradlite.errors import GradLiteError
from gradlite.evaluate.answers import answer_questions
from gradlite.evaluate.positions import num_positions
from gradlite.measure.memory import peak_memory_bytes
from gradlite.methods.method import ENERGY_EVERY
from gradlite.train.callback import MAX_SKIPPED_IN_A_ROW, RunCallback, StepReport
from gradlite.train.card import Result
from gradlite.train.checkpoint import check_whole
from gradlite.train.config import TrainConfig
from gradlite.train.data import Data, load_data, sequences
from gradlite.train.directory import RunDirectory, checkpoint_step
from gradlite.train.disk import bytes_in, check_room, more_checkpoints, saved_bytes
from gradlite.train.local_names import check_dataset, check_model
from gradlite.train.matmul_caches import limit_matmul_caches
from gradlite.train.models import load_model_and_tokenizer
from gradlite.train.number_format import number_format
from gradlite.train.out_of_memory import out_of_memory_told
from gradlite.train.outputs import save_outputs, show_answers, show_result
from gradlite.train.overview import coverage_of, overview, state_bytes_of
from gradlite.train.packing import check_packing
from gradlite.train.preview import preview
from gradlite.train.progress import Progress
from gradlite.train.quiet import quiet_libraries
from gradlite.train.trainer import (
    NUM_CHECKPOINTS_KEPT,
    GradLiteTrainer,
    build_trainer,
    num_steps,
    weights_are_finite,
)


def run(config: TrainConfig, console: Console | None = None) -> Path:
    """Fine-tune a model as `config` says and return the run's directory.

    Nothing is written before the model, the data and the optimizer are known to be usable. Raises `GradLiteError` for
    whatever the user can put right, and for a run that had to be given up (its last good checkpoint is kept and named).
    """
    console = console or Console(soft_wrap=True)
    limit_matmul_caches()
    with quiet_libraries(console), out_of_memory_told():
        return _Run(config, console).do()


class _Run:
    """The steps of one run, in order, and what they share."""

    def __init__(self, config: TrainConfig, console: Console) -> None:
        dtype, self._notice = number_format(config.dtype)
        self.config = config.model_copy(update={"dtype": dtype})
        self.console = console
        self.directory = RunDirectory(config.run_dir)
        self.progress = Progress(console)
        self.callback = RunCallback(
            on_step=self._record_step,
            on_evaluation=self._record_evaluation,
            has_checkpoint=lambda: self.directory.last_checkpoint() is not None,
        )

    def do(self) -> Path:
        self.directory.check(self.config)
        check_model(self.config.model)
        for dataset in filter(None, (self.config.dataset, self.config.eval_dataset)):
            check_dataset(dataset)
        _check_reporters(self.config)
        if self._notice is not None:
            self.console.print(Text(self._notice), style="yellow")
        self.console.print(Text(f"loading {self.config.model}"), style="dim")
        model, tokenizer = load_model_and_tokenizer(self.config.model, self.config.dtype)
        self.console.print(Text(f"reading {self.config.dataset}"), style="dim")
        data = load_data(self.config, tokenizer)
        _check_vocabulary(model, data, self.config)
        _check_positions(model, data, self.config)
        if self.config.packing:
            check_packing(model)
        train = sequences(data.train, self.config, packed=self.config.packing)
        held_out = sequences(data.held_out, self.config, packed=False)
        with tempfile.TemporaryDirectory() as scratch:  # the Trainer makes its directory at once; ours is not due yet
            trainer = build_trainer(self.config, model, tokenizer, train, held_out, [self.callback], Path(scratch))
        trainer.args.output_dir = str(self.directory.checkpoints)
        self.model, self.method = model, trainer.method
        steps = num_steps(self.config, len(train))
        checkpoint = self.directory.last_checkpoint() if self.config.resume else None
        if self.config.resume and checkpoint is None and not self.directory.is_finished:
            self.console.print(Text("there is no checkpoint to resume from; beginning at the first step"), style="yellow")
        if self.directory.is_finished and self.config.resume:
            done = (self.directory.record or {}).get("steps", 0)
            if done >= steps:
                self.console.print(Text(f"{self.directory.path} holds this run, finished; there is nothing to resume."))
                return self.directory.path
            if checkpoint is None:
                raise GradLiteError(f"{str(self.directory.path)!r} is finished and has no checkpoint to go on from.")
        if checkpoint is not None:
            check_whole(checkpoint, model.state_dict())
        self._check_room(checkpoint, steps)
        self._show_plan(trainer, data, tokenizer, len(train), steps)
        before = self._before(trainer, tokenizer, data, checkpoint)
        self.directory.begin(self.config, before, checkpoint)
        if checkpoint is None:
            self.directory.append_metrics({"step": 0, "eval_loss": before["loss_before"], "seconds": 0.0})
        else:
            self.console.print(Text(f"going on from {checkpoint}"))
        seconds = self._train(trainer, checkpoint, steps)
        self._check_outcome(trainer)
        return self._finish(trainer, tokenizer, data, before, seconds)

    def _check_room(self, checkpoint: Path | None, steps: int) -> None:
        """Refuse a run whose model the disk cannot take; what a new run replaces makes room."""
        directory = self.directory
        if checkpoint is None:
            num_there, done, freed_bytes = 0, 0, bytes_in(directory.path)
        else:
            num_there = sum(folder.is_dir() for folder in directory.checkpoints.glob("checkpoint-*"))
            done, freed_bytes = checkpoint_step(checkpoint), 0
        num_checkpoints = more_checkpoints(steps, done, self.config.save_every, num_there, NUM_CHECKPOINTS_KEPT)
        check_room(directory.path, saved_bytes(self.method.model), num_checkpoints, freed_bytes=freed_bytes)

    def _show_plan(
        self, trainer: GradLiteTrainer, data: Data, tokenizer: PreTrainedTokenizerBase, num_sequences: int, steps: int
    ) -> None:
        for notice in data.notices:
            self.console.print(Text(notice), style="yellow")
        self.console.print(Text("\none example; the loss covers what stands in ⟦⟧:"), style="bold")
        self.console.print(preview(data.train[0], tokenizer, self.config.train_on))
        self.console.print()
        if self.method.name == "gradlite":
            self._see_shared_inputs(data.train[0].ids[:8])
        device = str(trainer.args.device)
        self.console.print(overview(self.config, data, self.method, device, num_sequences, steps))
        self.console.print()

    def _see_shared_inputs(self, ids: Sequence[int]) -> None:
        """One short forward pass: layers that read the same tensor find each other, so the plan counts their basis once."""
        self.model.eval()
        with torch.enable_grad():
            self.model(input_ids=torch.tensor([ids], device=self.model.device))

    def _before(
        self, trainer: GradLiteTrainer, tokenizer: PreTrainedTokenizerBase, data: Data, checkpoint: Path | None
    ) -> dict[str, Any]:
        """Held-out loss and answers of the untouched model: measured, or from the record of the run that is resumed."""
        keys = ("loss_before", "held_out_tokens", "answers_before")
        record = self.directory.record
        if checkpoint is not None and record is not None and all(key in record for key in keys):
            return {key: record[key] for key in keys}
        measured = trainer.held_out_loss()
        if not math.isfinite(measured.loss):
            raise GradLiteError(f"model {self.config.model!r} gives a held-out loss of {measured.loss} before any training.")
        self.console.print(f"held-out loss before training {measured.loss:.4f} ({measured.num_tokens:,} tokens)")
        answers = [answer.as_dict() for answer in answer_questions(self.model, tokenizer, data.held_out)]
        return dict(zip(keys, (measured.loss, measured.num_tokens, answers), strict=True))

    def _train(self, trainer: GradLiteTrainer, checkpoint: Path | None, steps: int) -> float:
        """Train to the last step and return the seconds it took, the parts before a resume included."""
        started = time.perf_counter()
        earlier = max((line.get("seconds", 0.0) for line in self.directory.read_metrics()), default=0.0)
        self.clock_zero = started - earlier
        if checkpoint is not None and checkpoint_step(checkpoint) >= steps:  # stopped after its last step: only results are due
            trainer._load_from_checkpoint(str(checkpoint))
            state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
            self.method.load_state_dict(state)  # for what it counted and holds
            trainer.state = type(trainer.state).load_from_json(str(checkpoint / "trainer_state.json"))
            return earlier
        with self.progress:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return self._clock()

    def _check_outcome(self, trainer: GradLiteTrainer) -> None:
        """Raise `GradLiteError` where the run went bad: nothing of it may pass as a trained model."""
        skipped = self.method.skipped_steps
        if self.callback.gave_up:
            self._give_up(f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a loss or a gradient that was not finite")
        if skipped and skipped >= trainer.state.global_step:
            self._give_up("every step had a loss or a gradient that was not finite")
        if not weights_are_finite(self.model):
            self._give_up("the weights are no longer finite")

    def _give_up(self, reason: str) -> None:
        checkpoint = self.directory.last_checkpoint()
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no good checkpoint"
        raise GradLiteError(f"the run was stopped: {reason}; {kept}. Try a lower --lr.")

    def _finish(
        self,
        trainer: GradLiteTrainer,
        tokenizer: PreTrainedTokenizerBase,
        data: Data,
        before: dict[str, Any],
        seconds: float,
    ) -> Path:
        step, loss = self.callback.last_evaluation or (-1, math.nan)
        if step != trainer.state.global_step:
            loss = trainer.evaluate()["eval_loss"]
        if not math.isfinite(loss):
            self._give_up(f"the held-out loss is {loss}")
        answers = answer_questions(self.model, tokenizer, data.held_out)
        coverage, state_bytes = coverage_of(self.method), state_bytes_of(self.method)
        finished = cast(PreTrainedModel, self.method.finish())
        self.model.config.use_cache = True  # which the Trainer turns off
        result = Result(
            steps=trainer.state.global_step,
            skipped_steps=self.method.skipped_steps,
            num_tokens=trainer.state.num_input_tokens_seen,
            seconds=seconds,
            peak_memory_bytes=max(peak_memory_bytes(trainer.args.device), self._earlier_peak_bytes()),
            loss_before=before["loss_before"],
            loss_after=loss,
            held_out_tokens=before["held_out_tokens"],
            answers_before=before["answers_before"],
            answers_after=[answer.as_dict() for answer in answers],
            num_parameters=self.model.num_parameters(),
            method=self.method.name,
            full_parameter=self.method.claims.full_parameter,
            coverage=coverage,
            state_bytes=state_bytes,
        )
        save_outputs(self.directory, self.config, finished, tokenizer, result)
        show_answers(self.console, result.answers_before, answers)
        show_result(self.console, result, self.directory.path)
        return self.directory.path

    def _earlier_peak_bytes(self) -> int:
        """Of the parts before a resume too."""
        return max((line.get("peak_memory_bytes") or 0 for line in self.directory.read_metrics()), default=0)

    def _clock(self) -> float:
        """Seconds of training so far, evaluations in between and the parts before a resume included."""
        return round(time.perf_counter() - self.clock_zero, 3)

    def _record_step(self, report: StepReport) -> None:
        self.directory.append_metrics(
            {
                "step": report.step,
                "loss": report.loss,
                "grad_norm": report.grad_norm,
                "learning_rate": report.learning_rate,
                "num_tokens": report.num_tokens,
                "skipped_steps": report.skipped_steps,
                "tokens_per_second": round(report.tokens_per_second, 1),
                "peak_memory_bytes": report.peak_memory_bytes,
                "seconds": self._clock(),
            }
        )
        if report.step % ENERGY_EVERY == 0 or report.step == report.num_steps:
            energy = self.method.energy()
            if energy:
                rounded = {name: round(share, 4) for name, share in energy.items()}
                self.directory.append_metrics({"step": report.step, "energy": rounded})
        self.progress.show(report)

    def _record_evaluation(self, step: int, loss: float) -> None:
        self.directory.append_metrics({"step": step, "eval_loss": loss, "seconds": self._clock()})
        self.progress.show_evaluation(step, loss)


def _check_vocabulary(model: PreTrainedModel, data: Data, config: TrainConfig) -> None:
    largest = max(max(tokens.ids) for tokens in [*data.train, *data.held_out])
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if largest >= rows:
        raise GradLiteError(
            f"the tokenizer of model {config.model!r} gives token number {largest}, but the model knows {rows} tokens only; "
            "resize its embeddings, or use the tokenizer that belongs to it."
        )


def _check_positions(model: PreTrainedModel, data: Data, config: TrainConfig) -> None:
    known, longest = num_positions(model), max(len(tokens.ids) for tokens in [*data.train, *data.held_out])
    longest = config.seq_len if config.packing else longest
    if known is not None and longest > known:
        raise GradLiteError(
            f"model {config.model!r} has {known} positions, and the longest sequence has {longest} tokens; "
            f"give --seq-len {known} or less."
        )


def _check_reporters(config: TrainConfig) -> None:
    for reporter in config.report_to:
        if importlib.util.find_spec(reporter) is None:
            raise GradLiteError(f"--report-to {reporter} needs a package that is not installed: run `pip install {reporter}`.")
