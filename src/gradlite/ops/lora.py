"""The linear layer with a low-rank adapter: ``y = c ⊙ (x Wᵀ + s·D(x) Aᵀ Bᵀ) + b``, ``W`` frozen; keeps ``x`` only.

Shape suffixes: T tokens, M outputs, N inputs, R rank of the adapter.

``D`` is dropout, ``c`` DoRA's scale of every output (none: 1). Backward, with ``ε = δ ⊙ c`` and ``h = D(x) Aᵀ`` computed again:

    ∂L/∂B = s·εᵀh    ∂L/∂A = (s·εB)ᵀ D(x)    ∂L/∂x = εW + D'((s·εB) A)    ∂L/∂c = Σ_T δ ⊙ (xWᵀ + s·hBᵀ)    ∂L/∂b = Σ_T δ

Source: MeSP, arXiv 2602.13069. Autograd's way keeps ``h`` and ``D(x)`` as well. Dropout is repeated from the generator's state
before it was drawn (5 KB on a CPU, 16 bytes on CUDA): exact, and smaller than a bit an element from 40,000 elements on. PEFT's
DoRA takes the norm in ``c`` for a constant, and so it is computed outside: see :func:`dora_scale`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gradlite.hold.codec import Codec
from gradlite.hold.holder import Holder
from gradlite.ops.frozen_weight import DenseWeight, FrozenWeight
from gradlite.ops.keep import Keep, Kept
from gradlite.ops.linear import linear_bytes
from gradlite.ops.precision import wide
from gradlite.ops.random_state import random_state, random_state_bytes, restored
from gradlite.ops.rows import in_shape_of

_NORM_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class LoraKind:
    """``scale``: s, rsLoRA's included. ``dropout``: probability, 0 outside training. ``keeps_h``: ``h`` waits too."""

    scale: float
    dropout: float = 0.0
    keeps_h: bool = False


def lora_bytes(
    codec: Codec, num_tokens: int, width: int, itemsize: int, rank: int, kind: LoraKind, device_type: str = "cpu"
) -> int:
    """Bytes that the operator holds where no operator before it holds its input already (then: less :func:`linear_bytes`)."""
    h_bytes = num_tokens * rank * itemsize if kind.keeps_h else 0
    state_bytes = random_state_bytes(device_type) if kind.dropout else 0
    return linear_bytes(codec, num_tokens, width, itemsize) + h_bytes + state_bytes


def _value(
    x_TN: Tensor,
    h_TR: Tensor,
    weight: FrozenWeight,
    bias_M: Tensor | None,
    b_MR: Tensor,
    scale_M: Tensor | None,
    kind: LoraKind,
) -> Tensor:
    y_TM = weight.times(x_TN, bias_M if scale_M is None else None)
    if h_TR.dtype == y_TM.dtype:
        y_TM.addmm_(h_TR, b_MR.T, alpha=kind.scale)
    else:
        y_TM.add_(h_TR @ b_MR.T, alpha=kind.scale)
    if scale_M is not None:
        y_TM.mul_(scale_M)
        if bias_M is not None:
            y_TM.add_(bias_M)
    return y_TM


class _Lora(torch.autograd.Function):
    """Keeps nothing of its own; what waits was saved by the node before it (see :mod:`gradlite.ops.linear`)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias_M: Tensor | None,
        a_RN: Tensor,
        b_MR: Tensor,
        scale_M: Tensor | None,
        weight: FrozenWeight,
        kind: LoraKind,
        kept: Kept,
        needs_value: bool,
        h_TR: Tensor | None,
    ) -> Tensor:
        ctx.weight, ctx.kind, ctx.kept = weight, kind, kept
        ctx.has_scale = scale_M is not None
        ctx.bias_dtype = None if bias_M is None else bias_M.dtype
        if not needs_value:
            return x.new_zeros(()).expand(*x.shape[:-1], len(b_MR))
        x_TN = x.reshape(-1, x.shape[-1])
        if h_TR is None:
            h_TR = _h(x_TN, a_RN, kind)
        return in_shape_of(x, _value(x_TN, h_TR, weight, bias_M, b_MR, scale_M, kind))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_bias, needs_a, needs_b, needs_scale, *_ = ctx.needs_input_grad
        kind: LoraKind = ctx.kind
        a_RN, b_MR, *rest = ctx.kept.saved()
        scale_M = rest.pop(0) if ctx.has_scale else None
        state = rest.pop(0) if kind.dropout else None
        h_TR = rest.pop(0) if kind.keeps_h else None
        grad_TM = grad.reshape(-1, grad.shape[-1])
        grad_bias = grad_TM.sum(0, dtype=ctx.bias_dtype) if needs_bias else None
        x_TN = ctx.kept.ticket.get(rest).view(-1, a_RN.shape[1]).to(grad.dtype)
        del rest
        factors_TN = None
        if state is not None:
            with restored(state, x_TN.device):  # what dropout multiplied x by
                factors_TN = F.dropout(torch.ones_like(x_TN, dtype=a_RN.dtype), kind.dropout)
        dropped_TN = x_TN.to(a_RN.dtype) if factors_TN is None else x_TN.to(a_RN.dtype) * factors_TN
        if h_TR is None:
            h_TR = dropped_TN @ a_RN.T
        grad_scale = None
        if scale_M is not None:
            if needs_scale:
                unscaled_TM = _value(x_TN, h_TR, ctx.weight, None, b_MR, None, kind)
                grad_scale = (wide(grad_TM) * unscaled_TM).sum(0).to(scale_M.dtype)
                del unscaled_TM
            grad_TM = (grad_TM * scale_M).to(grad.dtype)  # or a wider scale would widen the frozen weight as well
        adapter_grad_TM = grad_TM.to(b_MR.dtype)
        grad_b = (adapter_grad_TM.T @ h_TR).mul_(kind.scale) if needs_b else None
        inner_TR = (adapter_grad_TM @ b_MR).mul_(kind.scale)
        del adapter_grad_TM, h_TR
        grad_a = inner_TR.T @ dropped_TN if needs_a else None
        del dropped_TN, x_TN
        grad_x = None
        if ctx.kept.needs_x:
            grad_x_TN = ctx.weight.transposed_times(grad_TM)
            if factors_TN is None and inner_TR.dtype == grad_x_TN.dtype:
                grad_x_TN.addmm_(inner_TR, a_RN)
            else:
                inner_TN = inner_TR @ a_RN
                grad_x_TN.add_(inner_TN if factors_TN is None else inner_TN.mul_(factors_TN))
            grad_x = grad_x_TN.view(*grad.shape[:-1], a_RN.shape[1])
        return grad_x, grad_bias, grad_a, grad_b, grad_scale, None, None, None, None, None


def _h(x_TN: Tensor, a_RN: Tensor, kind: LoraKind) -> Tensor:
    x_TN = x_TN.to(a_RN.dtype)
    return (F.dropout(x_TN, kind.dropout) if kind.dropout else x_TN) @ a_RN.T


def lora_linear(
    x: Tensor,
    weight: FrozenWeight | Tensor,
    bias_M: Tensor | None,
    a_RN: Tensor,
    b_MR: Tensor,
    kind: LoraKind,
    holder: Holder,
    *,
    scale_M: Tensor | None = None,
    needs_value: bool = True,
) -> Tensor:
    """``c ⊙ (x Wᵀ + s·D(x) Aᵀ Bᵀ) + b``, ``(…, M)`` in the dtype of ``x``; the adapter may have a wider dtype of its own.

    Args:
        x: ``(…, N)``. weight: W, frozen. bias_M: or None; its gradient is exact. a_RN, b_MR: the adapter. scale_M: DoRA's c.
        holder: how ``x`` waits, unless an operator that made it holds it already.
        needs_value: False in a replay that only goes on backwards from here; the result is then zeros without storage.

    Under autocast all operands but ``scale_M`` are cast first, as in ``F.linear``.
    """
    own = x
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(x.device.type)
        x, a_RN, b_MR = x.to(dtype), a_RN.to(dtype), b_MR.to(dtype)
        bias_M = None if bias_M is None else bias_M.to(dtype)
    frozen = DenseWeight(weight) if isinstance(weight, Tensor) else weight
    trained = [one for one in (a_RN, b_MR, bias_M, scale_M, x) if one is not None and one.requires_grad]
    if not (torch.is_grad_enabled() and trained):
        x_TN = x.reshape(-1, x.shape[-1])
        y_TM = _value(x_TN, _h(x_TN, a_RN, kind), frozen, bias_M, b_MR, scale_M, kind)
        return y_TM.view(*x.shape[:-1], len(b_MR))
    kept = Kept(own.requires_grad)
    held = holder.hold(own, x.dtype)
    kept.ticket = held.ticket
    state = random_state(x.device) if kind.dropout else None
    h_TR = None
    if kind.keeps_h:
        with torch.no_grad():
            h_TR = _h(x.reshape(-1, x.shape[-1]), a_RN, kind)
    saved = [one for one in (a_RN, b_MR, scale_M, state, h_TR) if one is not None]
    x = Keep.apply(x, trained[0], kept, *saved, *held.leaves)
    y: Tensor = _Lora.apply(x, bias_M, a_RN, b_MR, scale_M, frozen, kind, kept, needs_value, h_TR)
    return y


def dora_scale(weight: FrozenWeight | Tensor, a_RN: Tensor, b_MR: Tensor, magnitude_M: Tensor, scale: float) -> Tensor:
    """DoRA's ``c = m / ‖W + s·BA‖`` (norm of every row, taken for a constant), as PEFT has it; differentiable in ``m``."""
    weight = DenseWeight(weight) if isinstance(weight, Tensor) else weight
    return magnitude_M / _row_norms(weight, a_RN.detach(), b_MR.detach(), scale).to(magnitude_M.dtype)


@torch.no_grad()
def _row_norms(weight: FrozenWeight, a_RN: Tensor, b_MR: Tensor, scale: float) -> Tensor:
    """A few rows at a time: ``BA`` never exists as a whole."""
    rows = max(1, _NORM_ELEMENTS // a_RN.shape[1])
    norms = []
    for start in range(0, len(b_MR), rows):
        tile = slice(start, start + rows)
        with torch.autocast(a_RN.device.type, enabled=False):  # c of a new adapter is exactly 1
            adapted = torch.addmm(weight.rows(tile, a_RN.dtype), b_MR[tile], a_RN, alpha=scale)
        norms.append(torch.linalg.vector_norm(adapted, dim=1))
    return torch.cat(norms)
