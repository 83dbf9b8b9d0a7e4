"""The first of the two autograd nodes that make a layer: it saves what waits, and the second multiplies.

A replay of a block (checkpointing) stops as soon as everything is saved. So a replay never pays for the product of the layer
that it ends with.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradlite.hold.ticket import Ticket


class Kept:
    """Leads from the second node to what the first one saved. ``ticket``: for the layer's input."""

    def __init__(self, needs_x: bool) -> None:
        self.needs_x = needs_x  # the first node's result always asks for a gradient
        self.ticket: Ticket | None = None
        self.node: Any = None

    def saved(self) -> tuple[Tensor, ...]:
        """What :class:`Keep` saved; to be asked for once in a backward pass."""
        saved: tuple[Tensor, ...] = self.node.saved_tensors
        return saved


class Keep(torch.autograd.Function):
    """Passes ``x`` on and saves ``tensors`` (weights by reference; leaves that other operators hold cost nothing).

    ``trained``: any parameter of the layer that asks for a gradient, so that there is a node even where ``x`` asks for none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, trained: Tensor, kept: Kept, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # no gradient comes for an input that needs none
        ctx.num_tensors = len(tensors)
        kept.node = ctx
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return grad, None, None, *(None for _ in range(ctx.num_tensors))
