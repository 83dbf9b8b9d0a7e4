"""RMSNorm and LayerNorm that keep ``x̂`` and one number a token, and share ``x̂`` with the layers that read the result.

Shape suffixes: T tokens (all dimensions but the last), N width.

``x̂ = (x − mean)·ρ`` with ``ρ = 1/√(mean((x − mean)²) + ε)``; RMSNorm leaves the mean out. ``y = w·x̂ + b``, Gemma's
``(1 + w)·x̂``. Backward (``g = δ·w``): ``∂L/∂x = ρ·(g − x̂·mean(g·x̂) − mean(g))``, again without the last mean for RMSNorm.
Equal to the modules' own forward passes, in their order of roundings; source: docs/method.md, section 7.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradlite.hold.codec import Codec
from gradlite.hold.compiled import kernel
from gradlite.hold.holder import Holder
from gradlite.hold.place import Place
from gradlite.hold.ticket import Held, Ticket
from gradlite.ops.precision import wide
from gradlite.ops.rows import in_shape_of


@dataclass(frozen=True)
class NormKind:
    """``centred``: LayerNorm. ``plus_one``: the weight is stored less one. ``scale_first``: scaled before it is rounded to
    the input's dtype (Gemma, OLMo 2), not after (Llama).
    """

    eps: float
    centred: bool = False
    plus_one: bool = False
    scale_first: bool = False


def norm_bytes(codec: Codec, num_tokens: int, width: int, itemsize: int) -> int:
    """Bytes that a norm holds: ``x̂``, and ``ρ`` in float32."""
    return codec.nbytes(num_tokens, width, itemsize) + num_tokens * max(4, itemsize)


def _scaled(kind: NormKind, xhat_TN: Tensor, weight_N: Tensor | None, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``y`` from ``x̂`` in wide or in the input's dtype."""
    if weight_N is None:
        return xhat_TN.to(dtype)
    if kind.scale_first or kind.centred:
        weight_N = wide(weight_N) + 1.0 if kind.plus_one else wide(weight_N)
        y_TN = wide(xhat_TN) * weight_N
        return (y_TN if bias_N is None else y_TN + wide(bias_N)).to(dtype)
    y_TN = (weight_N + 1.0 if kind.plus_one else weight_N) * xhat_TN.to(dtype)
    return y_TN if bias_N is None else y_TN + bias_N


def normalised(kind: NormKind, x_TN: Tensor) -> tuple[Tensor, Tensor]:
    """``x̂`` (T×N) and ``ρ`` (T×1) in float32 or wider."""
    x_TN = wide(x_TN)
    if kind.centred:
        x_TN = x_TN - x_TN.mean(-1, keepdim=True)
    rho_T1 = torch.rsqrt(x_TN.square().mean(-1, keepdim=True) + kind.eps)
    return x_TN * rho_T1, rho_T1


def _forward(
    kind: NormKind, codec: Codec, x_TN: Tensor, weight_N: Tensor | None, bias_N: Tensor | None, noise_TN: Tensor | None
) -> tuple[Tensor, ...]:
    xhat_TN, rho_T1 = normalised(kind, x_TN)
    leaves = codec.encode(xhat_TN.to(x_TN.dtype) if noise_TN is None else xhat_TN, noise_TN)
    return _scaled(kind, xhat_TN, weight_N, bias_N, x_TN.dtype), rho_T1, *leaves


def _rebuild(
    kind: NormKind, codec: Codec, dtype: torch.dtype, weight_N: Tensor | None, bias_N: Tensor | None, *leaves: Tensor
) -> Tensor:
    return _scaled(kind, codec.decode(leaves, dtype), weight_N, bias_N, dtype)


def _backward(
    kind: NormKind, codec: Codec, grad_TN: Tensor, weight_N: Tensor | None, rho_T1: Tensor, *leaves: Tensor
) -> tuple[Tensor, ...]:
    """``∂L/∂x`` in the gradient's dtype; then, with a weight, ``∂L/∂w`` and ``∂L/∂b`` in float32 or wider."""
    wide_TN = wide(grad_TN)
    xhat_TN = codec.decode(leaves, wide_TN.dtype)
    scaled_TN = wide_TN
    if weight_N is not None:
        scaled_TN = wide_TN * (wide(weight_N) + 1.0 if kind.plus_one else wide(weight_N))
    grad_x_TN = scaled_TN - xhat_TN * (scaled_TN * xhat_TN).mean(-1, keepdim=True)
    if kind.centred:
        grad_x_TN = grad_x_TN - scaled_TN.mean(-1, keepdim=True)
    grad_x_TN = (grad_x_TN * rho_T1).to(grad_TN.dtype)
    if weight_N is None:
        return (grad_x_TN,)
    return grad_x_TN, (wide_TN * xhat_TN).sum(0), wide_TN.sum(0)


def _ticket(kind: NormKind, codec: Codec, dtype: torch.dtype, num_affine: int, place: Place) -> Ticket:
    """For ``y``, from its weight and bias (where there are any) and the leaves of ``x̂``."""

    def rebuild(*parts: Tensor) -> Tensor:
        weight_N, bias_N = (*parts[:num_affine], None, None)[:2]
        leaves = place.fetch(parts[num_affine:])
        y_TN: Tensor = kernel(_rebuild, kind, codec, dtype)(weight_N, bias_N, *leaves)
        return y_TN

    return Ticket(rebuild)


def norm_value(x: Tensor, weight_N: Tensor | None, bias_N: Tensor | None, kind: NormKind) -> Tensor:
    """The norm's result by autograd-free formula, for ``x`` of any shape (N last)."""
    return _scaled(kind, normalised(kind, x)[0], weight_N, bias_N, x.dtype)


class _Norm(torch.autograd.Function):
    """Keeps the leaves of ``x̂``, and ``ρ``: see :func:`norm_bytes`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_N: Tensor | None, bias_N: Tensor | None, kind: NormKind, holder: Holder) -> Tensor:
        x_TN = x.reshape(-1, x.shape[-1])
        codec = holder.codec_for(x_TN.shape[1])
        y_TN, rho_T1, *leaves = kernel(_forward, kind, codec)(x_TN, weight_N, bias_N, holder.noise_for(x_TN))
        if weight_N is None and not codec.is_lossy:
            y_TN = y_TN.clone()  # or it could be the leaf itself, and what changes it in place would change that
        leaves = holder.place.put(leaves)
        ctx.save_for_backward(weight_N, rho_T1, *leaves)
        ctx.kind, ctx.codec, ctx.shelf, ctx.place = kind, codec, holder.shelf, holder.place
        y = in_shape_of(x, y_TN)
        affine = tuple(parameter for parameter in (weight_N, bias_N) if parameter is not None)
        holder.shelf.offer(y, Held(_ticket(kind, codec, x.dtype, len(affine), holder.place), (*affine, *leaves)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        ctx.shelf.clear()  # backward has begun: nobody asks any more
        weight_N, rho_T1, *leaves = ctx.saved_tensors
        grad_TN = grad.reshape(-1, grad.shape[-1])
        grad_x_TN, *affine = kernel(_backward, ctx.kind, ctx.codec)(grad_TN, weight_N, rho_T1, *ctx.place.fetch(leaves))
        grad_weight, grad_bias = (*affine, None, None)[:2]
        _, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        return (
            grad_x_TN.view(grad.shape),
            grad_weight.to(weight_N.dtype) if needs_weight else None,
            grad_bias.to(weight_N.dtype) if needs_bias else None,
            None,
            None,
        )


def norm(x: Tensor, weight_N: Tensor | None, bias_N: Tensor | None, kind: NormKind, holder: Holder) -> Tensor:
    """The normalised ``x`` (any shape, N last), scaled and shifted; the result is offered to the holder's shelf.

    Args:
        x: ``(…, N)``. weight_N, bias_N: or None; their gradients are exact up to the rounding of the held ``x̂``.
        kind: which norm. holder: how ``x̂`` waits.
    """
    if not torch.is_grad_enabled():
        return norm_value(x, weight_N, bias_N, kind)
    y: Tensor = _Norm.apply(x, weight_N, bias_N, kind, holder)
    return y
