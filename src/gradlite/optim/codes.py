"""Optimizer moments in 8 bits: block-wise codes with a power-law spacing.

A block of 256 values shares one float32 scale, its largest magnitude. A first moment is coded as ``±c²`` and a second moment
as ``c⁴`` with ``c`` evenly spaced in [0, 1]: relative steps stay small over four and nine decades, and both directions are
cheap elementwise arithmetic, where a look-up table would need a search. Codes are rounded stochastically: a second moment
changes by a tenth of a percent a step, which rounding to nearest would never let through; the odds are set between the two
neighbouring *values*, so that the mean is right although the codes are not evenly spaced (a bias here would add up over the
thousand steps that a second moment remembers).

Error: a decoded value is off by at most one code step, ``2/127`` (first) or ``4/255`` (second) of itself near the block's
maximum; guarded by tests/optim/test_codes.py. Idea of block-wise 8-bit states: arXiv 2110.02861; the spacing is our own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256


class Codes(NamedTuple):
    """``codes``: int8 or uint8, length a multiple of 256. ``scale``: float32, one a block."""

    codes: Tensor
    scale: Tensor


def num_code_bytes(num_elements: int) -> int:
    """Bytes of one coded moment of so many elements, its scales included."""
    num_blocks = -(-num_elements // BLOCK)
    return num_blocks * (BLOCK + 4)


def empty_codes(num_elements: int, signed: bool, device: torch.device) -> Codes:
    """Codes of zeros."""
    num_blocks = -(-num_elements // BLOCK)
    dtype = torch.int8 if signed else torch.uint8
    return Codes(
        torch.zeros(num_blocks * BLOCK, dtype=dtype, device=device), torch.zeros(num_blocks, device=device)
    )


def _blocks(values: Tensor) -> Tensor:
    flat = values.flatten()
    padding = -flat.numel() % BLOCK
    if padding:
        flat = torch.nn.functional.pad(flat, (0, padding))
    return flat.view(-1, BLOCK)


def _levels(unit: Tensor, power: int, top: float, noise: Tensor) -> Tensor:
    """Integer levels in [0, top] whose decoded value ``(level/top)^power`` has mean ``unit`` (in [0, 1]) over the noise."""
    root = unit.sqrt() if power == 2 else unit.sqrt().sqrt_()
    lower = root.mul_(top).floor_().clamp_(max=top - 1.0)
    below, above = (lower / top).pow_(power), ((lower + 1.0) / top).pow_(power)
    odds = (unit - below).div_(above.sub_(below))
    return lower.add_(odds > noise)


def _noise_like(noise: Tensor, blocks: Tensor) -> Tensor:
    return noise[: blocks.numel()].view_as(blocks)


def encode_signed(values: Tensor, noise: Tensor, into: Codes) -> None:
    """Codes a first moment (float32, any shape). ``noise``: uniform in [0, 1), one for every place in ``into``."""
    blocks = _blocks(values)
    scale = blocks.abs().amax(1)
    unit = blocks.abs() / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    level = _levels(unit, 2, 127.0, _noise_like(noise, unit))
    into.codes.copy_(level.copysign_(blocks).flatten())
    into.scale.copy_(scale)


def decode_signed(codes: Codes, shape: torch.Size) -> Tensor:
    """The first moment as float32 of the given shape."""
    level = codes.codes.view(-1, BLOCK).float().div_(127.0)
    values = (level * level.abs()).mul_(codes.scale[:, None])
    return values.flatten()[: shape.numel()].view(shape)


def encode_unsigned(values: Tensor, noise: Tensor, into: Codes) -> None:
    """Codes a second moment (float32, ≥ 0, any shape). ``noise`` as in :func:`encode_signed`."""
    blocks = _blocks(values)
    scale = blocks.amax(1)
    unit = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    level = _levels(unit, 4, 255.0, _noise_like(noise, unit))
    # Adam divides by the root: a second moment coded as zero would turn one unit of its first moment into a huge step.
    into.codes.copy_(torch.where(blocks > 0, level.clamp_min(1.0), level).flatten())
    into.scale.copy_(scale)


def decode_unsigned(codes: Codes, shape: torch.Size) -> Tensor:
    """The second moment as float32 of the given shape."""
    level = codes.codes.view(-1, BLOCK).float().div_(255.0)
    values = level.square_().square_().mul_(codes.scale[:, None])
    return values.flatten()[: shape.numel()].view(shape)
