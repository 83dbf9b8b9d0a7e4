"""Scaled dot-product attention that keeps q, k and v through a holder; with flash kernels a number a query and head as well.

Shape suffixes: B batch, H query heads, G key-value heads (H a multiple of G), S queries, U keys, D head width.

Equal to ``F.scaled_dot_product_attention(q, k, v, mask, is_causal=…, scale=…)`` without dropout. Keys and values are held
before they are repeated for their group of query heads. Where q and k are held as codes, backward makes the softmax anew from
the codes: with the exact log-sums and result, the probabilities would not sum to one and errors would not cancel (whole-model
gradient cosine of SmolLM2 with int8: 0.9942 that way, 0.9992 this way). The result is laid out B×S×H×D, contiguous, as the
output projection reads it: the projection finds it on the shelf, and it is held once. Source: docs/method.md, section 7.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gradlite.hold.codec import Codec
from gradlite.hold.holder import Holder
from gradlite.ops.blocked_attention import blocked_backward, blocked_forward

_FLASH_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FLASH_CUDA = torch.ops.aten._scaled_dot_product_flash_attention
_FLASH_CUDA_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward


def attention_bytes(
    codec: Codec, num_tokens: int, num_heads: int, num_kv_heads: int, head_width: int, itemsize: int, is_flash: bool
) -> int:
    """Bytes that the operator holds: q, k and v, and with PyTorch's flash kernels the float32 log-sum of every query and head.

    The result is held once, by the layer that reads it (:func:`gradlite.ops.linear.linear_bytes`).
    """
    queries = codec.nbytes(num_tokens, num_heads * head_width, itemsize)
    keys = codec.nbytes(num_tokens, num_kv_heads * head_width, itemsize)
    return queries + 2 * keys + (4 * num_tokens * num_heads if is_flash else 0)


def _rows(x_BHSD: Tensor) -> Tensor:
    """B×H×S×D to B×S×(H·D): the layout of the projections, so that no copy is made where the heads are views of them."""
    return x_BHSD.transpose(1, 2).flatten(2)


def _heads(rows: Tensor, like: tuple[int, ...]) -> Tensor:
    """The rows of :func:`_rows`, in any shape, as B×H×S×D."""
    batch, heads, length, width = like
    return rows.view(batch, length, heads, width).transpose(1, 2)


def _repeated(x_BGUD: Tensor, num_heads: int) -> Tensor:
    return x_BGUD if x_BGUD.shape[1] == num_heads else x_BGUD.repeat_interleave(num_heads // x_BGUD.shape[1], dim=1)


def _summed(grad_BHUD: Tensor, num_kv_heads: int) -> Tensor:
    """The gradient of :func:`_repeated`."""
    if grad_BHUD.shape[1] == num_kv_heads:
        return grad_BHUD
    return grad_BHUD.unflatten(1, (num_kv_heads, -1)).sum(2)


def _added(mask: Tensor | None, q_BHSD: Tensor) -> Tensor | None:
    """The mask as numbers that are added to the logits. What waits is the model's own, which all layers share."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=q_BHSD.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


class _Kept:
    """The tickets of what one attention holds, in order."""

    def __init__(self, holder: Holder, tensors: Sequence[Tensor]) -> None:
        held = [holder.hold(tensor) for tensor in tensors]
        self.tickets = [(one.ticket, len(one.leaves)) for one in held]
        self.leaves = tuple(leaf for one in held for leaf in one.leaves)

    def get(self, leaves: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The tensors as B×H×S×D of these shapes. ``leaves``: as saved, whatever hooks did to them."""
        tensors, place = [], 0
        for (ticket, length), shape in zip(self.tickets, shapes, strict=True):
            tensors.append(_heads(ticket.get(leaves[place : place + length]), shape))
            place += length
        return tensors


class _Flash(torch.autograd.Function):
    """PyTorch's flash kernels. Keeps q, k, v, the result and the log-sums, all exact: see :func:`attention_bytes`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, holder: Holder
    ) -> Tensor:
        keys = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
        extra: tuple[Tensor | None, ...] = (mask,)
        if q.is_cuda:
            out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = _FLASH_CUDA(q, *keys, 0.0, is_causal, scale=scale)
            ctx.longest, extra = (max_q, max_k), (cum_q, cum_k, seed, offset)
        else:
            out, lse = _FLASH_CPU(q, *keys, 0.0, is_causal, attn_mask=_added(mask, q), scale=scale)
        out_BSHD: Tensor = out.transpose(1, 2).contiguous()
        ctx.kept = _Kept(holder, (_rows(q), _rows(k), _rows(v), out_BSHD.flatten(2)))
        ctx.shapes = (tuple(q.shape), tuple(k.shape), tuple(v.shape), tuple(q.shape))
        ctx.is_causal, ctx.scale, ctx.num_extra = is_causal, scale, len(extra)
        ctx.save_for_backward(lse, *extra, *ctx.kept.leaves)
        ctx.kept.leaves = ()
        return out_BSHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHD: Tensor) -> tuple[Tensor | None, ...]:
        lse, *rest = ctx.saved_tensors
        extra, leaves = rest[: ctx.num_extra], rest[ctx.num_extra :]
        q, k, v, out = ctx.kept.get(leaves, ctx.shapes)
        num_kv_heads = k.shape[1]
        k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
        grad = grad_BSHD.transpose(1, 2)
        if q.is_cuda:
            cum_q, cum_k, seed, offset = extra
            grads = _FLASH_CUDA_BACKWARD(
                grad, q, k, v, out, lse, cum_q, cum_k, *ctx.longest, 0.0, ctx.is_causal, seed, offset, scale=ctx.scale
            )
        else:
            mask = _added(extra[0], q)
            grads = _FLASH_CPU_BACKWARD(grad, q, k, v, out, lse, 0.0, ctx.is_causal, attn_mask=mask, scale=ctx.scale)
        return grads[0], _summed(grads[1], num_kv_heads), _summed(grads[2], num_kv_heads), None, None, None, None


def _keep_qkv(
    ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, holder: Holder
) -> None:
    """All that a backward pass needs which makes the softmax anew."""
    ctx.kept = _Kept(holder, (_rows(q), _rows(k), _rows(v)))
    ctx.shapes = (tuple(q.shape), tuple(k.shape), tuple(v.shape))
    ctx.is_causal, ctx.scale = is_causal, scale
    ctx.save_for_backward(mask, *ctx.kept.leaves)
    ctx.kept.leaves = ()


class _Blocked(torch.autograd.Function):
    """Our own blocks. Keeps q, k and v."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, holder: Holder
    ) -> Tensor:
        _keep_qkv(ctx, q, k, v, mask, is_causal, scale, holder)
        return blocked_forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, is_causal, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHD: Tensor) -> tuple[Tensor | None, ...]:
        mask, *leaves = ctx.saved_tensors
        q, k, v = (x.transpose(1, 2) for x in ctx.kept.get(leaves, ctx.shapes))
        grads = blocked_backward(grad_BSHD, q, k, v, mask, ctx.is_causal, ctx.scale)
        return *(grad.transpose(1, 2) for grad in grads), None, None, None, None


class _Replayed(torch.autograd.Function):
    """Keeps q, k and v, and runs PyTorch's attention again in backward: for codes, and for what the flash kernels refuse."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, holder: Holder
    ) -> Tensor:
        _keep_qkv(ctx, q, k, v, mask, is_causal, scale, holder)
        return _attend(q, k, v, mask, is_causal, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHD: Tensor) -> tuple[Tensor | None, ...]:
        mask, *leaves = ctx.saved_tensors
        tensors = [x.detach().requires_grad_() for x in ctx.kept.get(leaves, ctx.shapes)]
        with torch.enable_grad():
            q, k, v = tensors
            out_BSHD = _attend(q, k, v, mask, ctx.is_causal, ctx.scale)
        return *torch.autograd.grad(out_BSHD, tensors, grad_BSHD), None, None, None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
    return out.transpose(1, 2).contiguous()


_LONGEST_BLOCKED = 512
"""Keys from which flash kernels are as fast as ours. SmolLM2's heads, two threads, milliseconds of forward + backward, flash
and blocked: 4×512: 21 + 52, 15 + 34; 2×1024: 26 + 49, 24 + 51; 1×2048: 44 + 88, 51 + 108. From codes flash kernels need their
forward pass twice.
"""


def _blocks_pay(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_lossy: bool) -> bool:
    if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not is_lossy and k.shape[2] > _LONGEST_BLOCKED:
        return False
    sizes = (1, q.shape[2], k.shape[2])
    has_plain_mask = mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1:] == sizes)
    return has_plain_mask and q.shape[-1] == v.shape[-1]


def _flash_takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> bool:
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return False
    if any(one.stride(-1) != 1 for one in (q, k, v)):  # the kernels themselves read on as if it were
        return False
    if q.is_cuda:
        if is_causal and q.shape[2] != k.shape[2]:  # its triangle ends at the last key, PyTorch's at the first
            return False
        if torch.cuda.get_device_capability(q.device) < (8, 0):  # PyTorch's flash kernels begin with Ampere
            return False
        return mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    return q.device.type == "cpu" and (mask is None or mask.dim() in (2, 4))


def attention(
    q_BHSD: Tensor,
    k_BGUD: Tensor,
    v_BGUD: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    holder: Holder,
    is_frugal: bool = False,
) -> Tensor:
    """Attention of every query to the keys it may see; the result is B×S×H×D, contiguous.

    Args:
        mask: broadcastable to B×H×S×U; bool (True: may be seen) or added to the logits. is_causal: a lower triangle instead
            (then ``mask`` is None). scale: of the logits. holder: how q, k, v and the result wait.
        is_frugal: kernels with little workspace before faster ones: scores of a block of ours would be the largest tensors.

    Under autocast everything is cast first, as in PyTorch's own.
    """
    if torch.is_autocast_enabled(q_BHSD.device.type) and q_BHSD.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q_BHSD.device.type)
        q_BHSD, k_BGUD, v_BGUD = q_BHSD.to(dtype), k_BGUD.to(dtype), v_BGUD.to(dtype)
        mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    if not torch.is_grad_enabled():
        return _attend(q_BHSD, k_BGUD, v_BGUD, mask, is_causal, scale)
    function: type[torch.autograd.Function] = _Replayed
    if not (is_frugal and not holder.codec.is_lossy) and _blocks_pay(q_BHSD, k_BGUD, v_BGUD, mask, holder.codec.is_lossy):
        function = _Blocked
    elif not holder.codec.is_lossy and _flash_takes(q_BHSD, k_BGUD, v_BGUD, mask, is_causal):
        function = _Flash
    out_BSHD: Tensor = function.apply(q_BHSD, k_BGUD, v_BGUD, mask, is_causal, scale, holder)
    return out_BSHD
