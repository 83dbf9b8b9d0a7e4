"""Plain stochastic gradient descent through GradLite's own subspace code: the algorithm of the convergence theorem.

Shape suffixes: B rows of a batch, M outputs, N inputs, R rank.

The theorem is about SGD with error feedback; the package's optimizer is AdamW with it. What differs is one line, the step's
direction. Everything else is the package's: :class:`~gradlite.subspace.collector.Collector` (first basis, coordinates, residual
sample, sketch), :func:`~gradlite.subspace.basis.refreshed_basis` and the error memories. For SGD ``φ = 1`` (docs/method.md,
section 4), so this is textbook error feedback. A test holds it to ``gradlite.GradLite`` itself, whose Adam turns into SGD when
ε is huge; that optimizer is not used here since its memory's rank and its sample's size are fixed, and both are varied.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from gradlite.ops.factors import DenseFactors
from gradlite.subspace.basis import refreshed_basis
from gradlite.subspace.collector import BasisKind, Collector, Window
from gradlite.subspace.feedback import MEMORY_FRACTION, ErrorMemory, FactoredMemory, FullMemory, memory_rank

REFRESH_INTERVAL = 5
"""Steps between two refreshes of the basis: the package's default."""


@dataclass(frozen=True)
class Variant:
    """One algorithm. ``basis=None`` is SGD with the exact gradient; ``memory=None`` drops what the basis misses.

    ``residual``: ``exact`` remembers all of it, ``sampled`` the unbiased sample of R/4 rows that the theorem speaks of,
    ``shrunk`` the same sample times its share of signal κ, as in the package's optimizer. ``memory_share``: Q/R of the factored
    memory.
    """

    name: str
    basis: BasisKind | None = "gradient"
    memory: Literal["full", "factored"] | None = None
    residual: Literal["exact", "sampled", "shrunk"] = "exact"
    memory_share: float = 1.0 / MEMORY_FRACTION

    def describe(self) -> dict[str, object]:
        """For a record."""
        return asdict(self)


class SubspaceSGD:
    """SGD on one M×N weight (float64), which starts at zero.

    The residual's exact sample needs every row of the batch, so ``batch_size`` must be the rows that :meth:`step` gets.
    """

    def __init__(self, rows: int, width: int, rank: int, variant: Variant, *, lr: float, batch_size: int, seed: int) -> None:
        self.weight_MN = torch.zeros(rows, width, dtype=torch.float64)
        self._variant = variant
        self._lr = lr
        self._steps = 0
        if variant.basis is None:
            return
        count = batch_size if variant.residual == "exact" else memory_rank(rank)
        self._window = Window(variant.basis, variant.memory is not None, seed, self.weight_MN)
        self._collector = Collector(self._window, rows, width, rank, count, self.weight_MN)
        self._memory: ErrorMemory = FactoredMemory() if variant.memory == "factored" else FullMemory()
        # The package ties the factored memory's rank to the basis' by MEMORY_FRACTION; here it is asked for as it is.
        memory_of = max(1, round(rank * variant.memory_share)) * MEMORY_FRACTION
        self._state = self._memory.init(rows, width, memory_of, self.weight_MN)

    def step(self, left_BM: Tensor, right_BN: Tensor) -> None:
        """One update with the gradient ``leftᵀ right``."""
        self._steps += 1
        factors = DenseFactors(left_BM, right_BN)
        if self._variant.basis is None:
            self.weight_MN.addmm_(left_BM.T, right_BN, alpha=-self._lr)
            return
        collector, basis = self._collector, self._collector.basis
        gradient_MR = collector(factors)
        assert basis.matrix_NR is not None
        self.weight_MN.addmm_(gradient_MR, basis.matrix_NR.T, alpha=-self._lr)
        if self._variant.memory is not None and collector.sample is not None:
            scale = collector.signal_share() if self._variant.residual == "shrunk" else gradient_MR.new_ones(())
            self._memory.add(self._state, collector.sample, scale)
        if basis.due and basis.sketch_NR is not None:
            gradient_MR = self._move_basis(basis.matrix_NR, basis.sketch_NR, gradient_MR)
        self._window.clear()
        basis.due = self._variant.basis != "random" and basis.rank < basis.width and self._steps % REFRESH_INTERVAL == 0
        collector.probe_MR = gradient_MR if basis.due else None

    def _move_basis(self, basis_NR: Tensor, sketch_NR: Tensor, gradient_MR: Tensor) -> Tensor:
        """Refreshes the basis, releases what the memory holds inside the new one; returns the gradient in its coordinates."""
        new_NR = refreshed_basis(sketch_NR, basis_NR)
        if self._variant.memory is not None:
            released_MR = self._memory.release(self._state, new_NR)
            self.weight_MN.addmm_(released_MR, new_NR.T, alpha=-self._lr)
        self._collector.basis.matrix_NR = new_NR
        return gradient_MR @ (basis_NR.T @ new_NR)
