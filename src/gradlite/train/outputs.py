"""What a finished run leaves: the model in Hugging Face format, its tokenizer, a model card and a picture."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradlite.evaluate.answers import Answer
from gradlite.measure.machine import machine
from gradlite.measure.versions import versions
from gradlite.train.card import Result, model_card
from gradlite.train.config import TrainConfig
from gradlite.train.directory import RunDirectory
from gradlite.train.files import staged, write_text
from gradlite.train.picture import draw_loss
from gradlite.train.words import in_time


def save_outputs(
    directory: RunDirectory,
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    result: Result,
) -> None:
    """Write everything into the run's directory; run.json, which says that the run is finished, last."""
    made_with = versions(("torch", "transformers"))
    origin = {"versions": made_with, "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    with directory.failed_writes_told():
        with staged(directory.path) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            write_text(folder / "README.md", model_card(config, result, made_with))
            draw_loss(directory.read_metrics(), folder / "loss.png")
        directory.write_record({"status": "finished", **asdict(result), **origin})


def show_answers(console: Console, before: Sequence[dict[str, str]], after: Sequence[Answer]) -> None:
    """The held-out questions with the model's answers before and after."""
    for old, new in zip(before, after, strict=True):
        console.print()
        for title, text, style in (
            ("question", new.question, "bold"),
            ("expected", new.expected, "dim"),
            ("before", old["answer"], ""),
            ("after", new.answer, "green"),
        ):
            console.print(Text(f"{title:>9}  ").append(_short(text), style=style))


def show_result(console: Console, result: Result, path: Path) -> None:
    """The last lines of a run."""
    console.print(
        f"\nheld-out loss {result.loss_before:.4f} → {result.loss_after:.4f} ({-result.fall:+z.1%}) "
        f"in {result.steps} steps, {in_time(result.seconds)}"
        + (f"; {result.skipped_steps} steps skipped" if result.skipped_steps else "")
    )
    console.print(Text(f"model, tokenizer, README.md, metrics.jsonl, config.yaml and loss.png are in {path}"))


def _short(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
