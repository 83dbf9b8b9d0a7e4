"""Speed from the seconds of single steps: the median, and how far the steps lie apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Rates:
    """Things done per second, over steps."""

    median: float
    min: float
    max: float


def rates(amounts: Sequence[int], seconds: Sequence[float]) -> Rates | None:
    """Of steps that did ``amounts[i]`` (tokens, samples) in ``seconds[i]`` each; None where there is no step."""
    each = [amount / second for amount, second in zip(amounts, seconds, strict=True)]
    return Rates(median(each), min(each), max(each)) if each else None
