"""What is to be run: one specification a run, and the learning rate that the other seeds get."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from gradlite.compare.experiment import Experiment, MethodEntry
from gradlite.compare.fingerprint import fingerprint
from gradlite.compare.record import Record, Status

STEP = "step "
"""What a worker's line about a step begins with on its standard output, before a JSON object; libraries write other lines."""

NOTICE = "notice: "
"""What a line about its data begins with in a worker's log, which is no reason for its end."""

BAD_INPUT = 2
"""A worker's exit code where model or data cannot be had, so that no run can be done; its last line says why."""


WATCHED_STEPS = 3
"""The memory of the last of them is reported: by then every method has its state."""

_NAMES = frozenset({"experiment", "run", "label"})
"""What a run is called, as against what it does."""

_FINGERPRINTS = ("model_fingerprint", "dataset_fingerprint")
"""Keys of a record that its run's specification has no key of the same name for."""


class RunSpec(BaseModel):
    """All that a worker needs to know of its run."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    experiment: str
    run: str
    label: str
    method: str
    options: dict[str, Any]
    model: str
    dataset: str
    held_out_from_last: int
    held_out_rows: int
    full_rows: bool
    dtype: str
    batch_size: int
    seq_len: int
    steps: int
    schedule: str
    warmup_steps: int
    max_grad_norm: float
    lr: float
    seed: int

    def record(self, status: Status, reason: str | None = None, **measured: Any) -> Record:
        """This run's record. Paths of this machine do not go into it: files and directories are named by their last part."""
        own = self.model_dump(exclude={"options"})
        own["options"] = {**self.options, "max_grad_norm": self.max_grad_norm}
        own |= {"model": public_name(self.model), "dataset": public_name(self.dataset)}
        own |= {"model_fingerprint": fingerprint(self.model), "dataset_fingerprint": fingerprint(self.dataset)}
        if reason is not None:
            reason = _without_places(_without_places(reason, self.model), self.dataset)
        return Record.model_validate({**own, "status": status, "reason": reason, **measured})

    def differs_from(self, record: Record) -> str | None:
        """The first key in which a record of the same name belongs to other work, or None."""
        return next(iter(self.differences(record)), None)

    def named_here(self, record: Record) -> Record | None:
        """Another experiment's record of the very same work, under this run's names; None where anything but names differs."""
        if set(self.differences(record)) - _NAMES:
            return None
        return record.model_copy(update={"taken_from": record.run, **{name: getattr(self, name) for name in _NAMES}})

    def differences(self, record: Record) -> list[str]:
        """The keys in which a record is of other work. One that the record lacks (older ones lack six) says nothing."""
        mine = self.record("ok")
        keys = [key for key in (*RunSpec.model_fields, *_FINGERPRINTS) if key != "options"]
        same = {key: {None, getattr(mine, key)} for key in keys}
        different = [key for key, values in same.items() if getattr(record, key) not in values]
        own_options = {key: value for key, value in record.options.items() if key != "max_grad_norm"}
        return different if own_options == self.options else [*different, "options"]


def public_name(source: str) -> str:
    """The last part of a path that exists here; hub ids and names of what is embedded as they are."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() else source


def _without_places(text: str, source: str) -> str:
    """The text without where ``source`` lies on this machine; a name without a directory (``.`` too) tells nothing of that."""
    path = Path(source).expanduser()
    written = {source.rstrip("/"), str(path), str(path.resolve())} if path.exists() or path.is_absolute() else set()
    for place in sorted((place for place in written if "/" in place and place.strip("/.")), key=len, reverse=True):
        text = re.sub(re.escape(place) + r"(?![\w-])", lambda _: public_name(source), text)
    return text


def spec_of(experiment: Experiment, entry: MethodEntry, lr: float, seed: int) -> RunSpec:
    """One run of one row."""
    shared = {"title", "kind", "name", "warmup", "seeds", "baselines", "methods", "learning_rates", "rates"}
    return RunSpec(
        **experiment.model_dump(exclude=shared),
        experiment=experiment.name,
        run=f"{experiment.name}-{entry.slug}-lr{lr:g}-seed{seed}",
        label=entry.label,
        method=entry.method,
        options=entry.options,
        warmup_steps=experiment.warmup_steps,
        lr=lr,
        seed=seed,
    )


def other_work(experiment: Experiment, record: Record) -> str | None:
    """The first key in which a record is of other work than this experiment's, whichever its method, options, rate and seed."""
    spec = same_work(experiment, record)
    return next((key for key in spec.differences(record) if key not in ("run", "label", "method", "options")), None)


def same_work(experiment: Experiment, record: Record) -> RunSpec:
    """A run of this experiment at a record's rate and seed, of whichever row."""
    return spec_of(experiment, experiment.methods[0], record.lr, record.seed)


def sweep(experiment: Experiment) -> list[RunSpec]:
    """The first seed of every row at each of its learning rates."""
    return [
        spec_of(experiment, entry, lr, experiment.seeds[0]) for entry in experiment.methods for lr in experiment.rates_of(entry)
    ]


def further_seeds(experiment: Experiment, records: Sequence[Record]) -> list[RunSpec]:
    """The other seeds of every row at its best learning rate, seed by seed; nothing for rows whose sweep is not done yet, or
    had no success.
    """
    sweeps = {entry.label: (experiment.rates_of(entry), _sweep_of(experiment, entry, records)) for entry in experiment.methods}
    best = {label: best_rate(done) if len(done) == len(rates) else None for label, (rates, done) in sweeps.items()}
    found = ((seed, entry, best[entry.label]) for seed in experiment.seeds[1:] for entry in experiment.methods)
    return [spec_of(experiment, entry, lr, seed) for seed, entry, lr in found if lr is not None]


def too_few_steps(steps: int) -> str | None:
    """What a reader must know of the memory of a run of so few steps, or None."""
    if steps >= WATCHED_STEPS:
        return None
    return f"memory of step {steps}, not {WATCHED_STEPS}: what a method makes in its first steps may be missing"


def num_runs(experiment: Experiment) -> int:
    """How many runs there are if every row's sweep succeeds."""
    return len(sweep(experiment)) + len(experiment.methods) * (len(experiment.seeds) - 1)


def best_rate(records: Iterable[Record]) -> float | None:
    """The rate of the lowest final held-out loss; the lowest rate of runs that evaluated nothing; None where none succeeded."""
    done = [record for record in records if record.status == "ok"]
    if done and not any(record.held_out for record in done):
        return min(record.lr for record in done)
    if len({record.lr for record in done}) == 1:
        return done[0].lr
    judged = [(record.final_held_out_loss, record.lr) for record in done if record.final_held_out_loss is not None]
    return min(judged)[1] if judged else None


def _sweep_of(experiment: Experiment, entry: MethodEntry, records: Sequence[Record]) -> list[Record]:
    own = {spec_of(experiment, entry, lr, experiment.seeds[0]).run for lr in experiment.rates_of(entry)}
    return [record for record in records if record.run in own]
