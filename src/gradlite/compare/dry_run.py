"""What a comparison would do, and roughly how long that takes, without doing it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradlite.compare.experiment import Experiment
from gradlite.compare.rows import enough_rows
from gradlite.compare.runner import Runner
from gradlite.compare.runs import RunSpec, further_seeds, num_runs, sweep, too_few_steps
from gradlite.compare.terminal import print_table
from gradlite.train.models import load_model_and_tokenizer
from gradlite.train.quiet import quiet_libraries
from gradlite.train.words import in_time

_FORWARD, _STEP = 2, 6
"""Floating-point operations a parameter and token: of a forward pass, and of a step with its backward pass."""

_OVERHEAD = 1.5
"""A step's time over that of its large matrix products alone, roughly: it differs from method to method."""

_SECONDS_TO_START = 10.0
"""Until a run's process has its libraries, roughly."""

_MAX_PRODUCTS, _MAX_SECONDS = 20, 1.0


@dataclass
class _Work:
    """What is due of one experiment, at most."""

    experiment: Experiment
    num_runs: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_runs * self.experiment.steps * self.experiment.batch_size * self.experiment.seq_len

    @property
    def operations(self) -> float:
        """For each parameter, evaluation before and after training with it."""
        evaluated = 2 * self.num_runs * self.experiment.held_out_rows * self.experiment.seq_len
        return _STEP * self.num_tokens + _FORWARD * evaluated


def show_runs(experiments: Sequence[Experiment], output_dir: Path, console: Console, retry_failed: bool = False) -> None:
    """List the runs that are due, and how long they take by the speed of one matrix product on this machine."""
    runner = Runner(output_dir, "", console, lambda _: None, retry_failed)
    runner.check(experiments)
    for dataset, aside in {(one.dataset, one.held_out_from_last) for one in experiments}:
        if Path(dataset).expanduser().exists():  # what a hub has is not fetched for this
            enough_rows(dataset, aside)
    shown = Table("Run", "Steps × rows × tokens", box=None)
    listed: list[RunSpec] = []
    works = []
    for experiment in experiments:
        records = [record for record in map(runner.found, sweep(experiment)) if record is not None]
        specs = sweep(experiment)
        known = {spec.run for spec in specs}
        specs += [spec for spec in further_seeds(experiment, records) if spec.run not in known]
        due = [spec for spec in specs if runner.found(spec) is None and not _is_supplied(spec, listed)]
        listed += due
        size = f"{experiment.steps} × {experiment.batch_size} × {experiment.seq_len}"
        for spec in due:
            shown.add_row(spec.run, size)
        hidden = num_runs(experiment) - len(specs)
        if hidden:
            shown.add_row(Text(f"{experiment.name}: {hidden} more at the best rate of each sweep", style="dim"), size)
        works.append(_Work(experiment, len(due) + hidden))
    print_table(console, shown)
    for experiment in experiments:
        note = too_few_steps(experiment.steps) if experiment.kind == "memory" else None
        if note is not None:
            console.print(f"{experiment.name}: {note}; raise steps.")
    seconds = _seconds([work for work in works if work.num_runs], console)
    console.print(
        f"{sum(work.num_runs for work in works)} runs, {sum(work.num_tokens for work in works):,} tokens at most; about "
        f"{in_time(seconds)} (h:mm:ss, or mm:ss) by the speed of one matrix product here; half of it or twice as much would be "
        "no surprise."
    )


def _is_supplied(spec: RunSpec, listed: Sequence[RunSpec]) -> bool:
    """Whether an earlier experiment does the very same work, whose record is then taken over."""
    others = (other for other in listed if other.experiment != spec.experiment)
    return any(spec.named_here(other.record("ok")) is not None for other in others)


def _seconds(works: Sequence[_Work], console: Console) -> float:
    """Loading the model in every run, training and evaluating, by each experiment's number format."""
    speeds: dict[torch.dtype, float] = {}
    models: dict[tuple[str, str], tuple[int, float]] = {}
    total = 0.0
    for work in works:
        one = work.experiment
        key = (one.model, one.weights_dtype)
        if key not in models:
            models[key] = _size_and_loading(*key, console)
        num_parameters, loading = models[key]
        dtype = torch.float32 if one.dtype == "float32" else torch.bfloat16  # mixed computes in the latter
        if dtype not in speeds:
            speeds[dtype] = _operations_per_second(dtype)
        total += work.num_runs * loading + _OVERHEAD * num_parameters * work.operations / speeds[dtype]
    return total


def _size_and_loading(model: str, dtype: str, console: Console) -> tuple[int, float]:
    """A model's number of parameters, and the seconds until a run has it: at the first time it may have to be fetched."""
    with quiet_libraries(console):
        for _ in range(2):
            began = time.perf_counter()
            loaded, _tokenizer = load_model_and_tokenizer(model, dtype)
    return sum(parameter.numel() for parameter in loaded.parameters()), _SECONDS_TO_START + time.perf_counter() - began


def _operations_per_second(dtype: torch.dtype) -> float:
    """Of the fastest of a few products: some processors take seconds for one in bfloat16, which one is then enough of."""
    size = 1024
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < _MAX_PRODUCTS and sum(seconds) < _MAX_SECONDS:
        began = time.perf_counter()
        float((left @ right)[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)
