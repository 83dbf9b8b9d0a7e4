"""The error memory ``e`` (M×N): the residual that was estimated and has not reached the weights yet.

Shape suffixes: M output width, N input width, R rank, Q rank of the factored memory, K sampled tokens.

``e`` is kept in *update units* (``φR̂``, the size of an Adam step) and released past Adam's moments, because a sum of old
gradients put through Adam would spike its second moment. Nothing is lost and nothing is counted twice: what enters the
basis at a refresh leaves ``e`` and goes to the weights. The factored memory truncates to rank Q and the int4 memory rounds;
what that loses is measured in benchmarks/feedback_loss.py. Source: docs/method.md, section 4.

Each memory is a few plain tensors in a dict, so that it travels in an optimizer's state dict as it is.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gradlite.subspace.residual import ResidualSample

MemoryState = dict[str, Tensor]


class ErrorMemory(Protocol):
    """Pure functions over one layer's memory; every method that changes ``e`` writes into ``state``'s tensors."""

    def init(self, rows: int, width: int, rank: int, like: Tensor) -> MemoryState:
        """An empty memory for an M×N layer of the given rank, in the dtype and on the device of ``like``."""

    def nbytes(self, rows: int, width: int, rank: int, itemsize: int) -> int:
        """Bytes of :meth:`init`'s tensors, from shapes."""

    def add(self, state: MemoryState, sample: ResidualSample, scale: Tensor) -> None:
        """``e ← e + scale·R̂``; ``scale`` is a scalar tensor."""

    def release(self, state: MemoryState, basis_NR: Tensor) -> Tensor:
        """Returns ``e P'`` (M×R) and leaves ``e(I − P'P'ᵀ)``."""

    def dense(self, state: MemoryState) -> Tensor:
        """``e`` as an M×N matrix in float32 or wider, for tests and reports."""


def _compute(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class FullMemory:
    """``e`` as one M×N float32 matrix (float64 for float64 weights): exact, 4 bytes a parameter."""

    def init(self, rows: int, width: int, rank: int, like: Tensor) -> MemoryState:
        return {"error": torch.zeros(rows, width, dtype=_compute(like), device=like.device)}

    def nbytes(self, rows: int, width: int, rank: int, itemsize: int) -> int:
        return rows * width * max(itemsize, 4)

    def add(self, state: MemoryState, sample: ResidualSample, scale: Tensor) -> None:
        error_MN = state["error"]
        error_MN.addmm_((sample.left_KM.to(error_MN.dtype) * scale).T, sample.right_KN.to(error_MN.dtype))

    def release(self, state: MemoryState, basis_NR: Tensor) -> Tensor:
        error_MN = state["error"]
        basis_NR = basis_NR.to(error_MN.dtype)
        released_MR = error_MN @ basis_NR
        error_MN.addmm_(released_MR, basis_NR.T, alpha=-1.0)
        return released_MR

    def dense(self, state: MemoryState) -> Tensor:
        return state["error"]


INT4_BLOCK = 64


class Int4Memory:
    """``e`` as signed 4-bit codes, two a byte, one float16 scale for 64 of them: 0.53 bytes a parameter.

    Codes are rounded stochastically, so what rounding loses has mean zero. An addition or a release decodes all
    of it for a moment: a few M×N tensors in float32.
    """

    def __init__(self, generator: Callable[[], torch.Generator]) -> None:
        self._generator = generator

    def init(self, rows: int, width: int, rank: int, like: Tensor) -> MemoryState:
        num_blocks = -(-rows * width // INT4_BLOCK)
        return {
            "error_codes": torch.full((num_blocks, INT4_BLOCK // 2), 0x88, dtype=torch.uint8, device=like.device),
            "error_scale": torch.zeros(num_blocks, 1, dtype=torch.float16, device=like.device),
            "error_shape": torch.tensor([rows, width]),
        }

    def nbytes(self, rows: int, width: int, rank: int, itemsize: int) -> int:
        num_blocks = -(-rows * width // INT4_BLOCK)
        return num_blocks * (INT4_BLOCK // 2 + 2) + 16

    def dense(self, state: MemoryState) -> Tensor:
        codes = state["error_codes"]
        signed = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(1).float() - 8.0
        rows, width = (int(size) for size in state["error_shape"])
        return (signed * state["error_scale"].float()).flatten()[: rows * width].view(rows, width)

    def _store(self, state: MemoryState, error_MN: Tensor) -> None:
        codes = state["error_codes"]
        flat = torch.zeros(codes.shape[0] * INT4_BLOCK, device=codes.device)
        flat[: error_MN.numel()] = error_MN.flatten()
        blocks = flat.view(-1, INT4_BLOCK)
        # Rounded up to the next float16, so that no code leaves [-7, 7].
        scale = (blocks.abs().amax(1, keepdim=True) * (1.001 / 7.0)).clamp(max=65504.0).half()
        generator = self._generator()
        noise = torch.rand(blocks.shape, generator=generator, device=generator.device).to(codes.device)
        divided = torch.where(scale > 0, blocks / scale.float().clamp_min(1e-38), torch.zeros_like(blocks))
        signed = (divided + noise).floor().clamp(-7, 7)
        unsigned = (signed + 8.0).to(torch.uint8).view(-1, INT4_BLOCK // 2, 2)
        codes.copy_(unsigned[..., 0] | (unsigned[..., 1] << 4))
        state["error_scale"].copy_(scale)

    def add(self, state: MemoryState, sample: ResidualSample, scale: Tensor) -> None:
        error_MN = self.dense(state)
        error_MN.addmm_((sample.left_KM.float() * scale.float()).T, sample.right_KN.float())
        self._store(state, error_MN)

    def release(self, state: MemoryState, basis_NR: Tensor) -> Tensor:
        error_MN = self.dense(state)
        released_MR = error_MN @ basis_NR.float()
        self._store(state, error_MN.addmm_(released_MR, basis_NR.float().T, alpha=-1.0))
        return released_MR


MEMORY_FRACTION = 4
"""The factored memory's rank, and the number of tokens sampled a step, are rank / MEMORY_FRACTION."""


def memory_rank(rank: int) -> int:
    """Q for a layer of the given rank: a quarter of it, at least 1. Table: docs/log.md."""
    return max(1, rank // MEMORY_FRACTION)


class FactoredMemory:
    """``e = leftᵀ right`` with Q×M and Q×N factors in the weights' dtype: the default, (M+N)·Q·itemsize bytes.

    After each sample the product is cut back to its Q leading singular directions, found from two Gram matrices of size
    (Q+K)² in float32 (float64 for float64 weights): no factorisation of anything as long as M or N.
    """

    def init(self, rows: int, width: int, rank: int, like: Tensor) -> MemoryState:
        q = memory_rank(rank)
        return {"error_left": like.new_zeros(q, rows), "error_right": like.new_zeros(q, width)}

    def nbytes(self, rows: int, width: int, rank: int, itemsize: int) -> int:
        return memory_rank(rank) * (rows + width) * itemsize

    def add(self, state: MemoryState, sample: ResidualSample, scale: Tensor) -> None:
        compute = _compute(state["error_left"])
        left = torch.cat((state["error_left"].to(compute), sample.left_KM.to(compute) * scale.to(compute)))
        right = torch.cat((state["error_right"].to(compute), sample.right_KN.to(compute)))
        left, right = truncate_product(left, right, len(state["error_left"]))
        state["error_left"].copy_(left)
        state["error_right"].copy_(right)

    def release(self, state: MemoryState, basis_NR: Tensor) -> Tensor:
        compute = _compute(state["error_left"])
        basis_NR, right = basis_NR.to(compute), state["error_right"].to(compute)
        inside_QR = right @ basis_NR
        state["error_right"].copy_(right - inside_QR @ basis_NR.T)
        return state["error_left"].to(compute).T @ inside_QR

    def dense(self, state: MemoryState) -> Tensor:
        compute = _compute(state["error_left"])
        return state["error_left"].to(compute).T @ state["error_right"].to(compute)


def truncate_product(left_SM: Tensor, right_SN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-``rank`` approximation of ``leftᵀ right`` (Frobenius), again as two factors (rank×M, rank×N).

    With ``left leftᵀ = VΛVᵀ`` the product is ``U H`` with orthonormal ``U = leftᵀVΛ^{-½}`` and ``H = Λ^{½}Vᵀ right``; the
    eigenvectors of the S×S matrix ``H Hᵀ`` give its leading left singular vectors. The singular values are split evenly
    between the factors, so that neither over- nor underflows in a short format.
    """
    values_S, vectors_SS = torch.linalg.eigh(left_SM @ left_SM.T)
    floor = values_S.amax().clamp_min(0.0) * 1e-10 + torch.finfo(left_SM.dtype).tiny
    kept_S = values_S > floor
    root_S = values_S.clamp_min(floor).sqrt()
    spread_SS = (vectors_SS * root_S).T  # Λ^{½}Vᵀ
    gram_SS = spread_SS @ (right_SN @ right_SN.T) @ spread_SS.T
    gram_SS = torch.where(kept_S[:, None] & kept_S[None, :], gram_SS, 0.0)
    squared_S, turn_SS = torch.linalg.eigh(gram_SS)
    squared_Q, turn_SQ = squared_S[-rank:], turn_SS[:, -rank:]
    split_Q = squared_Q.clamp_min(torch.finfo(left_SM.dtype).tiny).pow(0.25)
    inverse_S = torch.where(kept_S, 1.0 / root_S, 0.0)
    new_left = (turn_SQ * split_Q).T @ ((vectors_SS * inverse_S).T @ left_SM)
    new_right = (turn_SQ / split_Q).T @ (spread_SS @ right_SN)
    return new_left, new_right
