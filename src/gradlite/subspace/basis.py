"""Orthonormal bases of the input space: the first one, and what a refresh moves towards.

Shape suffixes: T tokens, M output width, N input width, R rank.

A basis ``P`` (N×R) is shared by all layers that read the same tensor. Source: docs/method.md, sections 1 and 5.
"""

import torch
from torch import Tensor

from gradlite.ops.factors import GradientFactors


def orthonormalize(y_NR: Tensor) -> Tensor:
    """Orthonormal columns spanning those of ``y``, by QR in float32 (float64 for float64), signs fixed by ``diag(R) ≥ 0``.

    The sign convention makes the result a continuous function of ``y``: QR's own signs may flip from one refresh to the next.
    """
    compute = torch.promote_types(y_NR.dtype, torch.float32)
    q_NR, r_RR = torch.linalg.qr(y_NR.to(compute))
    signs_R = torch.where(torch.diagonal(r_RR) < 0, -1.0, 1.0).to(compute)
    return (q_NR * signs_R).to(y_NR.dtype)


def random_basis(width: int, rank: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """A uniformly random N×R basis in the dtype and on the device of ``like``."""
    compute = torch.promote_types(like.dtype, torch.float32)
    noise_NR = torch.randn(width, rank, generator=generator, dtype=compute, device=generator.device)
    return orthonormalize(noise_NR).to(device=like.device, dtype=like.dtype)


def gradient_basis(factors: GradientFactors, start_NR: Tensor, iterations: int = 2) -> Tensor:
    """The leading right singular space of the gradient in ``factors``, by block power iteration from ``start``.

    ``P ← orth(Gᵀ(G P))`` costs 2·T·R·(M+N) multiplications an iteration and never forms ``G``.
    """
    basis_NR = start_NR
    for _ in range(iterations):
        coordinates_MR = factors.left_t_matmul(factors.right_TN @ basis_NR)
        # GᵀGP has the gradient's square in it, which would leave float16.
        coordinates_MR = torch.ldexp(coordinates_MR, -exponent_of(coordinates_MR))
        pulled_NR = pull_back(factors, coordinates_MR)
        # A gradient of zero (the layer above starts at zero, say) names no direction: the start is kept.
        basis_NR = torch.where((pulled_NR != 0).any(), orthonormalize(pulled_NR), basis_NR)
    return basis_NR


def exponent_of(*tensors: Tensor) -> Tensor:
    """The power of two, an int32 scalar, that the largest element has: dividing by it rounds nothing."""
    largest = torch.stack([tensor.abs().amax().float() for tensor in tensors]).amax()
    return torch.frexp(torch.where(largest.isfinite(), largest, 1.0)).exponent


def activation_basis(rows_TN: Tensor, start_NR: Tensor, iterations: int = 2) -> Tensor:
    """The leading principal space of the rows (not centred), by block power iteration from ``start``."""
    basis_NR = start_NR
    for _ in range(iterations):
        basis_NR = orthonormalize(rows_TN.T @ (rows_TN @ basis_NR))
    return basis_NR


def pull_back(factors: GradientFactors, probe_MR: Tensor) -> Tensor:
    """``Gᵀ probe`` (N×R) without forming ``G``: one half of a power iteration, linear in the gradient."""
    return factors.right_TN.T @ factors.left_matmul(probe_MR)


INERTIA = 1e-3
"""Weight of the old basis in a refresh: it decides only directions that the sketch leaves (nearly) empty, as when a batch
has fewer tokens than the rank; QR would fill those with arbitrary vectors."""


def refreshed_basis(sketch_NR: Tensor, basis_NR: Tensor) -> Tensor:
    """The basis after a refresh: ``orth(Y/‖Y‖ + INERTIA·P/‖P‖)``; the old one where the sketch is zero or not finite."""
    compute = torch.promote_types(basis_NR.dtype, torch.float32)
    sketch_NR = sketch_NR.to(compute)
    norm = torch.linalg.vector_norm(sketch_NR).clamp_min(torch.finfo(compute).tiny)
    sketch_NR = torch.where(norm.isfinite(), sketch_NR, 0.0)
    norm = torch.where(norm.isfinite(), norm, 1.0)
    old_NR = basis_NR.to(compute)
    blended_NR = sketch_NR / norm + (INERTIA / old_NR.shape[1] ** 0.5) * old_NR
    return orthonormalize(blended_NR).to(basis_NR.dtype)
