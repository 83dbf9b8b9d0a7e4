"""The picture of a run: training loss by step, its running mean, and the held-out loss."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gradlite.train.words import running_mean

_WINDOW = 20


def draw_loss(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the lines of metrics.jsonl into a PNG file. Skipped steps, whose loss is not finite, are left out."""
    steps = [(line["step"], line["loss"]) for line in metrics if line.get("loss") is not None]
    held_out = [(line["step"], line["eval_loss"]) for line in metrics if line.get("eval_loss") is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if steps:
        axes.plot(*zip(*steps, strict=True), color="0.75", linewidth=1, label="training, by step")
        losses = [loss for _, loss in steps]
        axes.plot(
            [step for step, _ in steps], running_mean(losses, _WINDOW), color="C0", label=f"training, mean of {_WINDOW} steps"
        )
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="C1", marker="o", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=120)
