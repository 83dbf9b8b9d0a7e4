"""Leaves that wait in memory-mapped files: pages that the system may write out and drop, and reads again when backward asks.

One file a leaf, unlinked as soon as it is mapped: it is gone when the leaf is let go, however the process ends. In memory that
is short, pages leave it; where there is enough, they stay in the page cache and cost a copy (MeBP, see arXiv 2602.13069).
"""

import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor


class MappedFile:
    """A place (:class:`gradlite.hold.place.Place`) in the system's directory of temporary files; for leaves of one device."""

    def __init__(self) -> None:
        self._device = torch.device("cpu")

    def put(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        self._device = leaves[0].device
        return tuple(self._mapped(leaf) for leaf in leaves)

    def fetch(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(leaf.to(self._device) for leaf in leaves)

    def _mapped(self, leaf: Tensor) -> Tensor:
        if not leaf.numel():
            return leaf
        with tempfile.NamedTemporaryFile(prefix="gradlite-") as file:
            flat = torch.from_file(file.name, shared=True, size=leaf.numel(), dtype=leaf.dtype)
        return flat.view(leaf.shape).copy_(leaf)
