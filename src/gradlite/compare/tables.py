"""From records to tables, and from tables to Markdown and CSV. Pure, and light.

A row is a method with its options (the records' ``label``); rows stand in the order of their first records. A method without a
single good run keeps its row, with the reason. Ratios are against the row named as baseline in the same records.
``first_seed``: the seed whose sweep decides about the rate, as in the runs themselves.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from gradlite.compare.record import ByCategory, Record
from gradlite.compare.runs import best_rate, too_few_steps

NONE = "–"
REMARK = "Remark"
_GB = 1e9


@dataclass(frozen=True)
class Table:
    """Text cells under text headings; units stand in the headings."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def memory_table(records: Sequence[Record], title: str, first_seed: int | None = None) -> Table:
    """Peak memory above the weights and throughput: the median of the runs with equal batches, and the lowest and highest."""
    table = []
    for name, runs in by_name(records).items():
        alike = with_equal_batches(at_best_rate(runs, first_seed), first_seed)
        process = [
            run.memory.process_peak_above_weights_bytes / _GB
            for run in alike
            if run.memory and run.memory.process_peak_above_weights_bytes is not None
        ]
        samples = [run.samples_per_second.median for run in alike if run.samples_per_second]
        table.append(
            (
                name,
                _middle(_peaks(alike), ".3f"),
                _middle(process, ".3f"),
                _middle(_speeds(alike), ".1f"),
                _range(_speeds(alike), ".1f"),
                _middle(samples, ".3f"),
                str(len(alike)),
                "; ".join(filter(None, [_remark(runs), _short(alike), _one_of_rates(runs, alike)])),
            )
        )
    columns = (
        "Method",
        "Peak above weights (GB)",
        "Process peak above weights (GB)",
        "Tokens/s (median)",
        "Tokens/s (runs' range)",
        "Samples/s",
        "Runs",
        REMARK,
    )
    return Table(title, columns, tuple(table), _work_notes(records))


def ratio_table(records: Sequence[Record], title: str, baselines: Sequence[str], first_seed: int | None = None) -> Table:
    """Median peak above the weights and median throughput of each row, divided by those of the rows named as baselines."""
    rows = {name: with_equal_batches(at_best_rate(runs, first_seed), first_seed) for name, runs in by_name(records).items()}
    known = [name for name in baselines if name in rows]
    table = [
        (
            name,
            *(_ratio(_peaks(runs), _peaks(rows[other])) for other in known),
            *(_ratio(_speeds(runs), _speeds(rows[other])) for other in known),
        )
        for name, runs in rows.items()
    ]
    columns = ("Method", *(f"Peak ÷ {other}" for other in known), *(f"Tokens/s ÷ {other}" for other in known))
    return Table(title, columns, tuple(table))


def category_table(records: Sequence[Record], title: str, first_seed: int | None = None) -> Table:
    """What lived at the moment of the peak, by what it was for: the median of the runs of each row."""
    categories = list(ByCategory.model_fields)
    table = []
    for name, runs in by_name(records).items():
        alike = with_equal_batches(at_best_rate(runs, first_seed), first_seed)
        found = [run.memory.by_category_bytes for run in alike if run.memory and run.memory.by_category_bytes]
        cells = [_middle([getattr(one, category) / _GB for one in found], ".3f") for category in categories]
        table.append((name, *cells))
    columns = ("Method", *(f"{category.replace('_', ' ').capitalize()} (GB)" for category in categories))
    return Table(title, columns, tuple(table))


def quality_table(records: Sequence[Record], title: str, baselines: Sequence[str] = (), first_seed: int | None = None) -> Table:
    """Held-out loss: every rate of the sweep on its seed, and at the best rate the mean over the seeds, lowest and highest.

    Differences to baselines are of the means over the seeds that both rows have.
    """
    rows = by_name(records)
    finals = {name: _by_seed(at_best_rate(runs, first_seed)) for name, runs in rows.items()}
    known = [name for name in baselines if name in rows]
    table = []
    for name, runs in rows.items():
        swept = sorted(sweep_of(runs, first_seed), key=lambda run: run.lr)
        best = best_rate(swept)
        table.append(
            (
                name,
                ", ".join(f"{run.lr:g}: {_sweep_cell(run)}" for run in swept),
                NONE if best is None else f"{best:g}",
                f"{mean(finals[name].values()):.4f}" if finals[name] else NONE,
                _range(list(finals[name].values()), ".4f"),
                str(len(finals[name])),
                *(_percent(finals[name], finals[other]) for other in known),
                "; ".join(filter(None, [_remark(runs), _edge(swept, best), _rise(at_best_rate(runs, first_seed))])),
            )
        )
    columns = (
        "Method",
        "Held-out loss by learning rate, first seed (nats/token)",
        "Best rate",
        "Held-out loss, mean over seeds (nats/token)",
        "Lowest–highest seed",
        "Seeds",
        *(f"Against {other} (%)" for other in known),
        REMARK,
    )
    before = next((run.held_out[0].loss for run in records if run.held_out and run.held_out[0].step == 0), None)
    notes = () if before is None else (f"Held-out loss before training: {before:.4f}.",)
    return Table(title, columns, tuple(table), (*_work_notes(records), *notes))


def by_name(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by the name of their row, in order."""
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record.name, []).append(record)
    return rows


def sweep_of(runs: Sequence[Record], first_seed: int | None = None) -> list[Record]:
    """The runs of the first seed; where that is not told, or ran nothing, of the seed that ran the most rates."""
    seeds = [run.seed for run in runs]
    chosen = first_seed if first_seed in seeds else max(seeds, key=seeds.count, default=None)
    return [run for run in runs if run.seed == chosen]


def with_equal_batches(runs: Sequence[Record], first_seed: int | None = None) -> list[Record]:
    """The runs whose memory and speed say something beside other rows': all, where every step has as many tokens, and else
    those of the first seed (where that is not told, of the lowest), which gives all rows the same batches.
    """
    if all(run.full_rows or (run.full_rows is None and not run.held_out) for run in runs):  # older records do not tell
        return list(runs)
    chosen = min(run.seed for run in runs) if first_seed is None else first_seed
    return [run for run in runs if run.seed == chosen]


def at_best_rate(runs: Sequence[Record], first_seed: int | None = None) -> list[Record]:
    """The good runs of one row at the rate that was best on the first seed."""
    best = best_rate(sweep_of(runs, first_seed))
    return [run for run in runs if run.lr == best and run.status == "ok"]


def to_markdown(table: Table) -> str:
    """A heading, a pipe table, the notes."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = [f"## {table.title}", "", line(table.columns), line("---" for _ in table.columns), *map(line, table.rows)]
    return "\n".join([*lines, *(part for note in table.notes for part in ("", note)), ""])


def to_csv(table: Table) -> str:
    """The columns and rows alone."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.columns, *table.rows])
    return text.getvalue()


def _peaks(runs: Iterable[Record]) -> list[float]:
    return [run.memory.peak_above_weights_bytes / _GB for run in runs if run.memory]


def _speeds(runs: Iterable[Record]) -> list[float]:
    return [run.tokens_per_second.median for run in runs if run.tokens_per_second]


def _by_seed(runs: Iterable[Record]) -> dict[int, float]:
    return {run.seed: run.final_held_out_loss for run in runs if run.final_held_out_loss is not None}


def _middle(values: Sequence[float], form: str) -> str:
    return format(median(values), form) if values else NONE


def _range(values: Sequence[float], form: str) -> str:
    return f"{min(values):{form}}–{max(values):{form}}" if values else NONE


def _ratio(values: Sequence[float], others: Sequence[float]) -> str:
    return f"{median(values) / median(others):.2f}" if values and others else NONE


def _percent(values: Mapping[int, float], others: Mapping[int, float]) -> str:
    both = values.keys() & others.keys()
    if not both:
        return NONE
    return f"{100 * (mean(values[seed] for seed in both) / mean(others[seed] for seed in both) - 1):+z.2f}"


def _sweep_cell(run: Record) -> str:
    return run.status.replace("_", " ") if run.final_held_out_loss is None else f"{run.final_held_out_loss:.4f}"


def _remark(runs: Sequence[Record]) -> str:
    """Why runs failed, and what was different about those that did not."""
    reasons = [
        run.reason if run.status == "ok" else f"{run.status.replace('_', ' ')}: {run.reason}" for run in runs if run.reason
    ]
    unclipped = any(run.status == "ok" and _is_unclipped(run) for run in runs)
    return "; ".join(dict.fromkeys([*reasons, *(["gradients not clipped"] if unclipped else [])]))


def _is_unclipped(run: Record) -> bool:
    """Whether the method could not clip as it was asked to; some clip on their own (LOMO's ``clip_grad_norm``)."""
    asked = run.max_grad_norm is None or run.max_grad_norm > 0  # older records do not tell: the default asks
    return asked and run.options.get("max_grad_norm", 1.0) is None and run.options.get("clip_grad_norm") is None


def _short(runs: Sequence[Record]) -> str | None:
    """Said of memory that was measured before every method has its state."""
    return next((note for run in runs if run.memory is not None and (note := too_few_steps(run.steps))), None)


def _one_of_rates(runs: Sequence[Record], shown: Sequence[Record]) -> str | None:
    """Said of runs that evaluated nothing at several rates, of which one's are shown."""
    several = len({run.lr for run in runs if run.status == "ok"}) > 1 and not any(run.held_out for run in runs)
    return f"at rate {shown[0].lr:g} of several" if several and shown else None


def _edge(swept: Sequence[Record], best: float | None) -> str:
    """Said where a rate outside of the sweep may be better still."""
    tried = {run.lr for run in swept}
    if best is None or len(tried) < 2 or min(tried) < best < max(tried):
        return ""
    return f"best rate is the {'lowest' if best == min(tried) else 'highest'} tried"


def _rise(runs: Sequence[Record]) -> str:
    """Said where training did harm at the best rate that was tried."""
    before = [run.held_out[0].loss for run in runs if run.held_out and run.held_out[0].step == 0]
    known = [loss for loss in before if loss is not None]
    after = _by_seed(runs).values()
    return "held-out loss rose" if known and after and mean(after) > mean(known) else ""


def _work_notes(records: Sequence[Record]) -> tuple[str, ...]:
    works = dict.fromkeys(
        f"{run.model} on {run.dataset}, {run.dtype}, {run.steps} steps of {run.batch_size} × {run.seq_len} tokens at most."
        for run in records
    )
    return (*works, *_row_notes(records), *_circumstance_notes(records))


def _row_notes(records: Sequence[Record]) -> Iterator[str]:
    """Said where fewer rows are evaluated than were put aside for it."""
    known = ((run.held_out_rows, run.evaluated_rows, run.seq_len) for run in records)
    for asked, evaluated, seq_len in dict.fromkeys(known):
        if asked is not None and evaluated is not None and evaluated < asked:
            yield (
                f"Of {asked} held-out rows {evaluated} are evaluated: the others have no question, or no answer within "
                f"{seq_len} tokens."
            )


def _circumstance_notes(records: Sequence[Record]) -> Iterator[str]:
    """What may make rows of one table no fair comparison: other versions, another machine, another model or other data."""
    for what in ("versions", "machine"):
        known = [getattr(run, what) for run in records if getattr(run, what)]
        for key in dict.fromkeys(key for one in known for key in one if key != "huge_pages"):
            values = list(dict.fromkeys(str(one[key]) for one in known if key in one))
            if len(values) > 1:
                yield f"Not all runs have the same {key.replace('_', ' ')}: {', '.join(values)}."
    if (
        len({bool(run.machine.get("huge_pages")) for run in records if run.machine}) > 1
    ):  # older records, without the key, had none
        yield "Some runs had huge pages and others had not, which changes the peaks of their processes."
    began = [run.held_out[0].loss for run in records if run.held_out and run.held_out[0].step == 0]
    losses = list(dict.fromkeys(f"{loss:.3f}" for loss in began if loss is not None))
    if len(losses) > 1:
        yield f"Runs began at different held-out losses ({', '.join(losses)}): not all had the same model and data."
