"""The sections of a page of one training run."""

from collections.abc import Mapping, Sequence
from typing import Any

from gradlite.report.charts import Line, heat_map, lines
from gradlite.report.energy import energy_of, mean_line
from gradlite.report.palette import look
from gradlite.report.provenance import of_run
from gradlite.report.read import TrainedRun
from gradlite.report.section import Key, Picture, Section, line_key
from gradlite.report.sentences import of_run as sentences_of_run
from gradlite.report.tables import Table
from gradlite.report.words import NOTHING, in_loss, in_memory
from gradlite.train.config import TrainConfig
from gradlite.train.fields import GRADLITE, group_of
from gradlite.train.words import in_time, running_mean

_SMOOTHED = 20
_STEP, _MEAN, _HELD_OUT = look(6), look(0), look(1)


def sections(run: TrainedRun) -> list[Section]:
    """Results and settings; losses; what else was watched; the gradient's energy inside the bases."""
    return [
        Section("Summary", sentences_of_run(run), [_results(run)], folded=[_settings(run.config)]),
        Section("Loss", _time_is_missing(run), legend=_loss_legend(), pictures=_losses(run)),
        Section("Speed, memory and gradients", pictures=_watched(run)),
        *_energy(run),
    ]


def _results(run: TrainedRun) -> Table:
    result = run.result
    _, peaks = run.series("peak_memory_bytes")
    rows = [
        ["status", str(result.get("status", NOTHING))],
        ["steps", _number(result.get("steps"))],
        ["skipped steps", _number(result.get("skipped_steps"))],
        ["training tokens", _number(result.get("num_tokens"))],
        ["time", in_time(result["seconds"]) if isinstance(result.get("seconds"), int | float) else NOTHING],
        ["held-out loss before", in_loss(_loss(result.get("loss_before")))],
        ["held-out loss after", in_loss(_loss(result.get("loss_after")))],
        ["peak memory", in_memory(max(peaks, default=None))],
        ["parameters", _number(result.get("num_parameters"))],
    ]
    states = result.get("state_bytes")
    if isinstance(states, Mapping):
        rows += [
            [f"{name}, at the end", in_memory(value)] for name, value in states.items() if isinstance(value, int) and value
        ]
    return Table(
        run.name, ["result", "value"], [row for row in rows if row[1] != NOTHING], [False, True], "Losses in nats per token."
    )


def _settings(config: Mapping[str, Any]) -> Table:
    """Of config.yaml what counts: GradLite's own keys say nothing of a run of another method."""
    is_gradlite = config.get("method", "gradlite") == "gradlite"
    fields = TrainConfig.model_fields
    shown = [key for key in config if is_gradlite or key not in fields or group_of(fields[key]) != GRADLITE]
    rows = [[str(key), _setting(config[key])] for key in shown]
    return Table("Settings (config.yaml)", ["setting", "value"], rows, [False, False])


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or NOTHING
    if isinstance(value, bool):
        return "on" if value else "off"
    return NOTHING if value is None else str(value)


def _time_is_missing(run: TrainedRun) -> list[str]:
    drawn = any(run.series(key, "seconds")[0] for key in ("loss", "eval_loss"))
    return [] if drawn else ["This run's metrics.jsonl tells no seconds, so nothing is drawn against them."]


def _loss_legend() -> list[Key]:
    training = [
        line_key("training, each step", _STEP, marked=False),
        line_key(f"training, mean of {_SMOOTHED}", _MEAN, marked=False),
    ]
    return [*training, line_key("held out", _HELD_OUT)]


def _losses(run: TrainedRun) -> list[Picture]:
    pictures = []
    for against, axis in (("step", "step"), ("seconds", "seconds of training")):
        x, losses = run.series("loss", against)
        held_x, held_out = run.series("eval_loss", against)
        if not x and not held_x:
            continue
        curves = [
            Line(x, losses, _STEP, "training loss of each step", faint=True),
            Line(x, running_mean(losses, _SMOOTHED), _MEAN, f"training loss, mean of {_SMOOTHED} steps"),
            Line(held_x, held_out, _HELD_OUT, "held-out loss", marked=True),
        ]
        ends = f"held out {in_loss(held_out[0])} to {in_loss(held_out[-1])}" if held_out else "nothing held out"
        description = f"Training and held-out loss against {axis}; {ends}."
        svg = lines(f"loss-{against}", [curve for curve in curves if curve.x], axis, "loss (nats per token)", description)
        title = "Loss against steps" if against == "step" else "Loss against seconds"
        pictures.append(Picture(svg, title, f"Training loss, its running mean, and the held-out loss, by {axis}.", of_run(run)))
    return pictures


_WATCHED = (
    ("learning_rate", "Learning rate", "learning rate", "Learning rate of each step.", 1.0),
    (
        "tokens_per_second",
        "Throughput",
        "tokens/s",
        "Tokens a second, smoothed over about ten steps; padding does not count.",
        1.0,
    ),
    (
        "grad_norm",
        "Gradient norm",
        "norm before clipping",
        "Norm of the gradient as clipping sees it (GradLite without feedback: of its part inside the bases).",
        1.0,
    ),
    (
        "peak_memory_bytes",
        "Peak memory",
        "peak memory (GB)",
        "Highest memory of the process or device since the run began.",
        1e9,
    ),
)


def _watched(run: TrainedRun) -> list[Picture]:
    pictures = []
    for key, title, label, caption, unit in _WATCHED:
        steps, values = run.series(key)
        if not steps:
            continue
        scaled = [value / unit for value in values]
        description = (
            f"{title} by step: from {scaled[0]:.3g} to {scaled[-1]:.3g}, between {min(scaled):.3g} and {max(scaled):.3g}."
        )
        curve = Line(steps, scaled, _MEAN, title)
        svg = lines(f"watched-{key}", [curve], "step", label, description, from_zero=True)
        pictures.append(Picture(svg, title, caption, of_run(run)))
    return pictures


def _energy(run: TrainedRun) -> Sequence[Section]:
    found = energy_of(run.metrics)
    if found is None:
        return []
    steps, shares = mean_line(found)
    told = f"The mean over layers goes from {100 * shares[0]:.1f} % to {100 * shares[-1]:.1f} %."
    curve = Line(steps, shares, _MEAN, "mean over layers", marked=len(steps) < 20)
    mean = lines("energy-mean", [curve], "step", "share inside the basis", told)
    heat = heat_map("energy-heat", found.layers, found.steps, found.inside, f"Shares by layer and step. {told}")
    caption = "Newest measurement of each weight, estimated with 8 random probes; the mean over a layer's weights"
    pictures = [
        Picture(mean, "Mean over the layers", f"{caption}, then over layers.", of_run(run)),
        Picture(heat, "By layer and step", f"{caption}. Empty: not measured yet.", of_run(run)),
    ]
    return [Section("The gradient's energy inside the bases", pictures=pictures)]


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else NOTHING


def _loss(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
