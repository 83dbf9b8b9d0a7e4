"""The vocabulary head and its cross-entropy, in tiles of tokens: full logits (tokens × vocabulary) never exist.

Shape suffixes: T tokens, t tokens of one tile, V vocabulary, N width.

Equal to ``F.cross_entropy(cap(F.linear(h, W, b)), labels, reduction="sum", label_smoothing=…)`` computed from the logits in
the layer's own dtype with sums in float32 or wider, as transformers does. The gradients of the sum are made right in the
forward pass, while a tile's logits exist, and scaled in backward: the head's product is computed once, not twice (the idea of
Liger-Kernel, arXiv 2410.10989). What the weight's gradient leaves behind is measured tile by tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gradlite.errors import GradLiteError
from gradlite.hold.compiled import is_compiling_enabled, kernel
from gradlite.ops.factors import DenseFactors, GradientFactors
from gradlite.ops.precision import wide

TILE_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Logits that exist at a time. Larger tiles multiply faster, up to about this many."""
_EAGER_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class LossKind:
    """``softcap``: logits become ``c·tanh(logits/c)`` (Gemma 2); 0 for none. ``smoothing``: share of the target that is
    spread evenly over the vocabulary.
    """

    softcap: float = 0.0
    smoothing: float = 0.0


class Measure(Protocol):
    """The collector of the head's weight, which can look at a gradient before backward begins."""

    def measure(self, factors: GradientFactors) -> Any:
        """What the gradient leaves behind, not yet counted."""

    def join(self, a: Any, b: Any) -> Any:
        """The same of the sum of two gradients."""

    def leaves(self, absorbed: Any) -> tuple[Tensor | None, ...]:
        """Its tensors, to be saved for backward."""

    def of_leaves(self, leaves: Sequence[Tensor | None], num_tokens: int) -> Any:
        """What :meth:`leaves` took apart."""

    def take(self, absorbed: Any) -> Tensor:
        """Counts it; returns the coordinates' gradient."""


def tile_tokens(num_tokens: int, vocabulary: int, device_type: str) -> int:
    """Tokens of one tile."""
    return max(1, min(num_tokens, TILE_ELEMENTS.get(device_type, TILE_ELEMENTS["cuda"]) // vocabulary))


def loss_bytes(num_tokens: int, width: int, vocabulary: int, rank: int, itemsize: int) -> int:
    """Bytes that wait for backward: the gradients of the hidden states and of the coordinates."""
    return (num_tokens * width + vocabulary * rank) * itemsize


def _tile_losses(kind: LossKind, logits_tV: Tensor, labels_t1: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (t×1) and the gradient of their sum with respect to the logits, in the logits' dtype."""
    wide_tV = wide(logits_tV)
    slope_tV = None
    if kind.softcap:
        tanh_tV = torch.tanh(wide_tV / kind.softcap)
        wide_tV, slope_tV = kind.softcap * tanh_tV, 1.0 - tanh_tV.square()
    top_t1 = wide_tV.amax(-1, keepdim=True)
    exponent_tV = torch.exp(wide_tV - top_t1)
    sum_t1 = exponent_tV.sum(-1, keepdim=True)
    lse_t1 = top_t1 + sum_t1.log()
    is_label_tV = torch.arange(logits_tV.shape[1], device=logits_tV.device)[None, :] == labels_t1
    label_logit_t1 = torch.where(is_label_tV, wide_tV, 0.0).sum(-1, keepdim=True)
    losses_t1 = lse_t1 - (1.0 - kind.smoothing) * label_logit_t1
    gradient_tV = exponent_tV / sum_t1
    gradient_tV = torch.where(is_label_tV, gradient_tV - (1.0 - kind.smoothing), gradient_tV)
    if kind.smoothing:
        losses_t1 = losses_t1 - kind.smoothing * wide_tV.mean(-1, keepdim=True)
        gradient_tV = gradient_tV - kind.smoothing / logits_tV.shape[1]
    if slope_tV is not None:
        gradient_tV = gradient_tV * slope_tV
    return losses_t1, gradient_tV.to(logits_tV.dtype)


def _tile_losses_(kind: LossKind, logits_tV: Tensor, labels_t1: Tensor) -> Tensor:
    """As :func:`_tile_losses`; the gradient takes the logits' place."""
    losses_t1, gradient_tV = _tile_losses(kind, logits_tV, labels_t1)
    logits_tV.copy_(gradient_tV)
    return losses_t1


def _losses_and_gradient_(kind: LossKind, logits_tV: Tensor, labels_t1: Tensor) -> Tensor:
    if is_compiling_enabled():
        losses_t1: Tensor = kernel(_tile_losses_, kind)(logits_tV, labels_t1)
        return losses_t1
    rows = max(1, _EAGER_ELEMENTS // logits_tV.shape[1])
    parts = zip(logits_tV.split(rows), labels_t1.split(rows), strict=True)
    return torch.cat([_tile_losses_(kind, logits, labels) for logits, labels in parts])


class _TiledLoss(torch.autograd.Function):
    """Keeps the gradients that it made: see :func:`loss_bytes`."""

    @staticmethod
    def forward(
        ctx: Any,
        h_TN: Tensor,
        weight_VN: Tensor,
        bias_V: Tensor | None,
        coordinates_VR: Tensor | None,
        labels_T: Tensor,
        measure: Measure | None,
        kind: LossKind,
    ) -> Tensor:
        needs_h, needs_weight, needs_bias, needs_coordinates, *_ = ctx.needs_input_grad
        total = h_TN.new_zeros((), dtype=torch.promote_types(h_TN.dtype, torch.float32))
        grad_h_TN = torch.empty_like(h_TN) if needs_h else None
        wide_dtype = total.dtype  # sums over tiles in a short format lose more with every tile
        grad_weight = None
        if needs_weight and coordinates_VR is None:
            grad_weight = torch.zeros_like(weight_VN, dtype=wide_dtype)
        grad_bias = None if bias_V is None or not needs_bias else torch.zeros_like(bias_V, dtype=wide_dtype)
        cast_VN = weight_VN.to(h_TN.dtype)
        absorbed = None
        step = tile_tokens(len(h_TN), len(weight_VN), h_TN.device.type)
        for start in range(0, len(h_TN), step):
            tile = slice(start, start + step)
            h_tN = h_TN[tile]
            logits_tV = F.linear(h_tN, cast_VN, None if bias_V is None else bias_V.to(h_TN.dtype))
            losses_t1 = _losses_and_gradient_(kind, logits_tV, labels_T[tile, None])
            total += losses_t1.sum()
            gradient_tV = logits_tV
            if grad_h_TN is not None:
                torch.mm(gradient_tV, cast_VN, out=grad_h_TN[tile])
            if grad_weight is not None:
                grad_weight += gradient_tV.T @ h_tN
            if grad_bias is not None:
                grad_bias += gradient_tV.sum(0, dtype=wide_dtype)
            if needs_coordinates and measure is not None:
                of_tile = measure.measure(DenseFactors(gradient_tV, h_tN))
                absorbed = of_tile if absorbed is None else measure.join(absorbed, of_tile)
            del logits_tV, gradient_tV
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_VN.dtype)
        if grad_bias is not None and bias_V is not None:
            grad_bias = grad_bias.to(bias_V.dtype)
        # Saved, and no attributes of ctx, which would stay for as long as anybody keeps the loss.
        leaves = () if absorbed is None or measure is None else measure.leaves(absorbed)
        ctx.save_for_backward(grad_h_TN, grad_weight, grad_bias, *leaves)
        ctx.measure, ctx.num_tokens = measure, len(h_TN)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad_h_TN, grad_weight, grad_bias = (None if made is None else made * grad.to(made.dtype) for made in saved[:3])
        grad_coordinates = None
        if len(saved) > 3:
            grad_coordinates = ctx.measure.take(ctx.measure.of_leaves(saved[3:], ctx.num_tokens).scaled(grad))
        return grad_h_TN, grad_weight, grad_bias, grad_coordinates, None, None, None


def check_labels(labels_T: Tensor, vocabulary: int) -> None:
    """Raises GradLiteError for a label outside the vocabulary; elsewhere than on a CPU the device asserts, without a stall."""
    if labels_T.device.type != "cpu":
        torch._assert_async(((labels_T >= 0) & (labels_T < vocabulary)).all())
    elif len(labels_T) and not 0 <= int(labels_T.min()) <= int(labels_T.max()) < vocabulary:
        raise GradLiteError(
            f"labels must lie in [0, {vocabulary}), the vocabulary, but reach from {int(labels_T.min())} to "
            f"{int(labels_T.max())}; mark tokens that do not count with the ignore index (-100)."
        )


def tiled_cross_entropy(
    h_TN: Tensor,
    weight_VN: Tensor,
    bias_V: Tensor | None,
    labels_T: Tensor,
    *,
    coordinates_VR: Tensor | None = None,
    measure: Measure | None = None,
    kind: LossKind = LossKind(),
) -> Tensor:
    """Cross-entropy in nats summed over the tokens, a scalar in float32 (float64 for float64 states).

    Args:
        h_TN: hidden states of the tokens that count. labels_T: int64, each in [0, V). weight_VN, bias_V: the head; they get
            exact gradients where no ``coordinates_VR`` is given.
        coordinates_VR, measure: the head's coordinates and collector, if it is attached.

    Under autocast the states and the weight are cast first, as in ``F.linear``.

    Raises:
        GradLiteError: a label outside the vocabulary (on a CPU; elsewhere the device asserts).
    """
    check_labels(labels_T, len(weight_VN))
    if torch.is_autocast_enabled(h_TN.device.type) and h_TN.dtype != torch.float64:
        h_TN = h_TN.to(torch.get_autocast_dtype(h_TN.device.type))
    arguments: tuple[Tensor | None, ...] = (h_TN, weight_VN, bias_V, coordinates_VR)
    if not torch.is_grad_enabled():  # whether an input asks for a gradient no longer matters, and none is made
        arguments = tuple(None if argument is None else argument.detach() for argument in arguments)
    with torch.autocast(h_TN.device.type, enabled=False):
        total: Tensor = _TiledLoss.apply(*arguments, labels_T, measure, kind)
    return total
