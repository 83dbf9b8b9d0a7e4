"""Records gathered into rows: one experiment's runs of one label, judged at their best learning rate as the tables do."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gradlite.compare.record import Record
from gradlite.compare.tables import at_best_rate, by_name, with_equal_batches

WORK = (
    "model", "model_fingerprint", "dataset", "dataset_fingerprint", "dtype", "batch_size", "seq_len", "steps", "schedule",
    "warmup_steps", "max_grad_norm", "held_out_from_last", "held_out_rows", "full_rows",
)  # fmt: skip
"""What makes two records of an experiment comparable. Of some of these older records say nothing (None)."""


_Work = tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """Of several runs."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Row:
    """All runs of one label in one experiment. ``best``: the finished runs at the learning rate that the row stands for."""

    name: str
    method: str
    runs: list[Record]
    best: list[Record]

    @property
    def failures(self) -> list[Record]:
        return [record for record in self.runs if record.status != "ok"]

    @property
    def loss(self) -> Range | None:
        """Held-out loss after the last step."""
        by_seed = {record.seed: loss for record in self.best if (loss := record.final_held_out_loss) is not None}
        known = list(by_seed.values())  # one a seed, the last, as in the tables
        return Range(statistics.fmean(known), min(known), max(known), len(known)) if known else None

    @property
    def peak_bytes(self) -> float | None:
        return _median(record.memory.peak_bytes for record in self.alike if record.memory)

    @property
    def peak_above_weights_bytes(self) -> float | None:
        return _median(record.memory.peak_above_weights_bytes for record in self.alike if record.memory)

    @property
    def tokens_per_second(self) -> float | None:
        return _median(record.tokens_per_second.median for record in self.alike if record.tokens_per_second)

    @property
    def alike(self) -> list[Record]:
        """The runs whose memory and speed can stand beside other rows'."""
        return with_equal_batches(self.best)

    @property
    def shown(self) -> Record | None:
        """The run that stands for the row where only one can be drawn: at the best rate, the lowest seed."""
        return min(self.best, key=lambda record: record.seed, default=None)


@dataclass(frozen=True)
class Group:
    """One experiment."""

    experiment: str
    rows: list[Row]

    @property
    def records(self) -> list[Record]:
        return [record for row in self.rows for record in row.runs]

    @property
    def reference(self) -> Row | None:
        """The row that others are compared with: AdamW where losses are the matter, else checkpointed AdamW."""
        wanted = ("adamw",) if any(row.loss for row in self.rows) else ("adamw-checkpointed", "adamw")
        return next((row for method in wanted for row in self.rows if row.method == method and row.best), None)


def group(records: Sequence[Record]) -> list[Group]:
    """The experiments in the order in which they come; their rows by loss, or else by memory, those without a result last.

    Records of one experiment's name that did different work (another model, say) are groups of their own, named by it.
    """
    works: list[tuple[_Work, list[Record]]] = []
    for record in records:
        work = (record.experiment, *(getattr(record, key) for key in WORK))
        place = next((place for place, (other, _) in enumerate(works) if _agree(work, other)), None)
        if place is None:
            works.append((work, [record]))
        elif record not in works[place][1]:  # it is where the same file is given twice
            other, runs = works[place]
            works[place] = (
                tuple(mine if mine is not None else his for mine, his in zip(work, other, strict=True)),
                [*runs, record],
            )
    return [Group(_name(work, [other for other, _ in works]), _rows(runs)) for work, runs in works]


def _agree(work: _Work, other: _Work) -> bool:
    return all(mine == his or mine is None or his is None for mine, his in zip(work, other, strict=True))


def _name(work: _Work, all_works: Sequence[_Work]) -> str:
    """The experiment's, and of works that share it what tells them apart."""
    namesakes = [other for other in all_works if other[0] == work[0]]
    varying = [place for place in range(1, len(work)) if len({other[place] for other in namesakes}) > 1]
    return ", ".join([str(work[0]), *(f"{WORK[place - 1].replace('_', ' ')} {work[place]}" for place in varying)])


def _rows(records: Sequence[Record]) -> list[Row]:
    in_order = sorted(records, key=lambda record: (record.seed, record.lr))
    rows = [Row(name, runs[0].method, runs, at_best_rate(runs)) for name, runs in by_name(in_order).items()]
    return sorted(rows, key=lambda row: (row.loss.mean if row.loss else math.inf, row.peak_bytes or math.inf))


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None
