"""The `gradlite` command: its verbs, `--version`, and how a mistake is told (one sentence on stderr, exit code 2)."""

import errno
import io
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from gradlite.cli.compare import compare
from gradlite.cli.flags import KEEP_UNKNOWN
from gradlite.cli.report import report
from gradlite.cli.train import train
from gradlite.errors import GradLiteError
from gradlite.train.huge_pages import ask_for_huge_pages

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # which name no file where it was open already

app = typer.Typer(invoke_without_command=True, add_completion=False, pretty_exceptions_enable=False)
app.command(context_settings=KEEP_UNKNOWN)(train)
app.command()(compare)
app.command()(report)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gradlite {version('gradlite-llm')}")
        raise typer.Exit


@app.callback()
def _gradlite(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """GradLite: fine-tune all weights of a language model in little memory, with approximate gradients."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command line and end the process with its exit code: 0; 1 where all runs failed; 2 for bad input; 130 when
    interrupted.
    """
    ask_for_huge_pages()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no ⟦ must not end a run
    try:
        sys.exit(app(prog_name="gradlite", standalone_mode=False))
    except (GradLiteError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        _tell(message)
    except OSError as error:
        if error.errno in _FULL:
            _tell(f"a file could not be written: {error.strerror}; make room on the disk, or write to another.")
        if error.filename is None:
            raise
        _tell(f"{str(error.filename)!r} cannot be used: {error.strerror}; give another path, or the rights to it.")


def _tell(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    sys.exit(2)
