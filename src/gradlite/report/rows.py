"""Records gathered into rows: one experiment's runs of one label, judged at their best learning rate as the tables do."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gradlite.compare.record import Record
from gradlite.compare.tables import at_best_rate, by_name


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
        known = [loss for record in self.best if (loss := record.final_held_out_loss) is not None]
        return Range(statistics.fmean(known), min(known), max(known), len(known)) if known else None

    @property
    def peak_bytes(self) -> float | None:
        return _median(record.memory.peak_bytes for record in self.best if record.memory)

    @property
    def peak_above_weights_bytes(self) -> float | None:
        return _median(record.memory.peak_above_weights_bytes for record in self.best if record.memory)

    @property
    def tokens_per_second(self) -> float | None:
        return _median(record.tokens_per_second.median for record in self.best if record.tokens_per_second)

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
    """The experiments in the order in which they come; their rows by loss, or else by memory, those without a result last."""
    experiments = dict.fromkeys(record.experiment for record in records)
    return [Group(name, _rows([record for record in records if record.experiment == name])) for name in experiments]


def _rows(records: Sequence[Record]) -> list[Row]:
    in_order = sorted(records, key=lambda record: (record.seed, record.lr))
    rows = [Row(name, runs[0].method, runs, at_best_rate(runs)) for name, runs in by_name(in_order).items()]
    return sorted(rows, key=lambda row: (row.loss.mean if row.loss else math.inf, row.peak_bytes or math.inf))


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None
