"""How Adam's two moments are kept: float32, or 8-bit codes. Both live in an optimizer's state as plain tensors.

Codes run along the columns of a matrix (one basis direction over 256 output rows), since the directions of a basis differ
far more in size than the rows do.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from gradlite.optim.codes import (
    Codes,
    decode_signed,
    decode_unsigned,
    empty_codes,
    encode_signed,
    encode_unsigned,
    num_code_bytes,
)
from gradlite.optim.rounding import NoiseTable

MomentsFormat = Literal["int8", "fp32"]
State = dict[str, Tensor]


class Moments(Protocol):
    """Reads and writes the first and second moment of one parameter."""

    def init(self, shape: torch.Size, like: Tensor) -> State:
        """Zero moments on the device of ``like``."""

    def nbytes(self, num_elements: int, itemsize: int) -> int:
        """Bytes of both moments, from the shape alone; ``itemsize`` of the weights."""

    def read(self, state: State, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Both moments in float32 or wider; the caller may overwrite them."""

    def write(self, state: State, exp_avg: Tensor, exp_avg_sq: Tensor, noise: NoiseTable) -> None:
        """Stores both moments."""


class FloatMoments:
    """Float32 (float64 for float64 weights): 8 bytes an element."""

    def init(self, shape: torch.Size, like: Tensor) -> State:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return {name: torch.zeros(shape, dtype=dtype, device=like.device) for name in ("exp_avg", "exp_avg_sq")}

    def nbytes(self, num_elements: int, itemsize: int) -> int:
        return 2 * num_elements * max(itemsize, 4)

    def read(self, state: State, shape: torch.Size) -> tuple[Tensor, Tensor]:
        return state["exp_avg"].clone(), state["exp_avg_sq"].clone()

    def write(self, state: State, exp_avg: Tensor, exp_avg_sq: Tensor, noise: NoiseTable) -> None:
        state["exp_avg"].copy_(exp_avg)
        state["exp_avg_sq"].copy_(exp_avg_sq)


class Int8Moments:
    """Block-wise 8-bit codes of ``m/√v`` and ``v``: 2.03 bytes an element (see :mod:`gradlite.optim.codes`)."""

    def init(self, shape: torch.Size, like: Tensor) -> State:
        first = empty_codes(shape.numel(), signed=True, device=like.device)
        second = empty_codes(shape.numel(), signed=False, device=like.device)
        return {
            "ratio_codes": first.codes,
            "ratio_scale": first.scale,
            "exp_avg_sq_codes": second.codes,
            "exp_avg_sq_scale": second.scale,
        }

    def nbytes(self, num_elements: int, itemsize: int) -> int:
        return 2 * num_code_bytes(num_elements)

    def read(self, state: State, shape: torch.Size) -> tuple[Tensor, Tensor]:
        turned = torch.Size(reversed(shape))
        ratio = decode_signed(Codes(state["ratio_codes"], state["ratio_scale"]), turned)
        second = decode_unsigned(Codes(state["exp_avg_sq_codes"], state["exp_avg_sq_scale"]), turned)
        axes = tuple(reversed(range(len(shape))))
        return ratio.mul_(second.sqrt()).permute(axes), second.permute(axes)

    def write(self, state: State, exp_avg: Tensor, exp_avg_sq: Tensor, noise: NoiseTable) -> None:
        axes = tuple(reversed(range(exp_avg.dim())))
        places = len(state["ratio_codes"])
        second = exp_avg_sq.permute(axes)
        ratio = exp_avg.permute(axes) / second.sqrt().clamp_min_(torch.finfo(torch.float32).tiny)
        encode_signed(ratio, noise.take_unit(places), Codes(state["ratio_codes"], state["ratio_scale"]))
        into = Codes(state["exp_avg_sq_codes"], state["exp_avg_sq_scale"])
        encode_unsigned(second, noise.take_unit(places), into)


MIN_CODED_ELEMENTS = 4096
"""Below this (norms, biases) codes save nothing worth their rounding; such parameters keep float32 moments."""


def moments_for(fmt: MomentsFormat, num_elements: int, dtype: torch.dtype) -> Moments:
    """The format for one parameter: codes need float32 arithmetic, so float64 weights keep float64 moments."""
    if fmt == "int8" and num_elements >= MIN_CODED_ELEMENTS and dtype != torch.float64:
        return Int8Moments()
    return FloatMoments()
