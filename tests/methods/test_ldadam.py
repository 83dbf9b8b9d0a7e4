"""LDAdam against its paper's equations, in float64, for wide and tall weights."""

import pytest
import torch
from torch import Tensor, nn

from gradlite.methods.ldadam import LDAdam, LDAdamW

# The second moment forgets faster than the first, and gradients shrink, so that v̂ − m̂² becomes negative.
BETA1, BETA2, EPS, RHO, LR, DECAY = 0.95, 0.5, 1e-3, 0.7, 0.1, 0.01


class Reference:
    """The equations for one weight with at most as many rows as columns."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        self.weight, self.rank, self.steps = weight, rank, 0
        self.error = torch.zeros_like(weight)

    def step(self, gradient: Tensor) -> None:
        a, t = gradient + self.error, self.steps
        if t == 0:
            self.basis = torch.linalg.svd(a)[0][:, : self.rank]
            old = torch.zeros_like(self.basis)
            self.m = self.v = torch.zeros(self.rank, a.shape[1], dtype=a.dtype)
            m_hat = v_hat = self.m
        else:
            old = self.basis
            m_hat, v_hat = self.m / (1 - BETA1**t), self.v / (1 - BETA2**t)
            b = RHO * old @ m_hat + (1 - RHO) * a
            self.basis = torch.linalg.qr(b @ b.T @ old)[0]
        q = self.basis.T @ old
        compressed = self.basis.T @ a
        moved_m = q @ self.m
        moved_v = (1 - BETA2**t) * ((q * q) @ (v_hat - m_hat**2) + (q @ m_hat) ** 2).abs()
        self.error = a - self.basis @ compressed + BETA1 / (1 - BETA1) * (old @ self.m - self.basis @ moved_m)
        self.m = BETA1 * moved_m + (1 - BETA1) * compressed
        self.v = BETA2 * moved_v + (1 - BETA2) * compressed**2
        self.steps += 1
        t = self.steps
        direction = (self.m / (1 - BETA1**t)) / ((self.v / (1 - BETA2**t)).sqrt() + EPS)
        self.weight = (1 - LR * DECAY) * self.weight - LR * self.basis @ direction


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)])
@pytest.mark.parametrize("rank", [2, 6])
def test_ldadam_follows_the_equations(shape: tuple[int, int], rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", lambda self: self)  # decompositions in float64, as the reference's
    torch.manual_seed(0)
    tall = shape[0] > shape[1]
    weight = nn.Parameter(torch.randn(*shape, dtype=torch.float64))
    model = nn.Module()
    model.register_parameter("weight", weight)
    start = weight.detach().clone()
    reference = Reference(start.T if tall else start, rank)
    optimizer = LDAdamW([{"params": [weight], "rank": rank, "rho": RHO}], LR, (BETA1, BETA2), EPS, DECAY)
    method = LDAdam("ldadam", model, optimizer)
    for number in range(8):
        gradient = torch.randn(*shape, dtype=torch.float64) * (1.0 if number < 3 else 0.01)
        method.backward((weight * gradient).sum())
        method.step()
        method.zero_grad()
        reference.step(gradient.T if tall else gradient)
        expected = reference.weight.T if tall else reference.weight
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-9)
        error = reference.error.T if tall else reference.error
        torch.testing.assert_close(optimizer.state[weight]["error"], error, rtol=1e-9, atol=1e-9)
