"""The drawings: pure functions from numbers to inline SVG. What they show is said by their callers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from gradlite.report.figure import inline_svg, legible, new_figure, style
from gradlite.report.palette import CATEGORIES, CATEGORY_COLOURS, INK, MUTED, PAGE, Look


@dataclass(frozen=True)
class Line:
    """One curve; ``tip`` is what a pointer is told. With ``marked`` each point has its series' marker."""

    x: Sequence[float]
    y: Sequence[float]
    look: Look
    tip: str
    marked: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Bar:
    """One run's peak: bytes by category, or None where only the sum is known."""

    name: str
    total_bytes: float
    by_category_bytes: Sequence[float] | None


@dataclass(frozen=True)
class Point:
    """One method in the scatter."""

    name: str
    peak_bytes: float
    loss: float
    tokens_per_second: float | None
    look: Look


def lines(
    prefix: str,
    curves: Sequence[Line],
    x_label: str,
    y_label: str,
    description: str,
    *,
    from_zero: bool = False,
) -> Markup:
    """Curves over one axis."""
    with style():
        figure = new_figure(250)
        axes = figure.add_subplot()
        tips = {}
        for number, curve in enumerate(curves):
            marker = curve.look.marker if curve.marked or len(curve.x) == 1 else ""
            (drawn,) = axes.plot(
                curve.x, curve.y, color=curve.look.colour.light, marker=marker, markersize=5,
                linewidth=0.8 if curve.faint else 1.6, alpha=0.45 if curve.faint else 1.0,
            )  # fmt: skip
            if curve.look.dash:
                drawn.set_dashes(curve.look.dash)
            drawn.set_gid(f"curve{number}")
            tips[f"curve{number}"] = curve.tip
        if from_zero:
            axes.set_ylim(0, 1.08 * max((value for curve in curves for value in curve.y), default=1.0) or 1.0)
        if x_label == "step":
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return inline_svg(figure, prefix, description, tips)


def memory_bars(prefix: str, bars: Sequence[Bar], description: str) -> Markup:
    """One bar a method, stacked by category, its name above it."""
    unit, size = _unit(max(bar.total_bytes for bar in bars))
    with style():
        figure = new_figure(46 + 37 * len(bars))
        axes = figure.add_subplot()
        tips = {}
        for place, bar in enumerate(bars):
            begin = 0.0
            parts = bar.by_category_bytes or [bar.total_bytes]
            for kind, num_bytes in enumerate(parts):
                colour = CATEGORY_COLOURS[kind] if bar.by_category_bytes else INK
                (drawn,) = axes.barh(
                    place,
                    num_bytes / size,
                    left=begin / size,
                    height=0.46,
                    color=colour.light,
                    edgecolor=PAGE.light,
                    linewidth=0.7,
                )
                drawn.set_gid(f"bar{place}-{kind}")
                what = CATEGORIES[kind].replace("_", " ") if bar.by_category_bytes else "peak"
                tips[f"bar{place}-{kind}"] = f"{bar.name}: {what} {num_bytes / size:.3g} {unit}"
                begin += num_bytes
            axes.text(0, place - 0.31, _cut(bar.name, 52), va="bottom", ha="left", fontsize=10.5)
            axes.annotate(
                f"{bar.total_bytes / size:#.3g}".rstrip("."), (bar.total_bytes / size, place), (4, 0),
                textcoords="offset points", va="center", fontsize=10.5, color=MUTED.light,
            )  # fmt: skip
        axes.set_xlim(0, 1.12 * max(bar.total_bytes for bar in bars) / size)
        axes.set_ylim(len(bars) - 0.6, -0.9)
        axes.yaxis.set_visible(False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"peak memory ({unit})")
        return inline_svg(figure, prefix, description, tips)


def scatter(prefix: str, points: Sequence[Point], description: str) -> Markup:
    """Peak memory across, held-out loss up, speed as the marker's area."""
    unit, size = _unit(max(point.peak_bytes for point in points))
    fastest = max((point.tokens_per_second or 0.0 for point in points), default=0.0)
    with style():
        figure = new_figure(330)
        axes = figure.add_subplot()
        tips = {}
        for number, point in enumerate(points):
            area = 40 + 190 * (point.tokens_per_second or 0.0) / fastest if fastest else 60
            axes.scatter(
                point.peak_bytes / size, point.loss, s=area, marker=point.look.marker, color=point.look.colour.light,
                edgecolors=PAGE.light, linewidths=0.8, alpha=0.85, gid=f"point{number}",
            )  # fmt: skip
            speed = f", {point.tokens_per_second:,.0f} tokens/s" if point.tokens_per_second else ""
            tips[f"point{number}"] = (
                f"{point.name}: {point.peak_bytes / size:.3g} {unit}, held-out loss {point.loss:.4f}{speed}"
            )
        axes.margins(0.14)
        axes.set_xlabel(f"peak memory ({unit})")
        axes.set_ylabel("held-out loss (nats per token)")
        _name_points(figure, axes, points, size)
        return inline_svg(figure, prefix, description, tips)


def heat_map(
    prefix: str, rows: Sequence[str], columns: Sequence[float], shares: Sequence[Sequence[float | None]], description: str
) -> Markup:
    """Shares in [0, 1]: ``shares[i][j]`` of column i and row j. What was not measured stays empty."""
    grid = [[math.nan if column[j] is None else float(column[j] or 0.0) for column in shares] for j in range(len(rows))]
    with style():
        figure = new_figure(max(150, 90 + 9 * len(rows)))
        axes = figure.add_subplot()
        axes.grid(visible=False)
        known = [share for column in shares for share in column if share is not None]
        low = math.floor(10 * min(known, default=0.0)) / 10  # shares differ little where they are high
        image = axes.imshow(grid, aspect="auto", interpolation="nearest", vmin=min(low, 0.9), vmax=1.0, cmap="viridis")
        every = math.ceil(len(rows) / 18)
        axes.set_yticks(range(0, len(rows), every), [_cut(name, 22) for name in rows[::every]], fontsize=9.5)
        shown = MaxNLocator(6, integer=True).tick_values(0, len(columns) - 1)
        places = sorted({round(place) for place in shown if 0 <= place < len(columns)})
        axes.set_xticks(places, [f"{columns[place]:g}" for place in places])
        axes.set_xlabel("step")
        bar = figure.colorbar(image, ax=axes, orientation="horizontal", aspect=40, pad=0.02)
        bar.set_label("share of the gradient's energy inside the basis")
        return inline_svg(figure, prefix, description)


def _name_points(figure: Any, axes: Any, points: Sequence[Point], size: float) -> None:
    """Names beside their points where one of four places is free; the legend and the tooltips have them all."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else None
    frame = axes.get_window_extent(renderer)
    radius = 9.0
    centres = [axes.transData.transform((point.peak_bytes / size, point.loss)) for point in points]
    taken = [(x - radius, y - radius, x + radius, y + radius) for x, y in centres]
    for point in points:
        for dx, dy, ha, va in (
            (9, 0, "left", "center"),
            (-9, 0, "right", "center"),
            (0, 9, "center", "bottom"),
            (0, -9, "center", "top"),
        ):
            text = axes.annotate(
                _cut(point.name, 26), (point.peak_bytes / size, point.loss), (dx, dy), textcoords="offset points", ha=ha, va=va,
                fontsize=9.5,
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            corners = (box.x0, box.y0, box.x1, box.y1)
            if box.x0 >= frame.x0 and box.x1 <= frame.x1 and not any(_overlap(corners, other) for other in taken):
                taken.append(corners)
                break
            text.remove()


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _unit(largest: float) -> tuple[str, float]:
    return next((pair for pair in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if largest >= pair[1]), ("bytes", 1.0))


def _cut(name: str, limit: int) -> str:
    name = legible(name)
    return name if len(name) <= limit else name[: limit - 1] + "…"
