"""The subspace linear: ``y = x (W + C Pᵀ)ᵀ`` with ``C = 0``, so that ``∂L/∂C = δᵀ(xP)`` is an ordinary ``.grad``.

Equal to ``torch.nn.functional.linear(x, W, b)`` in the forward pass and in ``∂L/∂x`` and ``∂L/∂b`` (both exact; errors
never travel to earlier layers). Instead of ``∂L/∂W`` (M×N) it hands the gradient's factors to ``absorb``, which returns the
gradient of the coordinates ``C`` (M×R). Source: docs/method.md, section 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gradlite.ops.factors import DenseFactors, GradientFactors

Absorb = Callable[[GradientFactors], Tensor]
"""Takes one gradient as factors, returns the coordinates' gradient (M×R) in the coordinates' dtype."""


class _SubspaceLinear(torch.autograd.Function):
    """Keeps ``x`` and ``W`` by reference (no copies); nothing else waits for backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_MN: Tensor, bias_M: Tensor | None, coordinates_MR: Tensor, absorb: Absorb
    ) -> Tensor:
        ctx.save_for_backward(x, weight_MN)
        ctx.absorb = absorb
        return F.linear(x, weight_MN, bias_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        x, weight_MN = ctx.saved_tensors
        grad_TM = grad.reshape(-1, grad.shape[-1])
        needs_x, _, needs_bias, needs_coordinates, _ = ctx.needs_input_grad
        grad_x = (grad_TM @ weight_MN).view(x.shape) if needs_x else None
        grad_bias = grad_TM.sum(0) if needs_bias else None
        grad_coordinates = ctx.absorb(DenseFactors(grad_TM, x.reshape(-1, x.shape[-1]))) if needs_coordinates else None
        return grad_x, None, grad_bias, grad_coordinates, None


def subspace_linear(x: Tensor, weight_MN: Tensor, bias_M: Tensor | None, coordinates_MR: Tensor, absorb: Absorb) -> Tensor:
    """``F.linear(x, weight, bias)`` whose weight gradient is absorbed as coordinates.

    Args:
        x: ``(…, N)``. weight_MN: the layer's weight; receives no ``.grad``. bias_M: or None; its gradient is exact.
        coordinates_MR: a leaf of zeros that receives ``δᵀ(xP)``. absorb: see :data:`Absorb`; called once in backward.

    Under autocast the operands are cast first, so that what waits for backward is the low-precision copy, as in
    ``F.linear``.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight_MN = x.to(dtype), weight_MN.to(dtype)
        bias_M = None if bias_M is None else bias_M.to(dtype)
    output: Tensor = _SubspaceLinear.apply(x, weight_MN, bias_M, coordinates_MR, absorb)
    return output
