"""Bases find the spaces they are meant to find; moments move with them."""

import pytest
import torch
from torch import Tensor

from gradlite.ops.factors import DenseFactors
from gradlite.subspace.basis import (
    activation_basis,
    gradient_basis,
    orthonormalize,
    pull_back,
    random_basis,
    refreshed_basis,
)
from gradlite.subspace.transport import transport_moments

M, N, R = 30, 24, 4


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(8)


def low_rank_factors() -> DenseFactors:
    g = generator()
    right = torch.randn(60, R, generator=g).double() @ torch.randn(R, N, generator=g).double()
    left = torch.randn(60, M, generator=g).double()
    return DenseFactors(left, right + 1e-4 * torch.randn(60, N, generator=g).double())


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_orthonormal_with_fixed_signs(dtype: torch.dtype, close: float) -> None:
    y = torch.randn(N, R, generator=generator()).to(dtype)
    q = orthonormalize(y)
    assert q.dtype == dtype
    torch.testing.assert_close((q.T @ q).double(), torch.eye(R).double(), rtol=0, atol=close)
    assert (torch.diagonal(q.T @ y) > 0).all()
    torch.testing.assert_close(orthonormalize(q), q, rtol=0, atol=close)


def test_random_basis_repeats_with_its_seed() -> None:
    first, second = (random_basis(N, R, generator(), torch.zeros((), dtype=torch.bfloat16)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == torch.bfloat16


def test_gradient_and_activation_bases_hold_what_dominates() -> None:
    factors = low_rank_factors()
    start = random_basis(N, R, generator(), factors.right_TN)
    gradient = factors.left_TM.T @ factors.right_TN
    for basis, matrix in (
        (gradient_basis(factors, start), gradient),
        (activation_basis(factors.right_TN, start), factors.right_TN),
    ):
        assert (matrix - matrix @ basis @ basis.T).norm() < 1e-3 * matrix.norm()
    assert (gradient - gradient @ start @ start.T).norm() > 0.5 * gradient.norm()


@pytest.mark.parametrize("size", [1e-4, 1.0, 50.0])
def test_a_first_basis_in_float16(size: float) -> None:
    """``GᵀGP`` has the gradient's square in it, which float16 does not hold."""
    torch.manual_seed(0)
    left_TM, right_TN = torch.randn(64, 1) @ torch.randn(1, 24), torch.randn(64, 1) @ torch.randn(1, 16)
    exact = left_TM.T @ right_TN
    factors = DenseFactors((left_TM * size / exact.abs().max()).half(), right_TN.half())
    start_NR = random_basis(16, 4, torch.Generator().manual_seed(0), factors.right_TN)
    basis_NR = gradient_basis(factors, start_NR)
    assert basis_NR.isfinite().all()
    assert (exact @ basis_NR.float()).norm() > 0.99 * exact.norm()


def test_a_sketch_that_is_not_finite_keeps_the_basis() -> None:
    basis_NR = random_basis(16, 4, torch.Generator().manual_seed(0), torch.zeros(1))
    kept_NR = refreshed_basis(torch.full((16, 4), float("inf")), basis_NR)
    torch.testing.assert_close(kept_NR, basis_NR, rtol=0, atol=1e-5)


def test_pull_back_is_the_transposed_gradient() -> None:
    factors, probe = low_rank_factors(), torch.randn(M, R, generator=generator()).double()
    torch.testing.assert_close(pull_back(factors, probe), (factors.left_TM.T @ factors.right_TN).T @ probe)


def test_refresh_follows_the_sketch_and_keeps_the_old_basis_where_it_is_empty() -> None:
    old = random_basis(N, R, generator(), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(refreshed_basis(torch.zeros(N, R).double(), old), old)
    sketch = torch.randn(N, R, generator=generator()).double()
    sketch[:, 2:] = 0
    new = refreshed_basis(sketch, old)
    torch.testing.assert_close(new.T @ new, torch.eye(R).double())
    assert (sketch - new @ (new.T @ sketch)).norm() < 1e-2 * sketch.norm()
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(refreshed_basis(scale * sketch, old), new)
    kept = old[:, 2:] - new @ (new.T @ old[:, 2:])
    assert kept.norm() < 0.5 * old[:, 2:].norm()


def moments(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mean, spread = torch.randn(M, R, generator=g).double(), torch.rand(M, R, generator=g).double()
    return 0.5 * mean, 0.3 * (mean**2 + spread)  # corrections 0.5 and 0.3: v̂ = m̂² + spread


def test_transport_along_the_identity_changes_nothing() -> None:
    m, v = moments(0)
    for moved, held in zip(transport_moments(m, v, torch.eye(R).double(), 0.5, 0.3), (m, v), strict=True):
        torch.testing.assert_close(moved, held)


def test_transport_rotates_means_and_keeps_second_moments_positive() -> None:
    m, v = moments(1)
    turn = torch.linalg.qr(torch.randn(R, R, generator=generator()).double())[0]
    moved_m, moved_v = transport_moments(m, v, turn, 0.5, 0.3)
    torch.testing.assert_close(moved_m, m @ turn)
    assert (moved_v / 0.3 >= (moved_m / 0.5) ** 2 - 1e-12).all()
    # A full rotation loses nothing: the sum of v̂ over a row is the rotation's invariant.
    torch.testing.assert_close(moved_v.sum(1), v.sum(1))
    m, v = torch.randn(M, R).double(), torch.zeros(M, R).double()  # v̂ < m̂², as codes may leave it
    assert (transport_moments(m, v, turn, 1.0, 1.0)[1] >= 0).all()


def test_transport_is_exact_for_gradients_that_never_change() -> None:
    gradient, turn = torch.randn(M, R).double(), torch.linalg.qr(torch.randn(R, R).double())[0]
    m, v = 0.5 * gradient, 0.3 * gradient**2
    moved_m, moved_v = transport_moments(m, v, turn, 0.5, 0.3)
    torch.testing.assert_close(moved_m, 0.5 * gradient @ turn)
    torch.testing.assert_close(moved_v, 0.3 * (gradient @ turn) ** 2)
