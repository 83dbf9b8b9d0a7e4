"""The subspace look-up: ``y = (W + C Pᵀ)[ids]`` with ``C = 0``; rows of ``δP`` are scattered to ``C.grad`` by token id.

Source: docs/method.md, section 1 (tied embeddings use the same coordinates from both sides).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gradlite.ops.factors import LookupFactors
from gradlite.ops.linear import Absorb


class _SubspaceEmbedding(torch.autograd.Function):
    """Keeps the token ids only."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight_MN: Tensor, coordinates_MR: Tensor, padding_idx: int | None, absorb: Absorb
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.absorb, ctx.num_rows = padding_idx, absorb, weight_MN.shape[0]
        return F.embedding(ids, weight_MN)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor | None, None, None]:
        if not ctx.needs_input_grad[2]:
            return None, None, None, None, None
        (ids,) = ctx.saved_tensors
        ids_T = ids.reshape(-1)
        grad_TN = grad.reshape(-1, grad.shape[-1])
        if ctx.padding_idx is not None:  # nn.Embedding never trains the padding row
            grad_TN = grad_TN.masked_fill((ids_T == ctx.padding_idx)[:, None], 0.0)
        return None, None, ctx.absorb(LookupFactors(ids_T, grad_TN, ctx.num_rows)), None, None


def subspace_embedding(
    ids: Tensor, weight_MN: Tensor, coordinates_MR: Tensor, padding_idx: int | None, absorb: Absorb
) -> Tensor:
    """``F.embedding(ids, weight, padding_idx)`` whose weight gradient is absorbed as coordinates.

    ``ids`` integers of any shape; the result has that shape plus N. The dense M×N gradient that ``F.embedding`` makes in
    backward never exists.
    """
    output: Tensor = _SubspaceEmbedding.apply(ids, weight_MN, coordinates_MR, padding_idx, absorb)
    return output
