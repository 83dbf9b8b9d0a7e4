"""How Adam's two moments are kept: float32, or 8-bit codes. Both live in an optimizer's state as plain tensors.

Codes run along the columns of a matrix (one basis direction over 256 output rows), since the directions of a basis differ
far more in size than the rows do.
"""

from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from gradlite.hold.compiled import kernel
from gradlite.optim.adam import adam_direction_
from gradlite.optim.codes import (
    BLOCK,
    Codes,
    blocks_of,
    empty_codes,
    num_code_bytes,
    signed_codes,
    signed_values,
    unsigned_codes,
    unsigned_values,
    values_of,
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

    def advance(
        self, state: State, grad: Tensor, step: int, betas: tuple[float, float], eps: float, noise: NoiseTable
    ) -> tuple[Tensor, Tensor]:
        """Moves both moments towards ``grad`` and stores them. Adam's direction (``step`` counts from 1; float32 or wider, the
        caller may overwrite it), and the sum of the second moment.
        """

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

    def advance(
        self, state: State, grad: Tensor, step: int, betas: tuple[float, float], eps: float, noise: NoiseTable
    ) -> tuple[Tensor, Tensor]:
        grad = grad.to(state["exp_avg"].dtype)
        direction = adam_direction_(grad, state["exp_avg"], state["exp_avg_sq"], step, *betas, eps)
        return direction, state["exp_avg_sq"].sum()

    def read(self, state: State, shape: torch.Size) -> tuple[Tensor, Tensor]:
        return state["exp_avg"].clone(), state["exp_avg_sq"].clone()

    def write(self, state: State, exp_avg: Tensor, exp_avg_sq: Tensor, noise: NoiseTable) -> None:
        state["exp_avg"].copy_(exp_avg)
        state["exp_avg_sq"].copy_(exp_avg_sq)


@lru_cache(maxsize=4)
def _corrections(step: int, beta1: float, beta2: float, device: torch.device) -> Tensor:
    """AdamW's two bias corrections as a tensor: copied to a GPU once a step, and not once a parameter."""
    return torch.tensor([1.0 - beta1**step, 1.0 - beta2**step], device=device)


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

    def advance(
        self, state: State, grad: Tensor, step: int, betas: tuple[float, float], eps: float, noise: NoiseTable
    ) -> tuple[Tensor, Tensor]:
        turned = grad.permute(_backwards(grad.dim()))
        grad_BS = blocks_of(turned)
        ratio, square = _codes(state)
        beta1, beta2 = betas
        corrections = _corrections(step, beta1, beta2, grad.device)
        direction_BS, sum_1, *codes = kernel(_advance, beta1, beta2, eps)(
            grad_BS, corrections, *ratio.blocks(), *square.blocks(), *_noises(noise, grad_BS.numel())
        )
        ratio.store(*codes[:2])
        square.store(*codes[2:])
        return values_of(direction_BS, turned.shape).permute(_backwards(grad.dim())), sum_1.squeeze(0)

    def read(self, state: State, shape: torch.Size) -> tuple[Tensor, Tensor]:
        turned = torch.Size(reversed(shape))
        ratio, square = _codes(state)
        first_BS, second_BS = kernel(_moments)(*ratio.blocks(), *square.blocks())
        first, second = (values_of(blocks, turned).permute(_backwards(len(shape))) for blocks in (first_BS, second_BS))
        return first, second

    def write(self, state: State, exp_avg: Tensor, exp_avg_sq: Tensor, noise: NoiseTable) -> None:
        first_BS, second_BS = (blocks_of(moment.permute(_backwards(moment.dim()))) for moment in (exp_avg, exp_avg_sq))
        ratio, square = _codes(state)
        codes = kernel(_coded)(first_BS, second_BS, *_noises(noise, first_BS.numel()))
        ratio.store(*codes[:2])
        square.store(*codes[2:])


def _backwards(num_axes: int) -> tuple[int, ...]:
    return tuple(reversed(range(num_axes)))


def _codes(state: State) -> tuple[Codes, Codes]:
    return Codes(state["ratio_codes"], state["ratio_scale"]), Codes(state["exp_avg_sq_codes"], state["exp_avg_sq_scale"])


def _noises(noise: NoiseTable, count: int) -> tuple[Tensor, Tensor]:
    return noise.take_unit(count).view(-1, BLOCK), noise.take_unit(count).view(-1, BLOCK)


def _moments(ratio_BS: Tensor, ratio_scale_B1: Tensor, square_BS: Tensor, square_scale_B1: Tensor) -> tuple[Tensor, Tensor]:
    """From codes."""
    second_BS = unsigned_values(square_BS, square_scale_B1)
    return signed_values(ratio_BS, ratio_scale_B1) * second_BS.sqrt(), second_BS


def _coded(first_BS: Tensor, second_BS: Tensor, ratio_noise_BS: Tensor, square_noise_BS: Tensor) -> tuple[Tensor, ...]:
    """Codes and scales of the ratio, then of the second moment.

    Where the second moment has underflowed (gradients below 1e-19 or so) the ratio is nothing that the first could come back
    from, and would set the scale of its whole block: it is zero.
    """
    tiny = torch.finfo(torch.float32).tiny
    ratio_BS = torch.where(second_BS >= tiny, first_BS, 0.0) / second_BS.sqrt().clamp_min(tiny)
    return *signed_codes(ratio_BS, ratio_noise_BS), *unsigned_codes(second_BS, square_noise_BS)


def _advance(
    beta1: float,
    beta2: float,
    eps: float,
    grad_BS: Tensor,
    corrections_2: Tensor,
    ratio_BS: Tensor,
    ratio_scale_B1: Tensor,
    square_BS: Tensor,
    square_scale_B1: Tensor,
    ratio_noise_BS: Tensor,
    square_noise_BS: Tensor,
) -> tuple[Tensor, ...]:
    """Direction, sum of the second moment, and :func:`_coded`, in one pass over memory where it is compiled."""
    grad_BS = grad_BS.float()
    first_BS, second_BS = _moments(ratio_BS, ratio_scale_B1, square_BS, square_scale_B1)
    first_BS = first_BS + (grad_BS - first_BS) * (1.0 - beta1)
    second_BS = second_BS * beta2 + grad_BS * grad_BS * (1.0 - beta2)
    root_BS = (second_BS / corrections_2[1]).sqrt() + eps
    direction_BS = first_BS / corrections_2[0] / root_BS
    return direction_BS, second_BS.sum().view(1), *_coded(first_BS, second_BS, ratio_noise_BS, square_noise_BS)


MIN_CODED_ELEMENTS = 4096
"""Below this (norms, biases) codes save nothing worth their rounding; such parameters keep float32 moments."""


def moments_for(fmt: MomentsFormat, num_elements: int, dtype: torch.dtype) -> Moments:
    """The format for one parameter: codes need float32 arithmetic, so float64 weights keep float64 moments."""
    if fmt == "int8" and num_elements >= MIN_CODED_ELEMENTS and dtype != torch.float64:
        return Int8Moments()
    return FloatMoments()
