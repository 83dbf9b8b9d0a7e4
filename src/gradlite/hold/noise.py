"""Random bytes for stochastic rounding, read from one table: drawing fresh ones would cost more than the rounding."""

import math

import torch
from torch import Tensor

TABLE_BYTES = 1 << 22
_ROW_STEP = 61
"""Consecutive rows read the table this many bytes apart: no two rows of a tensor share a column's noise, which would bias
sums over tokens."""
_OFFSET_STEP = 1 << 6  # keeps vector loads aligned
_STRIDE = 40_503  # odd, about 2^16/φ: consecutive reads start far apart and visit every offset


class Noise:
    """Uniform uint8 noise, a function of ``seed`` and the number of reads so far: restoring ``reads`` repeats a run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.reads = 0
        self._table: Tensor | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"seed": self.seed, "reads": self.reads, "_table": None}

    def take(self, num_rows: int, width: int, device: torch.device) -> Tensor:
        """``num_rows × width`` bytes, a strided view of the table (never write to it)."""
        needed = width + num_rows
        if self._table is None or self._table.device != device or len(self._table) < needed + TABLE_BYTES // 2:
            generator = torch.Generator().manual_seed(self.seed)
            size = max(TABLE_BYTES, needed + TABLE_BYTES // 2)
            table = torch.empty(size, dtype=torch.uint8).random_(generator=generator)
            self._table = table.to(device)
        room = len(self._table) - width
        step = max(1, min(_ROW_STEP, room // (2 * max(1, num_rows))))
        places = max(1, (room - (num_rows - 1) * step) // _OFFSET_STEP)
        while math.gcd(places, _STRIDE) != 1:  # or some offsets would never be read
            places -= 1
        offset = (self.reads * _STRIDE) % places * _OFFSET_STEP
        self.reads += 1
        return self._table.as_strided((num_rows, width), (step, 1), offset)
