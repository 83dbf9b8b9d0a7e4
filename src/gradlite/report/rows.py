"""Records gathered into the rows of a table: one experiment's runs of one label, judged at their best learning rate."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gradlite.compare.record import Record, Spread


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
        return _range(record.final_held_out_loss for record in self.best)

    @property
    def peak_bytes(self) -> float | None:
        return _median(record.memory.peak_bytes for record in self.best if record.memory)

    @property
    def peak_above_weights_bytes(self) -> float | None:
        return _median(record.memory.peak_above_weights_bytes for record in self.best if record.memory)

    @property
    def process_peak_bytes(self) -> float | None:
        return _median(record.memory.process_peak_above_weights_bytes for record in self.best if record.memory)

    @property
    def tokens_per_second(self) -> Range | None:
        """Median of the runs' medians, and the slowest and fastest step of all."""
        return self._speed(lambda record: record.tokens_per_second)

    @property
    def samples_per_second(self) -> Range | None:
        return self._speed(lambda record: record.samples_per_second)

    @property
    def sweep(self) -> list[tuple[float, Range | None]]:
        """Every learning rate that was tried, with the losses it came to (None: no run of it succeeded)."""
        rates = sorted({record.lr for record in self.runs})
        return [(lr, _range(r.final_held_out_loss for r in self.runs if r.lr == lr and r.status == "ok")) for lr in rates]

    @property
    def shown(self) -> Record | None:
        """The run that stands for the row where only one can be drawn: at the best rate, the lowest seed."""
        return min(self.best, key=lambda record: record.seed, default=None)

    def _speed(self, spread_of: Callable[[Record], Spread | None]) -> Range | None:
        spreads = [spread for record in self.best if (spread := spread_of(record)) is not None]
        if not spreads:
            return None
        medians = [spread.median for spread in spreads]
        low, high = min(s.min for s in spreads), max(s.max for s in spreads)
        return Range(statistics.median(medians), low, high, len(spreads))


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
        """The row that others are compared with: checkpointed AdamW where memory is the matter, else AdamW."""
        wanted = ("adamw",) if any(row.loss for row in self.rows) else ("adamw-checkpointed", "adamw")
        found = (row for method in wanted for row in self.rows if row.method == method and row.best)
        return next(found, None)


def group(records: Sequence[Record]) -> list[Group]:
    """The experiments in the order in which they come, their rows likewise."""
    experiments = dict.fromkeys(record.experiment for record in records)
    return [Group(name, _rows([r for r in records if r.experiment == name])) for name in experiments]


def _rows(records: Sequence[Record]) -> list[Row]:
    names = dict.fromkeys(record.name for record in records)
    by_name = {name: [record for record in records if record.name == name] for name in names}
    return [Row(name, runs[0].method, runs, _best(runs)) for name, runs in by_name.items()]


def _best(runs: Sequence[Record]) -> list[Record]:
    """The finished runs at one rate: that which most seeds ran (a sweep's winner goes to the others), of several the best."""

    def rank(lr: float) -> tuple[float, float]:
        losses = [r.final_held_out_loss for r in runs if r.lr == lr and r.final_held_out_loss is not None]
        return -len({r.seed for r in runs if r.lr == lr}), statistics.fmean(losses) if losses else float("inf")

    done = [record for record in runs if record.status == "ok"]
    chosen = min({record.lr for record in done}, key=rank, default=None)
    return [record for record in done if record.lr == chosen]


def _range(values: Iterable[float | None]) -> Range | None:
    known = [value for value in values if value is not None]
    return Range(statistics.fmean(known), min(known), max(known), len(known)) if known else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
