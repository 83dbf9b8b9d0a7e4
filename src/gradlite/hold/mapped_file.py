"""Leaves that wait in memory-mapped files: pages that the system may write out and drop, and reads again when backward asks.

One file a leaf, unlinked as soon as it is mapped: it is gone when the leaf is let go, however the process ends. In memory that
is short, pages leave it; where there is enough, they stay in the page cache and cost a copy (MeBP, see arXiv 2602.13069).
"""

import os
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from gradlite.errors import GradLiteError


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
            _reserve(file.fileno(), leaf.nbytes)
            flat = torch.from_file(file.name, shared=True, size=leaf.numel(), dtype=leaf.dtype)
        return flat.view(leaf.shape).copy_(leaf)


def _reserve(file: int, num_bytes: int) -> None:
    """Writing to a mapped page for which the disk has no room would end the process without a word."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        raise GradLiteError(
            f"{num_bytes / 1e6:.1f} MB cannot be had in {tempfile.gettempdir()}, where block inputs wait in mapped files "
            f"({error.strerror}); make room there, or name another directory in the environment variable TMPDIR."
        ) from None
