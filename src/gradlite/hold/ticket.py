"""What an operator gets for a tensor it hands in: a ticket, with which backward gets the tensor back."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Ticket:
    """How one held tensor is made again from its leaves. Shared by every operator that asked for the tensor.

    The tensor is made at the first :meth:`get` and let go at the last one, so that neighbours in backward (q, k and v; gate
    and up) share the work and nothing outlives its use. Holds no tensor in between: the leaves lie in autograd's saved
    tensors, where hooks (checkpointing, offloading) and frees reach them.
    """

    def __init__(self, rebuild: Callable[..., Tensor]) -> None:
        self._rebuild = rebuild
        self._num_pending = 0
        self._value: Tensor | None = None

    def issue(self) -> None:
        """Notes one operator that will come for the tensor."""
        self._num_pending += 1

    def get(self, leaves: Sequence[Tensor]) -> Tensor:
        """The tensor, in memory order as rows; reshape it as needed. Do not write to it."""
        value = self._rebuild(*leaves) if self._value is None else self._value
        self._num_pending -= 1
        # A second backward pass over a retained graph counts below zero, and shares nothing.
        self._value = value if self._num_pending > 0 else None
        return value


class Held(NamedTuple):
    """A ticket and the leaves that autograd must save for it."""

    ticket: Ticket
    leaves: tuple[Tensor, ...]
