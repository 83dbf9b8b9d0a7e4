"""The residual ``R = G(I − PPᵀ)``, estimated without bias from a few tokens.

Shape suffixes: T tokens, K sampled tokens, M output width, N input width, R rank.

``R̂ = Σ_{t in sample} (1/π_t) left_t ⊗ right_t(I − PPᵀ)``, with inclusion probabilities ``π_t = min(1, c·w_t)`` that sum to
K and ``w_t = ‖left_t‖·‖right_t(I − PPᵀ)‖``: the largest terms are taken outright (WTA-CRS, arXiv 2305.15265), the others by
systematic sampling, which takes exactly K terms, none twice. ``E[R̂] = R`` because every token is in the sample with
probability exactly ``π_t``. Source: docs/method.md, section 2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gradlite.ops.factors import GradientFactors, row_norms


class ResidualSample(NamedTuple):
    """``R̂ = left_KMᵀ right_KN``. Both factors carry the square root of ``1/π``, so that neither overflows alone."""

    left_KM: Tensor
    right_KN: Tensor

    def norms_squared(self) -> tuple[Tensor, Tensor]:
        """``‖R̂‖²`` (Frobenius) and its off-diagonal part ``Σ_{s≠t} ⟨term_s, term_t⟩``: scalars in float32 or wider."""
        gram_KK = self._gram(torch.promote_types(self.left_KM.dtype, torch.float32))
        total = gram_KK.sum()
        return total, total - gram_KK.diagonal().sum()

    def _gram(self, compute: torch.dtype) -> Tensor:
        left_KM, right_KN = self.left_KM.to(compute), self.right_KN.to(compute)
        return (left_KM @ left_KM.T) * (right_KN @ right_KN.T)


def inclusion_probabilities(weights_T: Tensor, count: int) -> Tensor:
    """``π_t = min(1, c·w_t)`` with ``Σπ = min(count, number of positive weights)``. ``weights_T ≥ 0``, any float dtype.

    Found in closed form from the sorted weights: the j largest get probability one, with the smallest j for which no other
    probability exceeds one. No host synchronisation.
    """
    sorted_T, order_T = weights_T.sort(descending=True)
    tail_T = sorted_T.flip(0).cumsum(0).flip(0)  # tail_j = Σ_{i ≥ j} w_i
    position_T = torch.arange(len(sorted_T), device=weights_T.device)
    left_T = (count - position_T).clamp_min(0).to(weights_T.dtype)
    fits_T = left_T * sorted_T <= tail_T
    taken = torch.where(fits_T.any(), fits_T.to(torch.uint8).argmax(), len(sorted_T))
    last = taken.clamp_max(len(sorted_T) - 1)
    scale = left_T[last] / tail_T[last].clamp_min(torch.finfo(weights_T.dtype).tiny)
    probability_T = torch.where(position_T < taken, 1.0, (scale * sorted_T).clamp_max(1.0))
    probability_T = torch.where(sorted_T > 0, probability_T, 0.0).to(weights_T.dtype)
    return torch.empty_like(weights_T).scatter_(0, order_T, probability_T)


def systematic_sample(probability_T: Tensor, count: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """``count`` distinct indices, index t with probability exactly ``π_t``, and ``1/π`` of each.

    Args:
        probability_T: inclusion probabilities, each ≤ 1, that sum to at most ``count``.
        uniform: one number in [0, 1).

    Returns:
        indices (K, int64) and weights (K): weight 0 marks a place that stayed empty since the probabilities sum to less.
    """
    sorted_T, order_T = probability_T.double().sort(descending=True)  # ones first: their sums are exact, each is hit once
    upper_T = sorted_T.cumsum(0)
    points_K = torch.arange(count, device=probability_T.device, dtype=torch.float64) + uniform.double()
    place_K = torch.searchsorted(upper_T, points_K, right=True)
    inside_K = place_K < len(sorted_T)
    place_K = place_K.clamp_max(len(sorted_T) - 1)
    weight_K = torch.where(inside_K & (sorted_T[place_K] > 0), 1.0 / sorted_T[place_K], 0.0)
    return order_T[place_K], weight_K.to(probability_T.dtype)


def _choose(weights_T: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    uniform = torch.rand((), generator=generator, device=generator.device).to(weights_T.device)
    return systematic_sample(inclusion_probabilities(weights_T, count), count, uniform)


def sample_residual(
    factors: GradientFactors, basis_NR: Tensor, inside_TR: Tensor, count: int, generator: torch.Generator
) -> tuple[ResidualSample, Tensor]:
    """An unbiased sample of ``G(I − PPᵀ)`` of rank at most ``count``, and ``Σ_t w_t²`` over all tokens.

    Args:
        factors: the gradient. basis_NR: ``P``. inside_TR: ``right P``, which the caller has already computed.
        count: K; with ``count ≥ T`` the sample is the residual itself.
        generator: consumes one uniform number, unless every token is taken.
    """
    num_tokens = factors.right_TN.shape[0]
    if count >= num_tokens:
        outside_TN = factors.right_TN - inside_TR @ basis_NR.T
        everything_T = torch.arange(num_tokens, device=outside_TN.device)
        diagonal = (factors.left_norms() * row_norms(outside_TN)).square().sum()
        return ResidualSample(factors.left_rows(everything_T), outside_TN), diagonal
    outside_squared_T = row_norms(factors.right_TN).square() - row_norms(inside_TR).square()
    weights_T = factors.left_norms() * outside_squared_T.clamp_min(0.0).sqrt()
    diagonal = weights_T.square().sum()
    # A token whose residual vanishes in the difference above may still carry a little: a floor keeps its π positive.
    weights_T = weights_T + 1e-6 * weights_T.mean()
    index_K, inverse_K = _choose(weights_T, count, generator)
    outside_KN = factors.right_TN[index_K] - inside_TR[index_K] @ basis_NR.T
    root_K1 = inverse_K.sqrt()[:, None].to(outside_KN.dtype)
    return ResidualSample(factors.left_rows(index_K) * root_K1, outside_KN * root_K1), diagonal


def merge_samples(a: ResidualSample, b: ResidualSample, count: int, generator: torch.Generator) -> ResidualSample:
    """The sum of two samples, thinned without bias to at most ``count`` rank-one terms."""
    left, right = torch.cat((a.left_KM, b.left_KM)), torch.cat((a.right_KN, b.right_KN))
    if len(left) <= count:
        return ResidualSample(left, right)
    weights = row_norms(left) * row_norms(right)
    index_K, inverse_K = _choose(weights, count, generator)
    root_K1 = inverse_K.sqrt()[:, None].to(left.dtype)
    return ResidualSample(left[index_K] * root_K1, right[index_K] * root_K1)
