"""Records drawn: memory by category, loss against steps, and memory, quality and speed in one picture. PNG files.

Colours are Okabe and Ito's, which stay apart for the colour-blind; curves differ in their dashes as well; points have names.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, median_low
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gradlite.compare.record import ByCategory, Record
from gradlite.compare.tables import at_best_rate, by_name, with_equal_batches

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_DASHES = ("-", "--", ":")
_GB = 1e9
_WINDOW = 10
_CATEGORIES = tuple(category for category in ByCategory.model_fields if category != "weights")


def draw_memory(records: Sequence[Record], path: Path, first_seed: int | None = None) -> bool:
    """Bars of what lives at the peak of a step beside the weights, stacked by category; False where nothing was measured.

    The last part is what the categories leave: weights that a method adds (adapters), and on CUDA what the allocator rounds up.
    """
    shown = [*_CATEGORIES, "added weights and the rest"]
    bars = memory_bars(records, first_seed)
    if not bars:
        return False
    figure, axes = _figure(8, 1.6 + 0.42 * len(bars))
    left = [0.0] * len(bars)
    for number, category in enumerate(shown):
        widths = [values[number] for values in bars.values()]
        label = category.replace("_", " ")
        axes.barh(list(bars), widths, left=left, label=label, color=_COLOURS[number], edgecolor="white", linewidth=0.5)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.text(total, row, f" {total:.2f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("memory beside the weights at the peak of a training step (GB)")
    figure.legend(loc="outside upper center", ncols=len(shown), frameon=False, fontsize=8)
    _save(figure, path)
    return True


def memory_bars(records: Sequence[Record], first_seed: int | None = None) -> dict[str, list[float]]:
    """GB of each category but the weights, and of what they leave of the peak above the weights, by the name of the row.

    Of the run whose peak is the median (the lower one of two) of a row's runs with equal batches.
    """
    bars = {}
    for name, runs in by_name(records).items():
        alike = with_equal_batches(at_best_rate(runs, first_seed), first_seed)
        found = [run.memory for run in alike if run.memory and run.memory.by_category_bytes]
        if found:
            whole = median_low(memory.peak_above_weights_bytes for memory in found)
            one = next(memory.by_category_bytes for memory in found if memory.peak_above_weights_bytes == whole)
            parts = [getattr(one, category) for category in _CATEGORIES]
            bars[name] = [part / _GB for part in (*parts, max(0, whole - sum(parts)))]
    return bars


def draw_losses(records: Sequence[Record], path: Path, first_seed: int | None = None) -> bool:
    """The training loss of each method at its best rate against steps and against seconds: mean over seeds, running mean."""
    curves = {}
    for name, runs in by_name(records).items():
        whole = [run.curve for run in at_best_rate(runs, first_seed) if run.curve.step]
        if whole:
            losses = [mean(values) for values in zip(*(_running(curve.train_loss) for curve in whole), strict=True)]
            seconds = [mean(values) for values in zip(*(curve.seconds for curve in whole), strict=True)]
            curves[name] = (whole[0].step, seconds, losses)
    if not curves:
        return False
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, (steps, seconds, losses)) in enumerate(curves.items()):
        style: dict[str, Any] = {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
            "linewidth": 1.5,
        }
        left.plot(steps, losses, label=name, **style)
        right.plot(seconds, losses, **style)
    left.set_xlabel("step")
    right.set_xlabel("time (s)")
    left.set_ylabel(f"training loss (nats/token), mean of {_WINDOW} steps")
    figure.legend(loc="outside lower center", ncols=min(5, len(curves)), frameon=False, fontsize=8)
    _save(figure, path)
    return True


def draw_trade_off(records: Sequence[Record], path: Path, first_seed: int | None = None) -> bool:
    """Memory against held-out loss, speed as colour; where nothing was evaluated, memory against speed."""
    points = []
    for name, runs in by_name(records).items():
        chosen = at_best_rate(runs, first_seed)
        alike = with_equal_batches(chosen, first_seed)
        peaks = [run.memory.peak_above_weights_bytes / _GB for run in alike if run.memory]
        speeds = [run.tokens_per_second.median for run in alike if run.tokens_per_second]
        losses = [run.final_held_out_loss for run in chosen if run.final_held_out_loss is not None]
        if peaks and speeds:
            points.append((name, median(peaks), median(speeds), mean(losses) if losses else None))
    if not points:
        return False
    judged = all(loss is not None for *_, loss in points)
    figure, axes = _figure(8, 5)
    peaks = [peak for _, peak, _, _ in points]
    speeds = [speed for _, _, speed, _ in points]
    heights = [float(loss) if judged and loss is not None else speed for _, _, speed, loss in points]
    colours: Any = speeds if judged else _COLOURS[0]
    scatter = axes.scatter(peaks, heights, c=colours, cmap="viridis" if judged else None, s=60, edgecolor="black", zorder=3)
    for (name, *_), x, y in zip(points, peaks, heights, strict=True):
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(7, 4), fontsize=8)
    axes.margins(x=0.2, y=0.12)
    axes.grid(color="0.9")
    axes.set_xlabel("peak memory above the weights (GB)")
    if judged:
        axes.set_ylabel("held-out loss (nats/token), mean over seeds")
        figure.colorbar(scatter, label="throughput (tokens/s)")
    else:
        axes.set_ylabel("throughput (tokens/s)")
    _save(figure, path)
    return True


def _running(losses: Sequence[float | None]) -> list[float]:
    """The mean of the last steps whose loss was finite."""
    means: list[float] = []
    for end in range(1, len(losses) + 1):
        window = [loss for loss in losses[max(0, end - _WINDOW) : end] if loss is not None]
        means.append(mean(window) if window else float("nan"))
    return means


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
