"""The training loop of a comparison: plain, the same for every method, and measured.

The first steps are watched for memory, the next one for the process's peak, and only the rest is timed: watching costs time,
and the first steps build what later ones reuse (optimizer state, compiled kernels).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from gradlite.compare.record import ByCategory, Memory
from gradlite.compare.runs import WATCHED_STEPS, too_few_steps
from gradlite.measure.live_memory import AllocationWatch, StepMarks
from gradlite.measure.process_memory import anonymous_peak_bytes, forget_peak, give_back_free_memory
from gradlite.methods.method import ENERGY_EVERY, Method

UNTIMED_STEPS = WATCHED_STEPS + 1

NOTABLE = 0.1
"""Where two measurements of the same peak differ by more than this share, the record says so."""


class Diverged(Exception):
    """The loss is not finite any more; the message says where."""


@dataclass
class Measured:
    """What a loop saw, step by step; ``seconds`` are those of single steps. ``energies``: steps with the method's energy."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_samples: list[int] = field(default_factory=list)
    energies: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    memory: Memory | None = None


class Loop:
    """One run's steps.

    ``build`` makes the method and its scheduler; it is called under the watch, so that state made then is seen.
    ``precision``: what forward passes run in. ``weight_bytes`` and ``anonymous_bytes``: of the model as it was loaded, and of
    the process at that time.
    """

    def __init__(
        self,
        build: Callable[[], tuple[Method, LRScheduler]],
        device: torch.device,
        max_grad_norm: float,
        weight_bytes: int,
        anonymous_bytes: int | None,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._build = build
        self._device = device
        self._max_grad_norm = max_grad_norm
        self._weight_bytes = weight_bytes
        self._anonymous_bytes = anonymous_bytes
        self._precision = precision
        self._allocator_peak_bytes: int | None = None
        self.measured = Measured()

    def run(self, batches: Sequence[Mapping[str, Tensor]], on_step: Callable[[Measured], None]) -> Method:
        """Make all steps and return the method. Raises Diverged at the first loss that is not finite."""
        watched = batches[:WATCHED_STEPS]
        watch = AllocationWatch(self._device)
        with watch:
            self._method, self._scheduler = self._build()
            for batch in watched:
                self._step(batch, watch)
                on_step(self.measured)
        self.measured.memory = self._memory(watch, None)
        give_back_free_memory()  # the watch's own lists: on SmolLM2 some 0.7 GB that would count as the next steps'
        for batch in batches[len(watched) :]:
            asked = len(self.measured.losses) == WATCHED_STEPS and self._anonymous_bytes is not None and forget_peak()
            self._step(batch)
            # Of a batch of the watched step's shape only: another length would be another peak.
            if asked and batch["input_ids"].shape == watched[-1]["input_ids"].shape:
                self.measured.memory = self._memory(watch, anonymous_peak_bytes())
            on_step(self.measured)
        return self._method

    def _step(self, batch: Mapping[str, Tensor], watch: AllocationWatch | None = None) -> None:
        method, seen = self._method, self.measured
        if watch is not None and self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._synchronize()
        began = time.perf_counter()
        marks: AbstractContextManager[StepMarks | None] = (
            nullcontext() if watch is None else watch.step(method.model, method.optimizer)
        )
        with marks as mark:
            inputs: dict[str, Any] = {key: part.to(self._device) for key, part in batch.items()}
            with self._precision():
                loss = method.model(**inputs, use_cache=False).loss
            if mark is not None:
                mark.forward_ended()
            method.backward(loss)
            if mark is not None:
                mark.backward_ended()
            if method.claims.clipping and self._max_grad_norm:
                method.clip(self._max_grad_norm)
            method.step()
            self._scheduler.step()
            method.zero_grad()
            value = float(loss.detach())
            del loss, inputs
        self._synchronize()
        seen.seconds.append(time.perf_counter() - began)
        seen.losses.append(value)
        if len(seen.losses) % ENERGY_EVERY == 0:
            seen.energies.append((len(seen.losses), method.energy()))
        seen.num_tokens.append(int(batch["attention_mask"].sum()))
        seen.num_samples.append(len(batch["input_ids"]))
        if watch is not None and self._device.type == "cuda":
            self._allocator_peak_bytes = torch.cuda.max_memory_allocated(self._device)
        if not math.isfinite(value):
            raise Diverged(f"the loss is {value} at step {len(seen.losses)}")

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _memory(self, watch: AllocationWatch, process_peak: int | None) -> Memory:
        """Of the last watched step. On CUDA the peak is the allocator's own, and the watch only splits it.

        A run that was too short for the step that is to be reported says so.
        """
        split = watch.peaks[-1]
        peak = split.total if self._allocator_peak_bytes is None else self._allocator_peak_bytes
        base = min(self._weight_bytes, split.weights)  # weights that a method keeps in four bits are no saving above them
        above = peak - base
        process = None
        if process_peak is not None and self._anonymous_bytes is not None:
            process = process_peak - self._anonymous_bytes + self._weight_bytes - base
        earlier = max((one.total for one in watch.peaks[:-1]), default=0)
        notes = [
            too_few_steps(len(watch.peaks)),
            _note(above, "live tensors", process, "the process's anonymous memory"),
            _note(peak, "the allocator", split.total, "the sum of the categories"),
            f"an earlier step peaked at {(earlier - base) / 1e9:.3f} GB above the weights"
            if earlier - base > (1 + NOTABLE) * above
            else None,
        ]
        return Memory(
            peak_bytes=peak,
            peak_above_weights_bytes=above,
            by_category_bytes=ByCategory(**asdict(split)),
            process_peak_above_weights_bytes=process,
            note="; ".join(note for note in notes if note) or None,
        )


def _note(first: int, first_name: str, second: int | None, second_name: str) -> str | None:
    if second is None or abs(first - second) <= NOTABLE * max(first, second):
        return None
    return f"peaks differ: {first / 1e9:.3f} GB by {first_name}, {second / 1e9:.3f} GB by {second_name}"
