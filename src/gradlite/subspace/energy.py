"""How much of a gradient's energy the basis holds: ``‖C‖² / (‖C‖² + ‖R‖²)``, with ``‖R‖²`` estimated by a few random probes.

Shape suffixes: T tokens, M output width, N input width, R rank, K probes.

``C = G P`` is at hand in every step, the residual ``R = G(I − PPᵀ)`` never is. But ``R z = leftᵀ (right (I − PPᵀ)z)`` takes two
thin products, and for standard normal ``z`` ``E‖R z‖² = ‖R‖²`` (Frobenius). The mean over K probes has the variance
``(2/K) Σσ⁴``, with ``σ`` the singular values of ``R``: at most ``2/K`` of ``‖R‖⁴`` (one single direction), and far less where
the residual is spread over many. ``R z`` is linear in the gradient, so the ``R z`` of several backward passes, of tiles, and
of both uses of a tied table are simply added up, as long as they share the probes.
"""

import torch
from torch import Tensor

from gradlite.ops.factors import GradientFactors

NUM_PROBES = 8


def outside_probes(basis_NR: Tensor, seed: int, count: int = NUM_PROBES) -> Tensor:
    """``(I − PPᵀ)Z`` (N×K) for standard normal ``Z`` from a generator of its own, made of ``seed``; in the basis' dtype."""
    generator = torch.Generator(device=basis_NR.device)
    generator.manual_seed(seed % 2**63)
    compute = torch.promote_types(basis_NR.dtype, torch.float32)
    z_NK = torch.randn(basis_NR.shape[0], count, generator=generator, dtype=compute, device=basis_NR.device)
    exact_NR = basis_NR.to(compute)
    return (z_NK - exact_NR @ (exact_NR.T @ z_NK)).to(basis_NR.dtype)


def probed(factors: GradientFactors, gradient_MR: Tensor, outside_NK: Tensor) -> Tensor:
    """``R z`` of every probe from :func:`outside_probes`, and beside them the first column of ``C``: M×(K+1).

    Costs 2·T·K·(M+N) multiplications. The column tells :func:`share_inside` by how much ``C`` was scaled since.
    """
    products_MK = factors.left_t_matmul(factors.right_TN @ outside_NK.to(factors.right_TN.dtype))
    return torch.cat((products_MK.to(gradient_MR.dtype), gradient_MR[:, :1]), 1)


def share_inside(gradient_MR: Tensor, probed_ML: Tensor) -> Tensor:
    """``‖C‖² / (‖C‖² + mean‖R z‖²)``: a scalar in float32 or wider, in [0, 1]; NaN where ``C``'s first column is zero.

    Args:
        gradient_MR: ``C.grad`` of the whole window, which clipping or loss scaling may have multiplied by a number.
        probed_ML: the sum of :func:`probed` over the window, L = K + 1, not multiplied by anything.

    Its standard deviation is about ``s(1 − s) √(2 Σσ⁴/K) / ‖R‖²`` at the share ``s``: at most 0.125 with 8 probes.
    """
    compute = torch.promote_types(gradient_MR.dtype, torch.float32)
    inside = torch.linalg.vector_norm(gradient_MR, dtype=compute)
    products_MK, column_M = probed_ML[:, :-1], probed_ML[:, -1]
    scale = torch.linalg.vector_norm(gradient_MR[:, 0], dtype=compute) / torch.linalg.vector_norm(column_M, dtype=compute)
    outside = scale * torch.linalg.vector_norm(products_MK, dtype=compute) / products_MK.shape[1] ** 0.5
    return inside.square() / (inside.square() + outside.square())
