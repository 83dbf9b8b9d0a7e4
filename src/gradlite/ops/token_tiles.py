"""A part of a model that treats every token alone (an MLP), a few tokens at a time: keeps its input only.

Shape suffixes: T tokens, t tokens of one tile, N width.

An MLP is several times as wide as the model, and most of what lives while a block is replayed is its: gate, up, their product
and the three gradients. In backward each tile of tokens runs again and is differentiated before the next one begins, so that
these exist for one tile. The part runs as often as in a replay of the whole block, for that stops when this operator's input
is saved (:mod:`gradlite.ops.keep`). Gradients of parameters are summed over tiles in float32 or wider.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradlite.hold.holder import Holder
from gradlite.ops.keep import Keep, Kept
from gradlite.ops.precision import wide
from gradlite.ops.random_state import random_state, restored
from gradlite.ops.rows import in_shape_of

TILE_TOKENS = {"cpu": 128, "cuda": 2048}
"""Tokens of one tile. With fewer, products pack their weights too often: on a CPU a step of Qwen2.5-0.5B's shape with 256
tokens took 1.45 times MeBP's at 52, 1.1 at 86, 1.08 at 128, 1.0 with all at once; its peak was 17.7, 19.4, 21.4, 27.1 MB."""


class TokenWise(NamedTuple):
    """A function of tokens, T×N to T×N.

    ``value``: without gradients. ``replay``: the same with gradients; what it returns may have any values, for only its graph
    is used. ``parameters``: all that ask for a gradient. ``is_random``: whether it draws random numbers; then there is one
    tile, so that it draws them in the order in which the whole would.
    """

    value: Callable[[Tensor], Tensor]
    replay: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]
    is_random: bool = False


def tile_tokens(num_tokens: int, part: TokenWise, device_type: str) -> int:
    """Tokens of one tile, as even as they come."""
    if part.is_random:
        return max(1, num_tokens)
    most = TILE_TOKENS.get(device_type, TILE_TOKENS["cuda"])
    num_tiles = -(-num_tokens // most)
    return max(1, -(-num_tokens // max(1, num_tiles)))


class _Tiles(torch.autograd.Function):
    """Keeps nothing of its own; its input was saved by the node before it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: TokenWise, holder: Holder, kept: Kept, *parameters: Tensor) -> Tensor:
        ctx.part, ctx.holder, ctx.kept = part, holder, kept
        ctx.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        x_TN = x.reshape(-1, x.shape[-1])
        step = tile_tokens(len(x_TN), part, x.device.type)
        tiles = x_TN.split(step)
        if len(tiles) == 1:
            y_TN = part.value(x_TN)
            return in_shape_of(x, y_TN)
        y_TN = torch.empty(0)
        for place, x_tN in enumerate(tiles):
            y_tN = part.value(x_tN)
            if place == 0:
                y_TN = y_tN.new_empty(len(x_TN), y_tN.shape[1])
            y_TN[place * step : place * step + len(x_tN)] = y_tN
        return in_shape_of(x, y_TN)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        part: TokenWise = ctx.part
        num_parameters = len(part.parameters)
        saved = ctx.kept.saved()
        parameters, rest = saved[:num_parameters], list(saved[num_parameters:])
        state = rest.pop() if part.is_random else None
        grad_TM = grad.reshape(-1, grad.shape[-1])
        x_TN = ctx.kept.ticket.get(rest)
        del saved, rest
        needs_x = ctx.kept.needs_x
        grad_x_TN = torch.empty_like(x_TN) if needs_x else None
        totals: list[Tensor | None] = [None] * num_parameters
        step = tile_tokens(len(x_TN), part, x_TN.device.type)
        enabled, dtype = ctx.autocast
        for start in range(0, len(x_TN), step):
            tile = slice(start, start + step)
            x_tN = x_TN[tile].detach().requires_grad_(needs_x)
            with torch.enable_grad(), torch.autocast(x_tN.device.type, dtype, enabled), restored(state, x_tN.device):
                y_tM = part.replay(x_tN)
            ctx.holder.shelf.clear()  # or the last tile's leaves would live on beside the next one's
            sources = [x_tN, *parameters] if needs_x else [*parameters]
            grads = torch.autograd.grad(y_tM, sources, grad_TM[tile], allow_unused=True)
            del y_tM, x_tN, sources
            if grad_x_TN is not None and grads[0] is not None:
                grad_x_TN[tile] = grads[0]
            for place, one in enumerate(grads[len(grads) - num_parameters :]):
                if one is not None:
                    total = totals[place]
                    totals[place] = wide(one) if total is None else total.add_(one)
            del grads
        grads_of = [None if total is None else total.to(own.dtype) for total, own in zip(totals, parameters, strict=True)]
        grad_x = None if grad_x_TN is None else grad_x_TN.view(*grad.shape[:-1], x_TN.shape[1])
        return grad_x, None, None, None, *grads_of


def tiled_over_tokens(x: Tensor, part: TokenWise, holder: Holder) -> Tensor:
    """``part`` of ``x`` (any shape, N last). ``holder``: how ``x`` waits, unless an operator that made it holds it already."""
    if not (torch.is_grad_enabled() and (x.requires_grad or part.parameters)):
        return part.value(x)
    kept = Kept(x.requires_grad)
    held = holder.hold(x)
    kept.ticket = held.ticket
    state = (random_state(x.device),) if part.is_random else ()
    trained = part.parameters[0] if part.parameters else x
    x = Keep.apply(x, trained, kept, *part.parameters, *held.leaves, *state)
    y: Tensor = _Tiles.apply(x, part, holder, kept, *part.parameters)
    return y
