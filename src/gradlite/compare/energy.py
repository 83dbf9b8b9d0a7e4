"""Shares of the gradient's energy inside the bases, weight by weight, as means over layers."""

import re
import statistics
from collections.abc import Mapping, Sequence

from gradlite.compare.record import Energy

_BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


def layer_means(measured: Sequence[tuple[int, Mapping[str, float]]]) -> Energy | None:
    """The mean share over the weights of each layer at every measured step; None where nothing was measured.

    ``measured``: steps, and the shares then by the weights' names. Layers keep their order; weights outside of numbered blocks
    (embeddings, heads) are layers of their own.
    """
    measured = [(step, shares) for step, shares in measured if shares]
    if not measured:
        return None
    layers = list(dict.fromkeys(layer_of(name) for _, shares in measured for name in shares))
    layers.sort(key=_place)
    inside = []
    for _, shares in measured:
        by_layer: dict[str, list[float]] = {}
        for name, share in shares.items():
            by_layer.setdefault(layer_of(name), []).append(share)
        inside.append([statistics.fmean(by_layer[layer]) if layer in by_layer else None for layer in layers])
    return Energy(steps=[step for step, _ in measured], layers=layers, inside=inside)


def layer_of(name: str) -> str:
    """`layer 3` for a weight of a numbered block, otherwise the module's name."""
    found = _BLOCK.search(name)
    return f"layer {found[1]}" if found else name.removesuffix(".weight").removeprefix("model.")


def _place(layer: str) -> tuple[int, int]:
    """Other modules first, then blocks by number; the sort keeps the order of the rest."""
    found = re.fullmatch(r"layer (\d+)", layer)
    return (1, int(found[1])) if found else (0, 0)
