"""`gradlite train`: settings from flags and a YAML file → one call of `gradlite.train.run`."""

from pathlib import Path
from typing import Annotated

import typer

from gradlite.cli.flags import given, refuse_leftovers, with_config_flags
from gradlite.cli.interrupt import ending_interrupts
from gradlite.train.config import TrainConfig


@with_config_flags
def train(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="YAML file with the same keys as the flags (underscores for dashes); flags win."),
    ] = None,
    **flags: object,
) -> None:
    """Fine-tune all weights of a language model.

    Without flags: the embedded default model and data set, on this machine, from nothing else.
    Every flag is a key of the --config file and the other way round.
    """
    refuse_leftovers(context.args)
    settings = TrainConfig.from_sources(config, given(flags))
    try:
        with ending_interrupts():
            from gradlite.train.run import run  # brings torch and transformers, which --help must not wait for

            run(settings)
    except KeyboardInterrupt:
        how = "--resume in place of --overwrite" if settings.overwrite else "--resume"
        typer.echo(
            f"stopped: the same command with {how} goes on from the last checkpoint in {settings.run_dir}"
            " (--save-every says how often one is written).",
            err=True,
        )
        raise typer.Exit(130) from None
