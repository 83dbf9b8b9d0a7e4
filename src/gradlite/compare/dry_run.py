"""What a comparison would do, and roughly how long that takes, without doing it."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradlite.compare.experiment import Experiment
from gradlite.compare.runner import Runner
from gradlite.compare.runs import RunSpec, further_seeds, num_runs, sweep, too_few_steps
from gradlite.train.models import load_model_and_tokenizer
from gradlite.train.quiet import quiet_libraries
from gradlite.train.words import in_time

_OPERATIONS = 6
"""Floating-point operations a parameter and token: 2 in the forward pass and 4 in the backward pass."""

_OVERHEAD = 1.5
"""A step's time over that of its large matrix products alone, roughly: it differs from method to method."""

_NUM_PRODUCTS = 20


def show_runs(experiments: Sequence[Experiment], output_dir: Path, console: Console, retry_failed: bool = False) -> None:
    """List the runs that are due, and how long they take by the speed of one matrix product on this machine."""
    runner = Runner(output_dir, "", console, lambda _: None, retry_failed)
    runner.check(experiments)
    shown = Table("Run", "Steps × rows × tokens", box=None)
    num_tokens = num_due = 0
    listed: list[RunSpec] = []
    for experiment in experiments:
        records = [record for record in map(runner.found, sweep(experiment)) if record is not None]
        specs = sweep(experiment)
        known = {spec.run for spec in specs}
        specs += [spec for spec in further_seeds(experiment, records) if spec.run not in known]
        due = [spec for spec in specs if runner.found(spec) is None and not _is_supplied(spec, listed)]
        listed += due
        work = f"{experiment.steps} × {experiment.batch_size} × {experiment.seq_len}"
        for spec in due:
            shown.add_row(spec.run, work)
        hidden = num_runs(experiment) - len(specs)
        if hidden:
            shown.add_row(Text(f"{experiment.name}: {hidden} more at the best rate of each sweep", style="dim"), work)
        num_due += len(due) + hidden
        num_tokens += (len(due) + hidden) * experiment.steps * experiment.batch_size * experiment.seq_len
    console.print(shown)
    for experiment in experiments:
        note = too_few_steps(experiment.steps) if experiment.kind == "memory" else None
        if note is not None:
            console.print(f"{experiment.name}: {note}; raise steps.")
    seconds = _seconds(experiments[0], num_tokens, console) if num_due else 0.0
    console.print(
        f"{num_due} runs, {num_tokens:,} tokens at most; about {in_time(seconds)} (h:mm:ss, or mm:ss) by the speed of one "
        "matrix product here; half of it or twice as much would be no surprise."
    )


def _is_supplied(spec: RunSpec, listed: Sequence[RunSpec]) -> bool:
    """Whether an earlier experiment does the very same work, whose record is then taken over."""
    others = (other for other in listed if other.experiment != spec.experiment)
    return any(spec.named_here(other.record("ok")) is not None for other in others)


def _seconds(experiment: Experiment, num_tokens: int, console: Console) -> float:
    with quiet_libraries(console):
        model, _ = load_model_and_tokenizer(experiment.model, experiment.weights_dtype)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return _OVERHEAD * _OPERATIONS * num_parameters * num_tokens / _operations_per_second(next(model.parameters()).dtype)


def _operations_per_second(dtype: torch.dtype) -> float:
    size = 1024
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(_NUM_PRODUCTS):
        began = time.perf_counter()
        float((left @ right)[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)
