"""Updates of short-format weights, rounded stochastically: round-to-nearest loses what is below half a unit in the last place.

Shape suffixes: M output width, N input width, S width of the update's factors.

A bfloat16 is the upper half of a float32. Adding 16 uniform random bits to the float32 and cutting the lower half off rounds
up with exactly the probability that makes the mean right (as in torchao's 8-bit AdamW). Generating a random number for every
weight costs more than the update itself on a CPU, so one table a step is drawn and every tile reads it from a random place:
each weight's rounding is still uniform and fresh every step; what is shared is noise among distant weights.
"""

from functools import cached_property

import torch
from torch import Tensor

TILE = 1 << 19  # elements of float32 workspace, 2 MiB: stays in a core's cache, and bounds the step's temporaries
_TILE_CUDA = 1 << 24  # 64 MiB: a large model's update is some hundred kernels then, instead of tens of thousands
TABLE = 1 << 20
_ALIGNED = 16  # elements: reads begin where vector loads may


def tile_of(device: torch.device) -> int:
    """Elements of float32 workspace at a time."""
    return _TILE_CUDA if device.type == "cuda" else TILE


class NoiseTable:
    """Uniform random 16-bit integers and uniform floats in [0, 1) for one step, drawn from ``generator`` when first asked."""

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self._generator = generator
        self._device = device
        self._next = 0

    @cached_property
    def bits(self) -> Tensor:
        """The table, int32 values in [0, 65536)."""
        bits = torch.empty(TABLE + tile_of(self._device), dtype=torch.int32, device=self._generator.device)
        return bits.random_(0, 1 << 16, generator=self._generator).to(self._device)

    @cached_property
    def unit(self) -> Tensor:
        """The table as float32 in [0, 1)."""
        return self.bits.float().div_(1 << 16)

    @cached_property
    def _offsets(self) -> list[int]:
        drawn = torch.randint(0, TABLE // _ALIGNED, (4096,), generator=self._generator, device=self._generator.device)
        return [_ALIGNED * int(offset) for offset in drawn.tolist()]

    def _offset(self) -> int:
        self._next = (self._next + 1) % len(self._offsets)
        return self._offsets[self._next]

    def take_bits(self, count: int) -> Tensor:
        """``count`` ≤ one tile of int32 values in [0, 65536)."""
        offset = self._offset()
        return self.bits[offset : offset + count]

    def take_unit(self, count: int) -> Tensor:
        """``count`` floats in [0, 1); longer than the table repeats it."""
        offset = self._offset()
        if offset + count <= len(self.unit):
            return self.unit[offset : offset + count]
        repeats = -(-(offset + count) // len(self.unit))
        return self.unit.repeat(repeats)[offset : offset + count]


def round_into_(target: Tensor, values: Tensor, noise: NoiseTable) -> None:
    """Writes float32 ``values`` (one tile at most; overwritten) into bfloat16 ``target``, rounded stochastically.

    The mean over the noise is ``values`` exactly; NaN and infinity stay what they are only if the caller keeps them out.
    """
    bits = values.view(torch.int32)
    bits += noise.take_bits(bits.numel()).view(bits.shape)
    bits &= -65536  # 0xFFFF0000
    target.copy_(values)


def low_rank_update_(
    weight_MN: Tensor, left_MS: Tensor, right_NS: Tensor, alpha: float, decay: float, noise: NoiseTable | None
) -> None:
    """``W ← decay·W + alpha·left rightᵀ`` in place, of stacked weights (E×M×N) as of one matrix of E·M rows.

    ``left`` and ``right`` in float32 (float64 for float64 weights). With ``noise`` a bfloat16 weight is computed in float32,
    tile by tile, and rounded stochastically; otherwise the result is rounded to nearest. Temporary memory: one tile.
    """
    if weight_MN.dim() > 2:
        stacked, weight_MN = weight_MN, weight_MN.flatten(0, -2)
        low_rank_update_(weight_MN, left_MS, right_NS, alpha, decay, noise)
        _bring_back(weight_MN, stacked)
        return
    if weight_MN.dtype in (torch.float32, torch.float64):
        weight_MN.addmm_(left_MS.to(weight_MN.dtype), right_NS.to(weight_MN.dtype).T, beta=decay, alpha=alpha)
        return
    rows = max(1, tile_of(weight_MN.device) // weight_MN.shape[1])
    for start in range(0, weight_MN.shape[0], rows):
        tile = weight_MN[start : start + rows]
        values = tile.float()
        values.addmm_(left_MS[start : start + rows], right_NS.T, beta=decay, alpha=alpha)
        _store(tile, values, noise)


def dense_update_(weight: Tensor, update: Tensor, alpha: float, decay: float, noise: NoiseTable | None) -> None:
    """``w ← decay·w + alpha·update`` in place, any shape; rounding as in :func:`low_rank_update_`."""
    if weight.dtype in (torch.float32, torch.float64):
        weight.mul_(decay).add_(update, alpha=alpha)
        return
    flat_weight, flat_update = weight.contiguous().view(-1), update.reshape(-1)  # decoded moments run along columns
    size = tile_of(weight.device)
    for start in range(0, flat_weight.numel(), size):
        tile = flat_weight[start : start + size]
        values = tile.float().mul_(decay).add_(flat_update[start : start + size], alpha=alpha)
        _store(tile, values, noise)
    _bring_back(flat_weight, weight)


def _bring_back(flat: Tensor, weight: Tensor) -> None:
    """Where strides of their own (channels last, transposed stacks) made the flat form of a weight a copy."""
    if flat.data_ptr() != weight.data_ptr():
        weight.copy_(flat.view(weight.shape))


def _store(tile: Tensor, values: Tensor, noise: NoiseTable | None) -> None:
    if noise is not None and tile.dtype == torch.bfloat16:
        size = tile_of(tile.device)
        if values.numel() <= size:
            round_into_(tile, values, noise)
        else:  # a single row wider than a tile
            for part, numbers in zip(tile.view(-1).split(size), values.view(-1).split(size), strict=True):
                round_into_(part, numbers, noise)
    else:
        tile.copy_(values)
