"""A frozen weight as a linear layer multiplies by it: as it is, or in four bits and decoded a few rows at a time.

Shape suffixes: T tokens, M outputs, N inputs, m outputs of one tile.

Four-bit weights are the codes of :mod:`gradlite.hold.codec` (groups of 64 inputs share a bfloat16 scale), rounded to nearest:
0.53 bytes a parameter. This file is in ``ops`` and not in ``hold``, because a weight is not held for backward: what matters is
that a product never sees more than a tile of it decoded. In 3-billion-parameter models one whole decoded matrix (45 MB) would
weigh more than everything else that a block needs.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gradlite.errors import GradLiteError
from gradlite.hold.codec import INT4
from gradlite.hold.compiled import kernel
from gradlite.ops.rows import in_shape_of

TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Decoded weights that exist at a time."""
_NEAREST = 127  # the noise with which stochastic rounding is rounding to nearest


class FrozenWeight(Protocol):
    """``W`` (M×N), which receives no gradient."""

    def times(self, x_TN: Tensor, bias_M: Tensor | None) -> Tensor:
        """``x Wᵀ + b`` (T×M) in the dtype of ``x``; ``b`` may be wider."""

    def transposed_times(self, grad_TM: Tensor) -> Tensor:
        """``δ W`` (T×N) in the dtype of ``δ``."""

    def rows(self, tile: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of ``W`` in ``dtype``."""


class DenseWeight:
    """A weight in its own format."""

    def __init__(self, weight_MN: Tensor) -> None:
        self._weight_MN = weight_MN

    def times(self, x_TN: Tensor, bias_M: Tensor | None) -> Tensor:
        # Under autocast the weight waits in its own dtype: a cast costs less than a second copy of the model.
        weight_MN = self._weight_MN.to(x_TN.dtype)
        if bias_M is None or bias_M.dtype == x_TN.dtype:
            return F.linear(x_TN, weight_MN, bias_M)
        return F.linear(x_TN, weight_MN).add_(bias_M)

    def transposed_times(self, grad_TM: Tensor) -> Tensor:
        return grad_TM @ self._weight_MN.to(grad_TM.dtype)

    def rows(self, tile: slice, dtype: torch.dtype) -> Tensor:
        return self._weight_MN[tile].to(dtype)


def four_bit_bytes(rows: int, width: int) -> int:
    """Bytes of a four-bit weight."""
    return INT4.nbytes(rows, width, 2)


@torch.no_grad()
def four_bit_codes(weight_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes (M×N/2, uint8) and scales (M×groups, bfloat16) of a weight.

    Raises:
        GradLiteError: an odd width; codes come in pairs.
    """
    rows, width = weight_MN.shape
    if width % 2:
        raise GradLiteError(f"a weight of {rows}×{width} cannot be kept in four bits: its width is odd; leave it as it is.")
    parts = []
    for tile in _row_tiles(rows, width, weight_MN.device.type):
        part_mN = weight_MN[tile]
        noise_mN = torch.full((1, 1), _NEAREST, dtype=torch.uint8, device=part_mN.device).expand_as(part_mN)
        parts.append(INT4.encode(part_mN, noise_mN))
    codes, scales = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(scales)


def _row_tiles(rows: int, width: int, device_type: str) -> list[slice]:
    step = max(1, TILE_ELEMENTS.get(device_type, TILE_ELEMENTS["cuda"]) // width)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _decode(dtype: torch.dtype, codes_mH: Tensor, scales_mG: Tensor) -> Tensor:
    return INT4.decode((codes_mH, scales_mG), dtype)


class FourBitWeight:
    """A weight as :func:`four_bit_codes` wrote it down."""

    def __init__(self, codes_MH: Tensor, scales_MG: Tensor) -> None:
        self._codes_MH, self._scales_MG = codes_MH, scales_MG
        self._rows, self._width = codes_MH.shape[0], 2 * codes_MH.shape[1]
        self._tiles = _row_tiles(self._rows, self._width, codes_MH.device.type)

    def rows(self, tile: slice, dtype: torch.dtype) -> Tensor:
        rows_mN: Tensor = kernel(_decode, dtype)(self._codes_MH[tile], self._scales_MG[tile])
        return rows_mN

    def times(self, x_TN: Tensor, bias_M: Tensor | None) -> Tensor:
        y_TM = x_TN.new_empty(len(x_TN), self._rows)
        for tile in self._tiles:
            y_TM[:, tile] = x_TN @ self.rows(tile, x_TN.dtype).T
        return y_TM if bias_M is None else y_TM.add_(bias_M)

    def transposed_times(self, grad_TM: Tensor) -> Tensor:
        grad_x_TN = grad_TM.new_zeros(len(grad_TM), self._width, dtype=torch.promote_types(grad_TM.dtype, torch.float32))
        for tile in self._tiles:
            grad_x_TN += grad_TM[:, tile] @ self.rows(tile, grad_TM.dtype)
        return grad_x_TN.to(grad_TM.dtype)


class _FrozenLinear(torch.autograd.Function):
    """Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias_M: Tensor | None, weight: FrozenWeight) -> Tensor:
        ctx.weight = weight
        return in_shape_of(x, weight.times(x.reshape(-1, x.shape[-1]), bias_M))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        grad_TM = grad.reshape(-1, grad.shape[-1])
        grad_x_TN = ctx.weight.transposed_times(grad_TM) if needs_x else None
        grad_x = None if grad_x_TN is None else grad_x_TN.view(*grad.shape[:-1], grad_x_TN.shape[1])
        return grad_x, grad_TM.sum(0) if needs_bias else None, None


def frozen_linear(x: Tensor, weight: FrozenWeight, bias_M: Tensor | None) -> Tensor:
    """``x Wᵀ + b`` for ``x`` of any shape (N last), in its dtype (autocast's where that is on)."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y: Tensor = _FrozenLinear.apply(x, None if bias_M is None else bias_M.to(x.dtype), weight)
    return y
