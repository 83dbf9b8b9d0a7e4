"""The nonlinearities of MLPs, with their derivatives by formula, and a plain one that keeps its input alone.

Shape suffixes: T tokens, N width. Equal to torch.nn.functional's silu, gelu (erf and tanh) and relu, computed in float32 or
wider; the derivative needs the input only, so the output is never kept: the layer that reads it gets it computed again.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradlite.hold.codec import Codec
from gradlite.hold.compiled import kernel
from gradlite.hold.holder import Holder
from gradlite.hold.ticket import Held
from gradlite.ops.precision import wide
from gradlite.ops.rows import in_shape_of

ActivationKind = Literal["silu", "gelu", "gelu_tanh", "relu"]
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def activate(kind: ActivationKind, x: Tensor) -> Tensor:
    """The activation; in and out in float32 or wider."""
    if kind == "silu":
        return x * torch.sigmoid(x)
    if kind == "relu":
        return x.relu()
    return x * _gelu_gate(kind, x)


def derivative(kind: ActivationKind, x: Tensor) -> Tensor:
    """Its derivative at ``x``."""
    if kind == "silu":
        sigmoid = torch.sigmoid(x)
        return sigmoid * (1.0 + x * (1.0 - sigmoid))
    if kind == "relu":
        return (x > 0).to(x.dtype)
    if kind == "gelu":
        return _gelu_gate(kind, x) + x * torch.exp(-0.5 * x.square()) * (1.0 / math.sqrt(2.0 * math.pi))
    gate = _gelu_gate(kind, x)
    slope = _SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * x.square())
    return gate + x * 2.0 * gate * (1.0 - gate) * slope


def _gelu_gate(kind: ActivationKind, x: Tensor) -> Tensor:
    if kind == "gelu":
        return 0.5 * (1.0 + torch.erf(x * (1.0 / math.sqrt(2.0))))
    return 0.5 * (1.0 + torch.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)))


def activation_value(x: Tensor, kind: ActivationKind) -> Tensor:
    """``act(x)`` in the dtype of ``x``, by autograd-free formula."""
    return activate(kind, wide(x)).to(x.dtype)


def _forward(kind: ActivationKind, codec: Codec, x_TN: Tensor, noise_TN: Tensor | None) -> tuple[Tensor, ...]:
    return activation_value(x_TN, kind), *codec.encode(x_TN, noise_TN)


def _rebuild(kind: ActivationKind, codec: Codec, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
    return activation_value(codec.decode(leaves, dtype), kind)


def _backward(kind: ActivationKind, codec: Codec, grad_TN: Tensor, *leaves: Tensor) -> Tensor:
    grad = wide(grad_TN)
    return (grad * derivative(kind, codec.decode(leaves, grad.dtype))).to(grad_TN.dtype)


class _Activation(torch.autograd.Function):
    """Keeps the input's leaves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: ActivationKind, holder: Holder) -> Tensor:
        x_TN = x.reshape(-1, x.shape[-1])
        codec = holder.codec_for(x_TN.shape[1])
        y_TN, *leaves = kernel(_forward, kind, codec)(x_TN, holder.noise_for(x_TN))
        leaves = holder.place.put(leaves)
        ctx.save_for_backward(*leaves)
        ctx.kind, ctx.codec, ctx.place = kind, codec, holder.place
        y = in_shape_of(x, y_TN)
        holder.shelf.offer(y, Held(holder.ticket(kernel(_rebuild, kind, codec, x.dtype)), leaves))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad_TN = grad.reshape(-1, grad.shape[-1])
        return kernel(_backward, ctx.kind, ctx.codec)(grad_TN, *ctx.place.fetch(ctx.saved_tensors)).view(grad.shape), None, None


def activation(x: Tensor, kind: ActivationKind, holder: Holder) -> Tensor:
    """``act(x)``; what waits is ``x`` as the holder keeps it. The result is offered to the holder's shelf."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return activation_value(x, kind)
    y: Tensor = _Activation.apply(x, kind, holder)
    return y
