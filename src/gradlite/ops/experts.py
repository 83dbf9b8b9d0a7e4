"""Experts held as stacked weights (mixture of experts): each token goes through the few experts it was sent to.

``out_t = Σ_k s_tk · down_e(act(gate_e(x_t)) · up_e(x_t))`` with ``e = index_tk``: equal to transformers' experts in the forward
pass and in ``∂L/∂x`` and ``∂L/∂s``. Instead of ``∂L/∂W`` of the stacked weights (E×M×N) it hands the gradients' factors to
``absorb``, for all experts as one matrix of E·M rows, whose basis they share. Source: docs/method.md, section 1.

What waits: ``x`` (once, however many experts a token has), gate and up of every pair, and the pairs' numbers. ``h`` is computed
again, and ``∂L/∂s_tk = ⟨δ_t W_down, h⟩`` needs no output of an expert.

Shape suffixes: T tokens, K experts of a token, P = T·K pairs of a token and an expert sorted by expert, E experts, M output
width, N input width, R rank, S any small width.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradlite.hold.holder import Holder
from gradlite.ops.activation import ActivationKind
from gradlite.ops.factors import row_norms
from gradlite.ops.gated_mlp import gated, gated_value
from gradlite.ops.keep import Keep, Kept
from gradlite.ops.linear import Absorb
from gradlite.ops.precision import wide
from gradlite.ops.rows import in_shape_of


class Routing(NamedTuple):
    """Which token is each pair's (int64), its place among the T·K choices, and how many pairs each expert has."""

    token_P: Tensor
    choice_P: Tensor
    counts: tuple[int, ...]


def routing_of(index_TK: Tensor, num_experts: int) -> Routing:
    """Sorts the choices by expert. Choices beyond the last expert are nobody's (transformers' mark of another device's)."""
    choices = index_TK.reshape(-1)
    counts = tuple(torch.bincount(choices, minlength=num_experts)[:num_experts].tolist())
    choice_P = choices.argsort(stable=True)[: sum(counts)]
    return Routing(choice_P // index_TK.shape[-1], choice_P, counts)


def _segments(counts: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """Every expert that has pairs, and which these are."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def grouped_linear(x_PN: Tensor, weight_EMN: Tensor, counts: tuple[int, ...]) -> Tensor:
    """``x W_eᵀ`` (P×M) for rows sorted by expert; weights in the dtype of ``x``, one expert's at a time."""
    y_PM = x_PN.new_empty(x_PN.shape[0], weight_EMN.shape[1])
    for expert, pairs in _segments(counts):
        torch.mm(x_PN[pairs], weight_EMN[expert].to(x_PN.dtype).T, out=y_PM[pairs])
    return y_PM


class ExpertFactors:
    """The gradient of stacked weights as one matrix of E·M rows: ``left_PM``, ``right`` (here P×N), and each expert's pairs."""

    def __init__(self, left_PM: Tensor, right_PN: Tensor, counts: tuple[int, ...]) -> None:
        self.left_PM = left_PM
        self.right_TN = right_PN
        self.counts = counts

    def left_t_matmul(self, z_TS: Tensor) -> Tensor:
        product_EMS = z_TS.new_zeros(len(self.counts), self.left_PM.shape[1], z_TS.shape[1])
        for expert, pairs in _segments(self.counts):
            torch.mm(self.left_PM[pairs].T, z_TS[pairs], out=product_EMS[expert])
        return product_EMS.flatten(0, 1)

    def left_matmul(self, probe_MS: Tensor) -> Tensor:
        probe_EMS = probe_MS.unflatten(0, (len(self.counts), -1))
        return grouped_linear(self.left_PM, probe_EMS.transpose(1, 2), self.counts)

    def left_norms(self) -> Tensor:
        return row_norms(self.left_PM)

    def left_rows(self, index_K: Tensor) -> Tensor:
        ends_E = torch.tensor(self.counts, device=index_K.device).cumsum(0)
        expert_K = torch.searchsorted(ends_E, index_K, right=True)
        rows_KEM = self.left_PM.new_zeros(len(index_K), len(self.counts), self.left_PM.shape[1])
        rows_KEM[torch.arange(len(index_K), device=index_K.device), expert_K] = self.left_PM[index_K]
        return rows_KEM.flatten(1)


def _summed(
    x_PN: Tensor, scale_P: Tensor | None, weight_EMN: Tensor, token_P: Tensor, counts: tuple[int, ...], num_tokens: int
) -> Tensor:
    """``Σ_p s_p W_e x_p`` over each token's pairs (T×M), in float32 or wider; one expert's products live at a time.

    An expert has a token once at most, so the order of the sums is that of the experts on every device.
    """
    dtype = torch.promote_types(x_PN.dtype, torch.float32)
    rows_TM = x_PN.new_zeros(num_tokens, weight_EMN.shape[1], dtype=dtype)
    for expert, pairs in _segments(counts):
        y_PM = (x_PN[pairs] @ weight_EMN[expert].to(x_PN.dtype).T).to(dtype)
        rows_TM.index_add_(0, token_P[pairs], y_PM if scale_P is None else y_PM.mul_(scale_P[pairs, None]))
    return rows_TM


class StackedWeight(NamedTuple):
    """One stacked weight; its coordinates, a leaf of zeros of E·M rows that receives ``δᵀ(xP)``; and what absorbs."""

    weight_EMN: Tensor
    coordinates_MR: Tensor
    absorb: Absorb


class _Gather(torch.autograd.Function):
    """``y_p = W_e x_t`` for every pair; keeps nothing of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_EMN: Tensor, coordinates_MR: Tensor, absorb: Absorb, kept: Kept, routing: Routing
    ) -> Tensor:
        ctx.absorb, ctx.kept, ctx.shape = absorb, kept, x.shape
        return grouped_linear(x.reshape(-1, x.shape[-1])[routing.token_P], weight_EMN, routing.counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PM: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None, None]:
        weight_EMN, token_P, counts_E, *leaves = ctx.kept.saved()
        counts = tuple(counts_E.tolist())
        grad_coordinates = grad_x = None
        if ctx.needs_input_grad[2]:
            x_TN = ctx.kept.ticket.get(leaves).view(-1, weight_EMN.shape[2]).to(grad_PM.dtype)
            grad_coordinates = ctx.absorb(ExpertFactors(grad_PM, x_TN[token_P], counts))
            del x_TN
        if ctx.kept.needs_x:
            num_tokens = ctx.shape[:-1].numel()
            grad_TN = _summed(grad_PM, None, weight_EMN.transpose(1, 2), token_P, counts, num_tokens)
            grad_x = grad_TN.to(grad_PM.dtype).view(ctx.shape)
        return grad_x, None, grad_coordinates, None, None, None


class _Scatter(torch.autograd.Function):
    """``out_t = Σ s_p W_e h_p`` over the token's pairs; keeps nothing of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        h_PN: Tensor,
        scale_P: Tensor,
        weight_EMN: Tensor,
        coordinates_MR: Tensor,
        absorb: Absorb,
        kept: Kept,
        routing: Routing,
        num_tokens: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.absorb, ctx.kept = absorb, kept
        return _summed(h_PN, scale_P, weight_EMN, routing.token_P, routing.counts, num_tokens).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        weight_EMN, token_P, scale_P, counts_E, *leaves = ctx.kept.saved()
        counts, h_PN = tuple(counts_E.tolist()), ctx.kept.ticket.get(leaves)
        grad_h, grad_scale = torch.empty_like(h_PN), torch.zeros_like(scale_P)
        left_PM = h_PN.new_empty(len(h_PN), weight_EMN.shape[1]) if ctx.needs_input_grad[3] else None
        for expert, pairs in _segments(counts):
            grad_PM, scale_P1 = grad_TM[token_P[pairs]].to(h_PN.dtype), scale_P[pairs, None]
            unscaled_PN = grad_PM @ weight_EMN[expert].to(h_PN.dtype)
            if ctx.needs_input_grad[1]:
                grad_scale[pairs] = (wide(unscaled_PN) * h_PN[pairs]).sum(1).to(scale_P.dtype)
            grad_h[pairs] = unscaled_PN.mul_(scale_P1)
            if left_PM is not None:
                left_PM[pairs] = grad_PM.mul_(scale_P1)
        grad_coordinates = None if left_PM is None else ctx.absorb(ExpertFactors(left_PM, h_PN, counts))
        return grad_h, grad_scale, None, grad_coordinates, None, None, None, None, None


@torch.no_grad()
def experts_value(
    x: Tensor, index_TK: Tensor, scale_TK: Tensor, gate_up_EMN: Tensor, down_EMN: Tensor, kind: ActivationKind
) -> Tensor:
    """The experts' forward pass (in the shape and dtype of ``x``), without gradients: gate and up lie in this order."""
    routing = routing_of(index_TK, len(gate_up_EMN))
    x_TN = x.reshape(-1, x.shape[-1])
    gate_PN, up_PN = grouped_linear(x_TN[routing.token_P], gate_up_EMN, routing.counts).chunk(2, dim=1)
    h_PN, scale_P = gated_value(kind, gate_PN, up_PN), scale_TK.reshape(-1)[routing.choice_P]
    rows_TM = _summed(h_PN, scale_P, down_EMN, routing.token_P, routing.counts, len(x_TN))
    return rows_TM.to(x.dtype).view(x.shape)


def subspace_experts(
    x: Tensor,
    index_TK: Tensor,
    scale_TK: Tensor,
    gate_up: StackedWeight,
    down: StackedWeight,
    kind: ActivationKind,
    holder: Holder,
) -> Tensor:
    """:func:`experts_value` whose weight gradients are absorbed as coordinates.

    Args:
        x: ``(…, N)`` with T rows in all. index_TK: expert of each choice, integers of any shape that ends in K. scale_TK: what
            the choice's output is multiplied by, in any float dtype; its gradient is exact.
        gate_up, down: weights E×2I×N and E×N×I. holder: how ``x``, gate and up wait.

    Under autocast the operands are cast as in ``F.linear``; the result has the dtype of ``x``.
    """
    own = x
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    index_TK, scale_TK = index_TK.reshape(-1, index_TK.shape[-1]), scale_TK.reshape(-1, scale_TK.shape[-1])
    routing = routing_of(index_TK, len(gate_up.weight_EMN))
    # Saved like the pairs: a replay from codes may send tokens elsewhere, and then all of it must be the replay's.
    counts_E = torch.tensor(routing.counts)
    with torch.autocast(x.device.type, enabled=False):
        kept = Kept(own.requires_grad)
        leaves: tuple[Tensor, ...] = ()
        if gate_up.coordinates_MR.requires_grad:
            kept.ticket, leaves = holder.hold(own, x.dtype)
        x = Keep.apply(x, gate_up.coordinates_MR, kept, gate_up.weight_EMN, routing.token_P, counts_E, *leaves)
        both_PM = _Gather.apply(x, *gate_up, kept, routing)
        gate_PN, up_PN = both_PM.chunk(2, dim=1)
        h_PN = gated(gate_PN, up_PN, kind, holder)
        del both_PM, gate_PN, up_PN
        scale_P = scale_TK.reshape(-1)[routing.choice_P]
        kept_h = Kept(h_PN.requires_grad)
        kept_h.ticket, leaves_h = holder.hold(h_PN)
        waiting = (down.weight_EMN, routing.token_P, scale_P.detach(), counts_E, *leaves_h)
        h_PN = Keep.apply(h_PN, down.coordinates_MR, kept_h, *waiting)
        result_TM = _Scatter.apply(h_PN, scale_P, *down, kept_h, routing, own.shape[:-1].numel(), own.dtype)
    return in_shape_of(own, result_TM)
