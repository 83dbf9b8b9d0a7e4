"""Where leaves wait: beside the model, or elsewhere (:mod:`gradlite.hold.host`)."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Place(Protocol):
    """Takes leaves in the forward pass and gives them back in backward. Autograd saves what :meth:`put` returns."""

    def put(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The leaves as they wait."""

    def fetch(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The leaves of :meth:`put` for computing with; other tensors among them come back as they are."""


class Here:
    """Leaves wait where they are."""

    def put(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(leaves)

    def fetch(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(leaves)


HERE = Here()
