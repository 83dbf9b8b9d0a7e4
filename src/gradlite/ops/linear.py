"""The subspace linear: ``y = x (W + C Pᵀ)ᵀ`` with ``C = 0``, so that ``∂L/∂C = δᵀ(xP)`` is an ordinary ``.grad``.

Equal to ``torch.nn.functional.linear(x, W, b)`` in the forward pass and in ``∂L/∂x`` and ``∂L/∂b`` (both exact; errors
never travel to earlier layers). Instead of ``∂L/∂W`` (M×N) it hands the gradient's factors to ``absorb``, which returns the
gradient of the coordinates ``C`` (M×R). Source: docs/method.md, section 1.

Two autograd nodes make one layer: see :mod:`gradlite.ops.keep`.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gradlite.hold.codec import Codec
from gradlite.hold.holder import Holder
from gradlite.ops.factors import DenseFactors, GradientFactors
from gradlite.ops.keep import Keep, Kept
from gradlite.ops.rows import in_shape_of

Absorb = Callable[[GradientFactors], Tensor]
"""Takes one gradient as factors, returns the coordinates' gradient (M×R) in the coordinates' dtype."""


class Projector(Protocol):
    """Absorbs from the input's coordinates ``xP`` alone (the paper's literal scheme), where the basis allows that."""

    def project(self, x_TN: Tensor) -> Tensor | None:
        """``xP`` (T×R) in the dtype of ``x``, or None while the gradient of this batch is needed beyond its coordinates."""

    def absorb_projected(self, grad_TM: Tensor, inside_TR: Tensor) -> Tensor:
        """The coordinates' gradient ``δᵀ(xP)``, as :data:`Absorb`."""


def linear_bytes(codec: Codec, num_tokens: int, width: int, itemsize: int) -> int:
    """Bytes that a linear layer holds where no operator before it holds its input already (then: none).

    With a :class:`Projector`, ``width`` is the rank.
    """
    return codec.nbytes(num_tokens, width, itemsize)


class _Kept(Kept):
    """``projector``: if the input's coordinates wait for the input."""

    projector: Projector | None = None


class _Multiply(torch.autograd.Function):
    """Keeps nothing of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_MN: Tensor, bias_M: Tensor | None, coordinates_MR: Tensor, absorb: Absorb, kept: _Kept
    ) -> Tensor:
        ctx.absorb, ctx.kept = absorb, kept
        return in_shape_of(x, F.linear(x.reshape(-1, x.shape[-1]), weight_MN, bias_M))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None, None]:
        _, _, needs_bias, needs_coordinates, _, _ = ctx.needs_input_grad
        needs_x = ctx.kept.needs_x
        grad_TM = grad.reshape(-1, grad.shape[-1])
        grad_bias = grad_TM.sum(0) if needs_bias else None
        if not (needs_x or needs_coordinates):
            return None, None, grad_bias, None, None, None
        weight_MN, *leaves = ctx.kept.saved()
        grad_coordinates = None
        if needs_coordinates and ctx.kept.projector is not None:
            grad_coordinates = ctx.kept.projector.absorb_projected(grad_TM, *leaves)
        elif needs_coordinates:
            x_TN = ctx.kept.ticket.get(leaves).view(-1, weight_MN.shape[1]).to(grad.dtype)
            grad_coordinates = ctx.absorb(DenseFactors(grad_TM, x_TN))
            del x_TN
        # The weight waits in its own dtype: under autocast a cast costs less than a second copy of the model.
        grad_x = (grad_TM @ weight_MN.to(grad.dtype)).view(*grad.shape[:-1], weight_MN.shape[1]) if needs_x else None
        return grad_x, None, grad_bias, grad_coordinates, None, None


def _projected(x: Tensor, own: Tensor, projector: Projector | None, holder: Holder) -> Tensor | None:
    """``xP`` where that is all that needs to wait: nobody holds ``x`` (``own`` before casting) anyway."""
    if projector is None or holder.shelf.find(own, x.dtype) is not None:
        return None
    with torch.no_grad():
        return projector.project(x.reshape(-1, x.shape[-1]))


def subspace_linear(
    x: Tensor,
    weight_MN: Tensor,
    bias_M: Tensor | None,
    coordinates_MR: Tensor,
    absorb: Absorb,
    holder: Holder,
    projector: Projector | None = None,
) -> Tensor:
    """``F.linear(x, weight, bias)`` whose weight gradient is absorbed as coordinates.

    Args:
        x: ``(…, N)``. weight_MN: the layer's weight; receives no ``.grad``. bias_M: or None; its gradient is exact.
        coordinates_MR: a leaf of zeros that receives ``δᵀ(xP)``. absorb: see :data:`Absorb`; called once in backward.
        holder: how ``x`` waits, unless an operator that made it holds it already. projector: if given, ``xP`` waits in its
            place where it can.

    Under autocast the operands are cast first, as in ``F.linear``, and what waits is the low-precision copy of ``x``.
    """
    own, own_weight_MN = x, weight_MN
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight_MN = x.to(dtype), weight_MN.to(dtype)
        bias_M = None if bias_M is None else bias_M.to(dtype)
    if not torch.is_grad_enabled():
        return F.linear(x, weight_MN, bias_M)
    kept = _Kept(own.requires_grad)
    leaves: tuple[Tensor, ...] = ()
    if coordinates_MR.requires_grad:
        inside_TR = _projected(x, own, projector, holder)
        if inside_TR is not None:
            kept.projector, leaves = projector, (inside_TR,)
        else:
            held = holder.hold(own, x.dtype)
            kept.ticket, leaves = held.ticket, held.leaves
    x = Keep.apply(x, coordinates_MR, kept, own_weight_MN, *leaves)
    output: Tensor = _Multiply.apply(x, weight_MN, bias_M, coordinates_MR, absorb, kept)
    return output
