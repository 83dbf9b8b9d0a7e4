"""`gradlite compare`: a preset or an experiment file, and flags that override it → one record a run, tables and figures."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gradlite.cli.interrupt import ending_interrupts
from gradlite.compare.experiment import Experiment, all_tables, choose_experiments, load_experiment, restrict
from gradlite.errors import GradLiteError
from gradlite.methods import unknown

_WORK = "Work"
_DEFAULT_PRESET = "paper-small"
_THEOREM = "theorem"


def _option(metavar: str, text: str, panel: str = _WORK) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel=panel, show_default=False)


def compare(
    preset: Annotated[
        str | None, _option("NAME", "'paper-small' (default): three tables; 'theorem': convex problems.", "Comparison")
    ] = None,
    experiment: Annotated[Path | None, _option("PATH", "An experiment of your own, as a YAML file.", "Comparison")] = None,
    tables: Annotated[str | None, _option("NUMBERS", "Only these tables of the preset, such as 1,3.", "Comparison")] = None,
    methods: Annotated[
        str | None, _option("NAMES", "Only these methods (or rows), such as adamw,galore,gradlite.", "Comparison")
    ] = None,
    model: Annotated[str | None, _option("TEXT", "Model: 'smollm2' (embedded), a path, or a hub id.")] = None,
    dataset: Annotated[str | None, _option("TEXT", "Data: 'python-help' (embedded), a path, or a hub id.")] = None,
    steps: Annotated[int | None, _option("INTEGER", "Optimizer steps of each run.")] = None,
    lr: Annotated[str | None, _option("NUMBERS", "Learning rates that every method tries, such as 1e-4,3e-4.")] = None,
    seeds: Annotated[str | None, _option("NUMBERS", "Seeds; the first one tries all rates, such as 0,1,2.")] = None,
    batch_size: Annotated[int | None, _option("INTEGER", "Sequences in one step.")] = None,
    seq_len: Annotated[int | None, _option("INTEGER", "Longest sequence, in tokens.")] = None,
    dtype: Annotated[str | None, _option("CHOICE", "bfloat16, float32, or mixed (float32 weights).")] = None,
    output_dir: Annotated[
        Path | None,
        _option("PATH", "Directory of records, tables and figures (default: runs/compare/PRESET_OR_FILE).", "Output"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs only.", rich_help_panel="Output")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do runs again that failed.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Compare ways to train on the same work: one process and one record a run; tables and figures of all.

    The same command again does what is still missing. A method that fails keeps its row, with the reason.
    """
    if preset is not None and experiment is not None:
        raise GradLiteError("--preset and --experiment exclude each other: give one of them.")
    console = Console(soft_wrap=True)
    if preset == _THEOREM:
        flags = {
            "--tables": tables, "--methods": methods, "--model": model, "--dataset": dataset, "--steps": steps, "--lr": lr,
            "--seeds": seeds, "--batch-size": batch_size, "--seq-len": seq_len, "--dtype": dtype,
            "--dry-run": dry_run or None, "--retry-failed": retry_failed or None,
        }  # fmt: skip
        unused = [flag for flag, value in flags.items() if value is not None]
        if unused:
            raise GradLiteError(f"--preset theorem has no {unused[0]}: it takes --output-dir alone.")
        from gradlite.compare.theorem import run_theorem  # brings torch

        run_theorem(output_dir or Path("runs/compare") / _THEOREM, console)
        return
    given = {
        "model": model,
        "dataset": dataset,
        "steps": steps,
        "learning_rates": _numbers("--lr", lr, float),
        "seeds": _numbers("--seeds", seeds, int),
        "batch_size": batch_size,
        "seq_len": seq_len,
        "dtype": dtype,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    names = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    twice = next((name for name in names or () if (names or []).count(name) > 1), None)
    if twice is not None:
        raise GradLiteError(f"--methods names {twice!r} twice.")
    if experiment is not None:
        if tables is not None:
            raise GradLiteError("--tables belongs to --preset; an experiment file makes one table.")
        everything = [load_experiment(experiment, overrides)]
        chosen = everything if names is None else restrict(everything, names)
    else:
        chosen = choose_experiments(preset or _DEFAULT_PRESET, _numbers("--tables", tables, int), names, overrides)
        everything = all_tables(preset or _DEFAULT_PRESET, overrides)
    directory = output_dir or Path("runs/compare") / (experiment.stem if experiment else preset or _DEFAULT_PRESET)
    _check_methods(chosen)
    _warn_of_slow_bfloat16(chosen, console)
    if dry_run:
        from gradlite.compare.dry_run import show_runs  # brings torch

        show_runs(chosen, directory, console, retry_failed)
        return
    _run(chosen, everything, directory, console, retry_failed)


def _run(chosen: list[Experiment], everything: list[Experiment], directory: Path, console: Console, retry_failed: bool) -> None:
    """Do the runs of ``chosen``; the files that are written show all records of ``everything`` that are there."""
    from gradlite.compare.outputs import draw_figures, show_tables, write_tables  # brings matplotlib
    from gradlite.compare.runner import Runner
    from gradlite.compare.runs import num_runs

    runner = Runner(directory, _command(), console, lambda records: write_tables(directory, everything, records), retry_failed)
    try:
        with ending_interrupts():  # or the run's process would go on alone
            done = runner.run(chosen)
    except KeyboardInterrupt:
        typer.echo(f"stopped: the same command goes on with the runs that have no record in {directory}.", err=True)
        raise typer.Exit(130) from None
    show_tables(console, chosen, runner.records)
    for path in draw_figures(directory, chosen, runner.records):
        console.print(f"drawn {path}")
    console.print(f"records, tables and figures are in {directory}")
    failed = sum(record.status != "ok" for record in done)
    if failed:
        console.print(f"{failed} of {len(done)} runs failed, for the reasons in the tables; --retry-failed does them again.")
        left_out = sum(map(num_runs, chosen)) - len(done)
        if left_out:
            console.print(f"{left_out} further runs were not begun: seeds of rows of which no rate succeeded.")
    if failed == len(done):
        raise typer.Exit(1)


def _warn_of_slow_bfloat16(chosen: list[Experiment], console: Console) -> None:
    from gradlite.measure.machine import multiplies_bfloat16  # brings torch

    if any(one.dtype != "float32" for one in chosen) and not multiplies_bfloat16():
        console.print(
            "This CPU has no fast bfloat16 products: runs may take twenty times as long as with --dtype float32.",
            style="yellow",
        )


def _check_methods(chosen: list[Experiment]) -> None:
    """An unknown name is told at once, not as a failed run of each table."""
    for name in (entry.method for experiment in chosen for entry in experiment.methods):
        wrong = unknown(name)
        if wrong is not None:
            raise GradLiteError(wrong)


def _numbers(flag: str, text: str | None, kind: Callable[[str], Any]) -> list[Any] | None:
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise GradLiteError(f"{flag} is {text!r}, but it must be numbers with commas between them.") from None


def _command() -> str:
    """The command line as the records keep it: paths outside of the working directory by their last part."""
    words = []
    for word in sys.argv[1:]:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(flag + equals + (Path(value).name if value.startswith(("/", "~", "..")) else value))
    return shlex.join(["gradlite", *words])
