"""The cross-entropy of a frozen vocabulary head, in tiles of the vocabulary.

Shape suffixes: T tokens, V vocabulary, v one tile of it, N width.

Equal to :func:`gradlite.ops.loss.tiled_cross_entropy`, whose tiles of tokens need the whole head for a few tokens and multiply
slowly where they are small. A frozen head wants no gradient of its own, so all tokens can meet one part of the vocabulary at a
time: a first pass finds every token's log-sum, a second makes the logits again and from them the gradient. One product more
than tiles of tokens, each at full speed: on a CPU with 256 tokens the same time in an eighth of the memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gradlite.hold.compiled import is_compiling_enabled, kernel
from gradlite.ops.loss import LossKind, check_labels
from gradlite.ops.precision import wide

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits that exist at a time."""
_LEAST_TILE = 1 << 9  # products with fewer words at a time are slow


def frozen_head_bytes(num_tokens: int, width: int, itemsize: int) -> int:
    """Bytes that wait for backward: the gradient of the hidden states."""
    return num_tokens * width * itemsize


def tile_words(num_tokens: int, vocabulary: int, device_type: str) -> int:
    """Words of one tile, as even as they come."""
    elements = TILE_ELEMENTS.get(device_type, TILE_ELEMENTS["cuda"])
    if not is_compiling_enabled():  # every step of the eager formulas is a tensor
        elements //= 4
    most = max(_LEAST_TILE, elements // max(1, num_tokens))
    num_tiles = -(-vocabulary // most)
    return -(-vocabulary // num_tiles)


def _capped(kind: LossKind, logits_Tv: Tensor) -> Tensor:
    wide_Tv = wide(logits_Tv)
    return kind.softcap * torch.tanh(wide_Tv / kind.softcap) if kind.softcap else wide_Tv


def _sums(kind: LossKind, logits_Tv: Tensor, labels_T1: Tensor, first: Tensor) -> tuple[Tensor, ...]:
    """Of one tile, T×1 each: largest logit, sum of exponentials above it, the label's logit (0 if elsewhere), sum of logits."""
    wide_Tv = _capped(kind, logits_Tv)
    top_T1 = wide_Tv.amax(-1, keepdim=True)
    sum_T1 = torch.exp(wide_Tv - top_T1).sum(-1, keepdim=True)
    is_label_Tv = torch.arange(logits_Tv.shape[1], device=logits_Tv.device)[None, :] == labels_T1 - first
    label_T1 = torch.where(is_label_Tv, wide_Tv, 0.0).sum(-1, keepdim=True)
    return top_T1, sum_T1, label_T1, wide_Tv.sum(-1, keepdim=True) if kind.smoothing else label_T1


def _gradient_(kind: LossKind, vocabulary: int, logits_Tv: Tensor, lse_T1: Tensor, labels_T1: Tensor, first: Tensor) -> None:
    """The gradient of the summed losses takes the logits' place."""
    wide_Tv = _capped(kind, logits_Tv)
    is_label_Tv = torch.arange(logits_Tv.shape[1], device=logits_Tv.device)[None, :] == labels_T1 - first
    gradient_Tv = torch.exp(wide_Tv - lse_T1)
    gradient_Tv = torch.where(is_label_Tv, gradient_Tv - (1.0 - kind.smoothing), gradient_Tv)
    if kind.smoothing:
        gradient_Tv = gradient_Tv - kind.smoothing / vocabulary
    if kind.softcap:
        gradient_Tv = gradient_Tv * (1.0 - (wide_Tv / kind.softcap).square())
    logits_Tv.copy_(gradient_Tv)


def _add_(total_TN: Tensor, part_TN: Tensor) -> None:
    """In another format; PyTorch's own would make a copy first."""
    total_TN.copy_(total_TN + part_TN)


class _FrozenHeadLoss(torch.autograd.Function):
    """Keeps the gradient that it made in the forward pass: see :func:`frozen_head_bytes`."""

    @staticmethod
    def forward(ctx: Any, h_TN: Tensor, weight_VN: Tensor, bias_V: Tensor | None, labels_T: Tensor, kind: LossKind) -> Tensor:
        num_tokens, vocabulary = len(h_TN), len(weight_VN)
        labels_T1 = labels_T[:, None]
        format_ = torch.promote_types(h_TN.dtype, torch.float32)
        step = tile_words(num_tokens, vocabulary, h_TN.device.type)
        starts = range(0, vocabulary if num_tokens else 0, step)

        def logits(start: int) -> Tensor:
            tile = slice(start, start + step)
            bias_v = None if bias_V is None else bias_V[tile].to(h_TN.dtype)
            return F.linear(h_TN, weight_VN[tile].to(h_TN.dtype), bias_v)

        top_T1 = h_TN.new_full((num_tokens, 1), -torch.inf, dtype=format_)
        sum_T1, label_T1, all_T1 = (h_TN.new_zeros((num_tokens, 1), dtype=format_) for _ in range(3))
        for start in starts:
            first = torch.tensor(start, device=h_TN.device)
            tile_top_T1, tile_sum_T1, tile_label_T1, tile_all_T1 = kernel(_sums, kind)(logits(start), labels_T1, first)
            new_top_T1 = torch.maximum(top_T1, tile_top_T1)
            sum_T1 = sum_T1 * torch.exp(top_T1 - new_top_T1) + tile_sum_T1 * torch.exp(tile_top_T1 - new_top_T1)
            top_T1 = new_top_T1
            label_T1 += tile_label_T1
            all_T1 += tile_all_T1
        lse_T1 = top_T1 + sum_T1.log()
        losses_T1 = lse_T1 - (1.0 - kind.smoothing) * label_T1
        if kind.smoothing:
            losses_T1 = losses_T1 - (kind.smoothing / vocabulary) * all_T1
        grad_h_TN = torch.zeros_like(h_TN, dtype=format_)  # a sum over tiles loses digits in short formats
        for start in starts:
            logits_Tv = logits(start)
            kernel(_gradient_, kind, vocabulary)(logits_Tv, lse_T1, labels_T1, torch.tensor(start, device=h_TN.device))
            part_TN = logits_Tv @ weight_VN[start : start + step].to(h_TN.dtype)
            kernel(_add_)(grad_h_TN, part_TN)
            del logits_Tv, part_TN
        ctx.save_for_backward(grad_h_TN.to(h_TN.dtype))
        return losses_T1.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_h_TN,) = ctx.saved_tensors
        return grad_h_TN * grad.to(grad_h_TN.dtype), None, None, None, None


def frozen_head_cross_entropy(
    h_TN: Tensor, weight_VN: Tensor, bias_V: Tensor | None, labels_T: Tensor, kind: LossKind
) -> Tensor:
    """Cross-entropy in nats summed over the tokens, a scalar in float32 (float64 for float64 states).

    Args:
        h_TN: hidden states of the tokens that count; only they receive a gradient. weight_VN, bias_V: the head.
        labels_T: int64, each in [0, V).

    Under autocast the states and the weight are cast first, as in ``F.linear``.

    Raises:
        GradLiteError: a label outside the vocabulary.
    """
    check_labels(labels_T, len(weight_VN))
    if torch.is_autocast_enabled(h_TN.device.type) and h_TN.dtype != torch.float64:
        h_TN = h_TN.to(torch.get_autocast_dtype(h_TN.device.type))
    with torch.autocast(h_TN.device.type, enabled=False):
        total: Tensor = _FrozenHeadLoss.apply(h_TN, weight_VN, bias_V, labels_T, kind)
    return total
