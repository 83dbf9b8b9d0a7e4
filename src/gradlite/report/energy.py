"""The gradient's energy inside the bases, as a run's records have it."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gradlite.compare.energy import layer_means
from gradlite.compare.record import Energy


def energy_of(metrics: Sequence[Mapping[str, Any]]) -> Energy | None:
    """Means over layers from lines of metrics.jsonl, some with ``energy``: shares by the weights' names, None for a NaN."""
    measured = [(line["step"], line["energy"]) for line in metrics if isinstance(line.get("energy"), Mapping)]
    return layer_means(
        [(step, {name: share for name, share in shares.items() if share is not None}) for step, shares in measured]
    )


def mean_line(energy: Energy) -> tuple[list[float], list[float]]:
    """Steps, and the mean share over layers at each."""
    known = [
        (step, [share for share in row if share is not None]) for step, row in zip(energy.steps, energy.inside, strict=True)
    ]
    pairs = [(float(step), statistics.fmean(row)) for step, row in known if row]
    return [step for step, _ in pairs], [share for _, share in pairs]
