"""The middle of a gated MLP, ``h = act(gate) · up``: keeps gate and up, and computes ``h`` again for the layer that reads it.

Shape suffixes: T tokens, N width of the MLP. Source: docs/method.md, section 7.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradlite.hold.codec import Codec
from gradlite.hold.compiled import kernel
from gradlite.hold.holder import Holder
from gradlite.hold.ticket import Held
from gradlite.ops.activation import ActivationKind, activate, derivative
from gradlite.ops.precision import wide
from gradlite.ops.rows import in_shape_of


def gated_bytes(codec: Codec, num_tokens: int, width: int, itemsize: int) -> int:
    """Bytes that the operator holds: gate and up."""
    return 2 * codec.nbytes(num_tokens, width, itemsize)


def gated_value(kind: ActivationKind, gate: Tensor, up: Tensor) -> Tensor:
    """``act(gate) · up``, rounded once in between, as the two modules in a row would."""
    return activate(kind, wide(gate)).to(gate.dtype) * up


def _forward(
    kind: ActivationKind,
    codec: Codec,
    gate_TN: Tensor,
    up_TN: Tensor,
    gate_noise_TN: Tensor | None,
    up_noise_TN: Tensor | None,
) -> tuple[Tensor, ...]:
    h_TN = gated_value(kind, gate_TN, up_TN)
    return h_TN, *codec.encode(gate_TN, gate_noise_TN), *codec.encode(up_TN, up_noise_TN)


def _rebuild(kind: ActivationKind, codec: Codec, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
    half = codec.num_leaves
    return gated_value(kind, codec.decode(leaves[:half], dtype), codec.decode(leaves[half:], dtype))


def _backward(kind: ActivationKind, codec: Codec, grad_TN: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
    grad, half = wide(grad_TN), codec.num_leaves
    gate_TN, up_TN = codec.decode(leaves[:half], grad.dtype), codec.decode(leaves[half:], grad.dtype)
    grad_gate_TN = grad * up_TN * derivative(kind, gate_TN)
    return grad_gate_TN.to(grad_TN.dtype), (grad * activate(kind, gate_TN)).to(grad_TN.dtype)


class _Gated(torch.autograd.Function):
    """Keeps the leaves of gate and up: see :func:`gated_bytes`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: ActivationKind, holder: Holder) -> Tensor:
        gate_TN, up_TN = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
        codec = holder.codec_for(gate_TN.shape[1])
        noises = holder.noise_for(gate_TN), holder.noise_for(up_TN)
        h_TN, *leaves = kernel(_forward, kind, codec)(gate_TN, up_TN, *noises)
        leaves = holder.place.put(leaves)
        ctx.save_for_backward(*leaves)
        ctx.kind, ctx.codec, ctx.place = kind, codec, holder.place
        h = in_shape_of(gate, h_TN)
        holder.shelf.offer(h, Held(holder.ticket(kernel(_rebuild, kind, codec, h.dtype)), leaves))
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_TN = grad.reshape(-1, grad.shape[-1])
        grad_gate_TN, grad_up_TN = kernel(_backward, ctx.kind, ctx.codec)(grad_TN, *ctx.place.fetch(ctx.saved_tensors))
        return grad_gate_TN.view(grad.shape), grad_up_TN.view(grad.shape), None, None


def gated(gate: Tensor, up: Tensor, kind: ActivationKind, holder: Holder) -> Tensor:
    """``act(gate) · up`` for two tensors of one shape and dtype; the result is offered to the holder's shelf.

    Gate and up may be the two halves of one tensor (fused projections): they are held as rows of their own.
    """
    if not (torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)):
        return gated_value(kind, gate, up)
    h: Tensor = _Gated.apply(gate, up, kind, holder)
    return h
