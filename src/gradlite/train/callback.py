"""What is watched during training: speed, memory, loss, skipped steps; and when a run must be given up."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradlite.measure.memory import peak_memory_bytes
from gradlite.methods.method import Method
from gradlite.train.method_optimizer import MethodOptimizer

MAX_SKIPPED_IN_A_ROW = 10
_SMOOTHING = 0.9  # of the speed and the time left that are shown


@dataclass(frozen=True)
class StepReport:
    """One step. `loss` is not finite where it was skipped; `grad_norm` neither, nor where a method keeps no gradient."""

    step: int
    num_steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int  # seen since the run began, padding left out
    tokens_per_second: float
    peak_memory_bytes: int
    seconds_left: float
    skipped_steps: int


class RunCallback(TrainerCallback):
    """Measures each step, hands a `StepReport` or a held-out loss to its listeners, and stops a run that has gone bad.

    `on_step` gets every step's report, `on_evaluation` the step and the held-out loss. A run is stopped (and `gave_up`
    is True) after `MAX_SKIPPED_IN_A_ROW` steps skipped in a row; if there is no checkpoint yet, one is written then,
    since skipped steps leave the weights as the last good step left them.
    """

    def __init__(
        self,
        on_step: Callable[[StepReport], None],
        on_evaluation: Callable[[int, float], None],
        has_checkpoint: Callable[[], bool],
    ) -> None:
        self.on_step = on_step
        self.on_evaluation = on_evaluation
        self.has_checkpoint = has_checkpoint
        self.gave_up = False
        self.skipped_steps = 0
        self.last_evaluation: tuple[int, float] | None = None
        self._started = 0.0
        self._tokens_before = 0
        self._smooth_rate = 0.0
        self._smooth_seconds = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A resumed run's state comes from the checkpoint, with the intervals of saving and evaluating of back then."""
        state.compute_steps(args, state.max_steps)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._started = time.perf_counter()
        self._tokens_before = state.num_input_tokens_seen

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        seconds = max(time.perf_counter() - self._started, 1e-9)
        rate = (state.num_input_tokens_seen - self._tokens_before) / seconds
        self._smooth_rate = _smoothed(self._smooth_rate, rate)
        self._smooth_seconds = _smoothed(self._smooth_seconds, seconds)
        method = _method_of(objects["optimizer"])
        self.skipped_steps = method.skipped_steps
        if method.skipped_in_a_row:  # a checkpoint written now could push a good one out
            control.should_save = False
        if method.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            self.gave_up = True
            control.should_training_stop = True
            control.should_evaluate = False
            control.should_save = not self.has_checkpoint()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            self.last_evaluation = (state.global_step, logs["eval_loss"])
            self.on_evaluation(*self.last_evaluation)
        elif "loss" in logs:
            self.on_step(
                StepReport(
                    step=state.global_step,
                    num_steps=state.max_steps,
                    loss=logs["loss"],
                    grad_norm=logs["grad_norm"],
                    learning_rate=logs["learning_rate"],
                    num_tokens=state.num_input_tokens_seen,
                    tokens_per_second=self._smooth_rate,
                    peak_memory_bytes=peak_memory_bytes(args.device),
                    seconds_left=(state.max_steps - state.global_step) * self._smooth_seconds,
                    skipped_steps=self.skipped_steps,
                )
            )


def _smoothed(before: float, now: float) -> float:
    return now if before == 0 else _SMOOTHING * before + (1 - _SMOOTHING) * now


def _method_of(optimizer: Any) -> Method:
    """The method behind the Trainer's optimizer, which accelerate wraps."""
    while not isinstance(optimizer, MethodOptimizer):
        optimizer = optimizer.optimizer
    return optimizer.method
