"""The residual's estimator: unbiased, of the variance it promises, and right at its edges."""

import pytest
import torch
from torch import Tensor

from gradlite.ops.factors import DenseFactors, GradientFactors, LookupFactors
from gradlite.subspace.basis import random_basis
from gradlite.subspace.collector import Collector, Window
from gradlite.subspace.residual import (
    ResidualSample,
    inclusion_probabilities,
    merge_samples,
    sample_residual,
    systematic_sample,
)

T, M, N, R = 30, 10, 12, 4


def gradient(kind: str = "dense") -> tuple[GradientFactors, Tensor, Tensor]:
    """Factors whose tokens differ in size by orders of magnitude, a basis, and the exact residual."""
    generator = torch.Generator().manual_seed(5)
    right = torch.randn(T, N, generator=generator, dtype=torch.float64)
    right *= torch.exp(1.5 * torch.randn(T, 1, generator=generator, dtype=torch.float64))
    basis = random_basis(N, R, generator, right)
    left = torch.randn(T, M, generator=generator, dtype=torch.float64)
    factors: GradientFactors = DenseFactors(left, right)
    if kind == "look-up":
        ids = torch.randint(0, M, (T,), generator=generator)
        factors, left = LookupFactors(ids, right, M), torch.nn.functional.one_hot(ids, M).double()
    exact = left.T @ (right - right @ basis @ basis.T)
    return factors, basis, exact


def draws(factors: GradientFactors, basis: Tensor, count: int, number: int, pieces: int = 1) -> Tensor:
    """``number`` estimates, stacked; in ``pieces`` the tokens come as micro-batches whose samples are merged."""
    generator = torch.Generator().manual_seed(11)
    parts = [factors]
    if pieces > 1:
        assert isinstance(factors, DenseFactors)
        left, right = factors.left_TM.chunk(pieces), factors.right_TN.chunk(pieces)
        parts = [DenseFactors(a, b) for a, b in zip(left, right, strict=True)]
    result = []
    for _ in range(number):
        merged: ResidualSample | None = None
        for part in parts:
            sample, _ = sample_residual(part, basis, part.right_TN @ basis, count, generator)
            merged = sample if merged is None else merge_samples(merged, sample, count, generator)
        assert merged is not None
        assert len(merged.left_KM) <= count
        result.append(merged.left_KM.T @ merged.right_KN)
    return torch.stack(result)


def z_scores(estimates: Tensor, exact: Tensor) -> Tensor:
    error = estimates.mean(0) - exact
    return (error / (estimates.std(0) / len(estimates) ** 0.5)).nan_to_num()  # rows of absent ids are zero, always


@pytest.mark.parametrize(("kind", "pieces"), [("dense", 1), ("look-up", 1), ("dense", 3)])
def test_mean_of_many_draws_is_the_residual(kind: str, pieces: int) -> None:
    factors, basis, exact = gradient(kind)
    number = 4000 if pieces == 1 else 800
    estimates = draws(factors, basis, count=5, number=number, pieces=pieces)
    z = z_scores(estimates, exact)
    # As a whole: the error's size is what independent draws leave, within 3 standard errors of its own.
    squared = (estimates.mean(0) - exact).square().sum()
    per_draw = (estimates - exact).square().sum((1, 2))
    assert squared <= per_draw.mean() / number * (1 + 3 * (2 / (M - 1)) ** 0.5)
    assert z.square().mean() < 1.6  # 120 correlated entries; 1 expected
    assert (z.abs() < 3).double().mean() > 0.97
    assert exact.norm() > 5 * squared.sqrt()  # and the error is small beside what is estimated


def test_a_wrong_weighting_would_be_noticed() -> None:
    factors, basis, exact = gradient()
    assert z_scores(1.1 * draws(factors, basis, count=5, number=1200), exact).square().mean() > 1.6


def even_gradient() -> tuple[DenseFactors, Tensor, Tensor]:
    """240 tokens of equal weight, so that none is taken outright."""
    factors, basis, _ = gradient()
    assert isinstance(factors, DenseFactors)
    outside = factors.right_TN - factors.right_TN @ basis @ basis.T
    signs = torch.randn(8 * T, 1, generator=torch.Generator().manual_seed(3)).sign()
    right = (factors.right_TN / outside.norm(dim=1, keepdim=True)).repeat(8, 1)
    left = (factors.left_TM / factors.left_TM.norm(dim=1, keepdim=True)).repeat(8, 1) * signs
    return DenseFactors(left, right), basis, left.T @ (right - right @ basis @ basis.T)


def test_variance_falls_as_one_over_k() -> None:
    factors, basis, exact = even_gradient()
    few, many = ((draws(factors, basis, count=k, number=1000) - exact).square().sum((1, 2)).mean().item() for k in (4, 16))
    assert 3.2 < few / many < 5.2  # 4, and a little more: the population is finite


@pytest.mark.parametrize("count", [1, 2, 5, 17, 29])
def test_inclusion_probabilities_sum_to_the_count_and_are_met(count: int) -> None:
    weights = torch.exp(2 * torch.randn(T, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    probability = inclusion_probabilities(weights, count)
    assert probability.sum().item() == pytest.approx(count, abs=1e-9)
    assert probability.max() <= 1
    below = probability < 1
    ratio = probability[below] / weights[below]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert (weights[~below].min() >= weights[below].max()) if (~below).any() else True
    hits = torch.zeros(T, dtype=torch.float64)
    steps = 20_000  # the uniform number on a grid: frequencies are exact to one in 20,000
    for number in torch.arange(0, steps, 40):
        index, inverse = systematic_sample(probability, count, (number + 0.5) / steps)
        assert len(set(index.tolist())) == count
        torch.testing.assert_close(inverse, 1 / probability[index])
        hits[index] += 40 / steps
    torch.testing.assert_close(hits, probability, rtol=0, atol=0.005)


@pytest.mark.parametrize(
    ("weights", "count", "wanted"),
    [
        ([1.0, 1.0, 1.0, 1.0], 2, [0.5] * 4),
        ([1e9, 1.0, 1.0, 2.0], 2, [1.0, 0.25, 0.25, 0.5]),  # one giant
        ([3.0, 0.0, 2.0, 0.0], 3, [1.0, 0.0, 1.0, 0.0]),  # fewer positive weights than places
        ([0.0, 0.0, 0.0], 2, [0.0] * 3),
        ([5.0, 4.0], 7, [1.0, 1.0]),  # more places than tokens
        ([2.0], 1, [1.0]),
    ],
)
def test_probabilities_at_the_edges(weights: list[float], count: int, wanted: list[float]) -> None:
    for dtype in (torch.float32, torch.float64):
        probability = inclusion_probabilities(torch.tensor(weights, dtype=dtype), count)
        torch.testing.assert_close(probability, torch.tensor(wanted, dtype=dtype))
        index, inverse = systematic_sample(probability, count, torch.tensor(0.7))
        taken = {int(i) for i, w in zip(index, inverse, strict=True) if w > 0}
        assert taken >= {place for place, p in enumerate(wanted) if p == 1.0}
        assert torch.isfinite(inverse).all()
        assert not {place for place, p in enumerate(wanted) if p == 0.0} & taken


@pytest.mark.parametrize("count", [T, T + 1, 500])
def test_enough_places_give_the_residual_itself(count: int) -> None:
    factors, basis, exact = gradient()
    torch.testing.assert_close(draws(factors, basis, count, 1)[0], exact, rtol=0, atol=1e-10)


def test_no_gradient_gives_no_residual() -> None:
    factors = DenseFactors(torch.zeros(T, M), torch.randn(T, N))
    basis = random_basis(N, R, torch.Generator().manual_seed(0), torch.zeros(()))
    estimate = draws(factors, basis, 3, 1)[0]
    assert torch.equal(estimate, torch.zeros(M, N))


def test_one_giant_token_is_always_taken() -> None:
    factors, basis, _ = gradient()
    assert isinstance(factors, DenseFactors)
    factors.left_TM[7] *= 1e8
    outside = factors.right_TN[7] - factors.right_TN[7] @ basis @ basis.T
    for estimate in draws(factors, basis, 2, 20):
        giant = torch.outer(factors.left_TM[7], outside)
        assert (estimate - giant).norm() < 1e-4 * giant.norm()


def test_norm_estimate_needs_no_second_pass() -> None:
    factors, basis, exact = gradient()
    sample, diagonal = sample_residual(factors, basis, factors.right_TN @ basis, T, torch.Generator())
    torch.testing.assert_close(diagonal + sample.norms_squared()[1], exact.square().sum())  # every token taken: exact
    generator = torch.Generator().manual_seed(1)
    estimates = []
    for _ in range(500):
        sample, diagonal = sample_residual(factors, basis, factors.right_TN @ basis, 9, generator)
        estimates.append(diagonal + sample.norms_squared()[1] * 9 / 8)
    squared = exact.square().sum()
    assert abs(torch.stack(estimates).mean() - squared) < 0.05 * squared
    even, basis, exact = even_gradient()  # where the sample's own norm says nothing
    assert draws(even, basis, 6, 200).square().sum((1, 2)).mean() > 10 * exact.square().sum()


def test_the_shrunk_sample_is_nearer_to_the_residual_and_exact_where_every_token_is_taken() -> None:
    factors, basis, exact = gradient()
    window = Window("gradient", True, 3, torch.zeros((), dtype=torch.float64))
    for count in (3, T):
        collector = Collector(window, M, N, R, count, torch.zeros((), dtype=torch.float64))
        collector.basis.matrix_NR = basis
        plain, shrunk = torch.zeros(300), torch.zeros(300)
        for draw in range(300):
            window.clear()
            collector(factors)
            assert collector.sample is not None
            estimate, share = collector.sample.left_KM.T @ collector.sample.right_KN, collector.signal_share()
            assert 0.0 <= share <= 1.0
            plain[draw] = (estimate - exact).square().sum()
            shrunk[draw] = (share * estimate - exact).square().sum()
        if count == T:
            assert shrunk.max() < 1e-20 * exact.square().sum()
        else:
            assert shrunk.mean() < 0.8 * plain.mean()
