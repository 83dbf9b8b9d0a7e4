"""Bytes of a GradLite optimizer by category: of the tensors that exist, and of those that will, from shapes alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradlite.optim.member_step import SubspaceStep
from gradlite.optim.moments import moments_for
from gradlite.subspace.collector import Coordinates, Window

_CATEGORIES = ("weights", "gradients", "basis", "residual sample", "error memory", "moments")
_STEP_BYTES = 4  # of the counter in every parameter's state


def bytes_now(
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, Mapping[str, Tensor]],
    window: Window,
    weights: Sequence[Tensor],
) -> dict[str, int]:
    """What exists now; gradients and samples exist between backward and step. ``weights``: the projected ones."""
    counted: dict[str, int] = dict.fromkeys(_CATEGORIES, 0)
    counted["weights"] = sum(weight.nbytes for weight in weights)
    for param in _params(groups):
        if not isinstance(param, Coordinates):
            counted["weights"] += param.nbytes
        if param.grad is not None:
            counted["gradients"] += param.grad.nbytes
        for name, value in states.get(param, {}).items():
            counted["error memory" if name.startswith("error") else "moments"] += value.nbytes
    for basis in window.bases():
        counted["basis"] += _nbytes(basis.matrix_NR, basis.sketch_NR, basis.probes_NK)
    for collector in window.collectors:
        counted["basis"] += _nbytes(collector.probe_MR, collector.probed_ML)
        if collector.sample is not None:
            counted["residual sample"] += sum(factor.nbytes for factor in collector.sample)
    return counted


def bytes_to_come(
    groups: Sequence[Mapping[str, Any]], window: Window, weights: Sequence[Tensor], settings: SubspaceStep
) -> dict[str, int]:
    """The same categories as they will stand between backward and step, sketches left out."""
    expected: dict[str, int] = dict.fromkeys(_CATEGORIES, 0)
    for param in _params(groups):
        if isinstance(param, Coordinates):
            continue
        expected["weights"] += param.nbytes
        expected["gradients"] += param.nbytes
        moments = moments_for(settings.moments, param.numel(), param.dtype)
        expected["moments"] += moments.nbytes(param.numel(), param.itemsize) + _STEP_BYTES
    for basis in window.bases():
        expected["basis"] += basis.width * basis.rank * window.residual_norm.itemsize
    for collector, weight_MN in zip(window.collectors, weights, strict=True):
        rows, width, rank, itemsize = collector.rows, collector.basis.width, collector.basis.rank, weight_MN.itemsize
        expected["weights"] += weight_MN.nbytes
        expected["gradients"] += rows * rank * itemsize
        expected["moments"] += settings.moments_of(collector).nbytes(rows * rank, itemsize) + _STEP_BYTES
        if settings.feedback != "off" and rank < width:
            expected["residual sample"] += collector.sample_count * (rows + width) * itemsize
        if settings.remembers(collector):
            expected["error memory"] += settings.memory.nbytes(rows, width, rank, itemsize)
    expected["gradients"] += window.residual_norm.itemsize
    return expected


def _params(groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
