"""The reference twin: GradLite as docs/method.md states it, in slow and readable float64. The oracle of the fast one.

It gets the exact full gradient ``G`` of every weight from ordinary autograd on an ordinary model. There are no factors,
no samples (the residual is exact), no codes, no rounding, and the error memory is a full matrix; those have tests of
their own.

Shape suffixes: M output width, N input width, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gradlite.optim.member_step import PHI_LIMIT
from gradlite.subspace.basis import INERTIA


@dataclass
class ReferenceAdam:
    """Plain AdamW's direction ``m̂ / (√v̂ + ε)``, with its moments; the counter starts at the first gradient."""

    betas: tuple[float, float]
    eps: float
    m: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    v: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    t: int = 0

    def corrections(self) -> tuple[float, float]:
        """``1 − β₁ᵗ`` and ``1 − β₂ᵗ``."""
        return 1 - self.betas[0] ** self.t, 1 - self.betas[1] ** self.t

    def direction(self, grad: Tensor) -> Tensor:
        """Moves the moments, returns the direction."""
        self.t += 1
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * grad
        self.v = self.betas[1] * self.v + (1 - self.betas[1]) * grad**2
        c1, c2 = self.corrections()
        return (self.m / c1) / ((self.v / c2).sqrt() + self.eps)

    def transport(self, q_RR: Tensor) -> None:
        """Section 4: the mean part rotates, the variance part rotates with squared cosines."""
        c1, c2 = self.corrections()
        mean, variance = self.m / c1, self.v / c2 - (self.m / c1) ** 2
        self.m = self.m @ q_RR
        self.v = c2 * ((variance @ q_RR**2).abs() + (mean @ q_RR) ** 2)


@dataclass
class ReferenceBasis:
    """A basis ``P`` (N×R) and the names of the weights that share it."""

    matrix_NR: Tensor
    members: Sequence[str]


class ReferenceGradLite:
    """``weights``: float64, by name, changed in place. ``bases``: the first bases, in the order of their refreshes.

    Weights of no basis are trained by plain AdamW; vectors among them are not decayed.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        bases: Sequence[ReferenceBasis],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        refresh_interval: int = 5,
        feedback: Literal["feedback", "same_step", "off"] = "feedback",
    ) -> None:
        self.weights, self.bases, self.feedback = weights, bases, feedback
        self.lr, self.weight_decay, self.interval = lr, weight_decay, refresh_interval
        self.adam = {name: ReferenceAdam(betas, eps) for name in weights}
        projected = [name for basis in bases for name in basis.members]
        self.error_MN = {name: torch.zeros_like(weights[name]) for name in projected}
        self.plain = [name for name in weights if name not in projected]
        self.num_steps = 0

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """One update of all weights from their exact gradients."""
        for name in self.plain:
            decay = self.weight_decay if self.weights[name].dim() > 1 else 0.0
            direction = self.adam[name].direction(gradients[name])
            self.weights[name].mul_(1 - self.lr * decay).sub_(self.lr * direction)
        for index, basis in enumerate(self.bases):
            due = self.num_steps > 0 and (self.num_steps + index) % self.interval == 0
            self._basis_step(basis, gradients, due)
        self.num_steps += 1

    def _basis_step(self, basis: ReferenceBasis, gradients: Mapping[str, Tensor], due: bool) -> None:
        P = basis.matrix_NR
        width, rank = P.shape
        update_MN: dict[str, Tensor] = {}
        Y = torch.zeros_like(P)
        for name in basis.members:
            G, probe = gradients[name], self.adam[name].m  # Ψ: the first moment before this step
            C, R = G @ P, G - (G @ P) @ P.T
            direction = self.adam[name].direction(C)
            usual = (self.adam[name].v / self.adam[name].corrections()[1]).mean().sqrt()
            phi = torch.minimum(direction.norm() / C.norm(), PHI_LIMIT / usual)
            update_MN[name] = direction @ P.T
            if self.feedback == "same_step":
                update_MN[name] = update_MN[name] + phi * R
            if self.feedback == "feedback":
                self.error_MN[name] += phi * R
            if due:
                Y = Y + G.T @ probe
        if due and rank < width:
            basis.matrix_NR = new = orth(Y / Y.norm() + INERTIA * P / P.norm())
            for name in basis.members:
                self.adam[name].transport(P.T @ new)
                released_MN = (self.error_MN[name] @ new) @ new.T
                self.error_MN[name] -= released_MN
                update_MN[name] = update_MN[name] + released_MN
        for name in basis.members:
            decay = 1 - self.lr * self.weight_decay
            self.weights[name].mul_(decay).sub_(self.lr * (width / rank) ** 0.25 * update_MN[name])


def orth(y_NR: Tensor) -> Tensor:
    """Gram-Schmidt's result: orthonormal columns, ``R`` of the QR factorisation with a positive diagonal."""
    q_NR, r_RR = torch.linalg.qr(y_NR)
    return q_NR * torch.diagonal(r_RR).sign()
