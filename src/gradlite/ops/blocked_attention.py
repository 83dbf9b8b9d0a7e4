"""Attention for short formats on a CPU, in blocks of queries: batched products, and one fused pass over a block's scores.

Shape suffixes: B batch, H query heads, G key-value heads (H = G·J), S queries, s queries of a block, U keys, D head width.

PyTorch's flash kernel multiplies small tiles in bfloat16 at a fifth of the speed of its batched products. Here one block's
scores (heads × 256 × keys) exist at a time, keys and values are never repeated for their group of query heads, and under a
causal mask a block never looks at later keys. Backward needs q, k and v only: it makes the softmax anew. Scores are rounded
to the tensors' format before the softmax, as in eager attention.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gradlite.hold.compiled import kernel

BLOCK = 256
"""Queries of a block, at most."""

_SMALLEST_BLOCK = 64
_ELEMENTS = 5 << 18
"""Of a block's scores, about: four such tensors should stay in a cache (SmolLM2, 1,024 keys: 128 queries beat 256)."""

_UNSEEN = -1e30


class _Block(NamedTuple):
    queries: slice
    num_keys: int
    may_see_BsU: Tensor | None
    """Which keys a query may see, where rows of the batch differ: masks are four times as large, and made one at a time."""
    mask_1sU: Tensor | None
    """The mask that all rows share."""

    def mask_of(self, row: int) -> Tensor | None:
        """The mask of one row of the batch, 1×s×U: what is added to the logits, float32.

        Added, because choosing by a bool takes a compiled kernel twice as long.
        """
        return self.mask_1sU if self.may_see_BsU is None else _added(self.may_see_BsU[row : row + 1])


def _added(may_see: Tensor) -> Tensor:
    """0 where a query may see a key."""
    return torch.zeros(may_see.shape, device=may_see.device).masked_fill_(~may_see, _UNSEEN)


def _block_size(num_heads: int, num_keys: int) -> int:
    size = BLOCK
    while size > _SMALLEST_BLOCK and num_heads * num_keys * size > _ELEMENTS:
        size //= 2
    return size


def _blocks(q_BSHD: Tensor, num_keys: int, mask: Tensor | None, is_causal: bool) -> Iterator[_Block]:
    _, num_queries, num_heads, _ = q_BSHD.shape
    device, size = q_BSHD.device, _block_size(num_heads, num_keys)
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        seen = min(stop, num_keys) if is_causal else num_keys
        may_see = None if mask is None else mask[:, 0, start:stop]
        if is_causal:
            may_see = torch.ones(1, stop - start, seen, dtype=torch.bool, device=device).tril(start)
        is_shared = may_see is not None and len(may_see) == 1
        mask_1sU = _added(may_see) if may_see is not None and is_shared else None
        yield _Block(slice(start, stop), seen, None if is_shared else may_see, mask_1sU)


def _softmax(scale: float, scores_HsU: Tensor, mask_1sU: Tensor | None) -> Tensor:
    """Probabilities in the scores' dtype."""
    exponent_HsU, inverse_Hs1 = _exponents(scale, scores_HsU, mask_1sU)
    return (exponent_HsU * inverse_Hs1).to(scores_HsU.dtype)


def _exponents(scale: float, scores_HsU: Tensor, mask_1sU: Tensor | None) -> tuple[Tensor, Tensor]:
    """Exponentials, and one over their sums: zero for a query that sees no key, as in PyTorch."""
    wide_HsU = scores_HsU.float() * scale
    if mask_1sU is not None:
        wide_HsU = wide_HsU + mask_1sU
    top_Hs1 = wide_HsU.amax(-1, keepdim=True)
    exponent_HsU = torch.exp(wide_HsU - top_Hs1)
    return exponent_HsU, torch.where(top_Hs1 > 0.5 * _UNSEEN, 1.0 / exponent_HsU.sum(-1, keepdim=True), 0.0)


def _softmax_backward(scale: float, scores_HsU: Tensor, grad_HsU: Tensor, mask_1sU: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities again, and the gradient of the unscaled scores, from the gradient of the probabilities."""
    exponent_HsU, inverse_Hs1 = _exponents(scale, scores_HsU, mask_1sU)
    wide_grad_HsU = grad_HsU.float()
    mean_Hs1 = (exponent_HsU * wide_grad_HsU).sum(-1, keepdim=True) * inverse_Hs1
    probability_HsU = exponent_HsU * inverse_Hs1
    grad_scores_HsU = probability_HsU * (wide_grad_HsU - mean_Hs1) * scale
    return probability_HsU.to(scores_HsU.dtype), grad_scores_HsU.to(scores_HsU.dtype)


def _grouped(x_sHD: Tensor, num_kv_heads: int) -> Tensor:
    """Queries (or their gradients) as G×(J·s)×D: the heads of a group lie below each other."""
    length, heads, width = x_sHD.shape
    return x_sHD.transpose(0, 1).reshape(num_kv_heads, heads // num_kv_heads * length, width)


def blocked_forward(
    q_BSHD: Tensor, k_BUGD: Tensor, v_BUGD: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """The result B×S×H×D in the inputs' dtype.

    ``mask``: bool, broadcastable to B×1×S×U, or None.
    """
    heads, num_kv_heads = q_BSHD.shape[2], k_BUGD.shape[2]
    out_BSHD = torch.empty_like(q_BSHD, memory_format=torch.contiguous_format)
    blocks = list(_blocks(q_BSHD, k_BUGD.shape[1], mask, is_causal))
    for row in range(len(q_BSHD)):
        row_k, row_v = (x[row].transpose(0, 1).contiguous() for x in (k_BUGD, v_BUGD))
        for block in blocks:
            q = _grouped(q_BSHD[row, block.queries], num_kv_heads)
            k, v = (x[:, : block.num_keys] for x in (row_k, row_v))
            scores_HsU = torch.bmm(q, k.transpose(1, 2)).view(heads, -1, block.num_keys)
            probability_HsU = kernel(_softmax, scale)(scores_HsU, block.mask_of(row))
            out = torch.bmm(probability_HsU.view(num_kv_heads, -1, block.num_keys), v)
            out_BSHD[row, block.queries] = out.view(heads, -1, out.shape[-1]).transpose(0, 1)
    return out_BSHD


def blocked_backward(
    grad_BSHD: Tensor,
    q_BSHD: Tensor,
    k_BUGD: Tensor,
    v_BUGD: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their own layouts and dtype; those of k and v are summed over blocks in float32."""
    batch, _, heads, width = q_BSHD.shape
    num_kv_heads, num_keys = k_BUGD.shape[2], k_BUGD.shape[1]
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BSHD, k_BUGD, v_BUGD))
    blocks = list(_blocks(q_BSHD, num_keys, mask, is_causal))
    for row in range(batch):
        row_grad_k = torch.zeros(num_kv_heads, num_keys, width, dtype=torch.float32, device=q_BSHD.device)
        row_grad_v = torch.zeros_like(row_grad_k)
        row_k, row_v = (x[row].transpose(0, 1).contiguous() for x in (k_BUGD, v_BUGD))
        for block in blocks:
            q = _grouped(q_BSHD[row, block.queries], num_kv_heads)
            grad = _grouped(grad_BSHD[row, block.queries], num_kv_heads)
            k, v = (x[:, : block.num_keys] for x in (row_k, row_v))
            shape = (heads, -1, block.num_keys)
            scores_HsU = torch.bmm(q, k.transpose(1, 2)).view(shape)
            grad_HsU = torch.bmm(grad, v.transpose(1, 2)).view(shape)
            probability_HsU, grad_HsU = kernel(_softmax_backward, scale)(scores_HsU, grad_HsU, block.mask_of(row))
            probability, grad_scores = (x.view(num_kv_heads, -1, block.num_keys) for x in (probability_HsU, grad_HsU))
            row_grad_v[:, : block.num_keys] += torch.bmm(probability.transpose(1, 2), grad)
            row_grad_k[:, : block.num_keys] += torch.bmm(grad_scores.transpose(1, 2), q)
            grad_q[row, block.queries] = torch.bmm(grad_scores, k).view(heads, -1, width).transpose(0, 1)
        grad_k[row], grad_v[row] = row_grad_k.transpose(0, 1), row_grad_v.transpose(0, 1)
    return grad_q, grad_k, grad_v
