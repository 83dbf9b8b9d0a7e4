"""What a comparison leaves beside its records: its tables as Markdown and CSV, and its figures."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from gradlite.compare.experiment import Experiment
from gradlite.compare.figures import draw_losses, draw_memory, draw_trade_off
from gradlite.compare.record import Record
from gradlite.compare.runs import other_work
from gradlite.compare.tables import (
    Table,
    category_table,
    memory_table,
    quality_table,
    ratio_table,
    to_csv,
    to_markdown,
)
from gradlite.compare.terminal import print_table, to_rich
from gradlite.train.files import write_text


def records_of(experiment: Experiment, records: Sequence[Record]) -> list[Record]:
    """The records of this experiment's work, rows in its order; methods that were added by name come last."""
    labels = [entry.label for entry in experiment.methods]
    own = [record for record in records if other_work(experiment, record) is None]
    return sorted(own, key=lambda record: labels.index(record.name) if record.name in labels else len(labels))


def tables_of(experiments: Sequence[Experiment], records: Sequence[Record]) -> dict[str, Table]:
    """The tables by the name of their file; experiments without a record yet have none."""
    found = {}
    for experiment in experiments:
        own, first_seed = records_of(experiment, records), experiment.seeds[0]
        title = experiment.title or experiment.name
        if not own:
            continue
        if experiment.kind == "memory":
            found[experiment.name] = memory_table(own, title, first_seed)
            ratios = ratio_table(own, f"{title}: ratios", experiment.baselines, first_seed)
            if len(ratios.columns) > 1:  # without a baseline there are none
                found[f"{experiment.name}-ratios"] = ratios
            by_category = category_table(own, f"{title}: bytes at the moment of the peak", first_seed)
            found[f"{experiment.name}-categories"] = by_category
        else:
            found[experiment.name] = quality_table(own, title, experiment.baselines, first_seed)
    return found


def write_tables(output_dir: Path, experiments: Sequence[Experiment], records: Sequence[Record]) -> None:
    """Write all tables to ``tables.md``, and each to a CSV file of its own."""
    tables = tables_of(experiments, records)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "tables.md", "\n".join(to_markdown(table) for table in tables.values()))
    for name, table in tables.items():
        write_text(output_dir / f"{name}.csv", to_csv(table))


def draw_figures(output_dir: Path, experiments: Sequence[Experiment], records: Sequence[Record]) -> list[Path]:
    """Draw what can be drawn of each experiment, and return the files."""
    drawn = []
    for experiment in experiments:
        own = records_of(experiment, records)
        for name, draw in (("memory", draw_memory), ("losses", draw_losses), ("trade-off", draw_trade_off)):
            path = output_dir / f"{experiment.name}-{name}.png"
            if not (name == "losses" and experiment.kind == "memory") and draw(own, path, experiment.seeds[0]):
                drawn.append(path)
    return drawn


def show_tables(console: Console, experiments: Sequence[Experiment], records: Sequence[Record]) -> None:
    """Print all tables."""
    for table in tables_of(experiments, records).values():
        print_table(console, to_rich(table, console.width if console.is_terminal else None))
