"""FOAM: Adam with moments of block-wise means, and a residual that tells the entries of a block apart.

Wen et al., "FOAM: Blocked State Folding for Memory-Efficient LLM Training", arXiv 2512.07112, whose equations these are. With
``A`` the mean over blocks of ``2^l`` neighbours in a row, ``E`` its repetition back to full length, and Adam's bias
corrections:

    g̃ = g A            m̃ ← β₁ m̃ + (1 − β₁) g̃        ṽ ← β₂ ṽ + (1 − β₂) g̃²
    R = g − g̃ E        m = m̃ E + R                    v = ṽ E + R²
    W ← W − η α m / (√v + ε)

The paper's blocks are of equal size; where the width is no multiple of it, the last mean is over the entries that are left.
Only ``m̃`` and ``ṽ`` are kept, ``2^(1−l)`` numbers a parameter. By hand: there is no package, and the authors' repository
(zqOuO/FOAM) has no licence. Its code differs from the paper in one point: it averages ``g²`` where the paper squares ``g̃``.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from gradlite.errors import GradLiteError
from gradlite.methods.method import Betas, Epsilon, Method, Rate, linear_weights, without
from gradlite.methods.projected import Scale
from gradlite.optim.adam import adam_direction_


def foam(
    model: nn.Module,
    lr: Rate,
    *,
    level: Annotated[int, Field(ge=0)] = 8,
    scale: Scale = 0.25,
    target_modules: list[str] = ["attn", "mlp"],  # noqa: B006 - never changed
    betas: Betas = (0.9, 0.999),
    eps: Epsilon = 1e-8,
    weight_decay: Rate = 0.0,
    checkpointing: bool = False,
) -> Method:
    """Level and scale (``l`` and ``α``) are those of the fine-tuning in the authors' README; their pre-training of 60 million
    parameters has level 2. The linear layers of attention and MLP are folded, everything else is trained by plain AdamW.
    """
    folded = linear_weights(model, target_modules)
    _check_level(level, max(weight.shape[-1] for weight in folded))
    others = without(model, folded)
    groups: list[dict[str, Any]] = [{"params": others}, {"params": folded, "level": level, "scale": scale}]
    optimizer = Foam([group for group in groups if group["params"]], lr, betas, eps, weight_decay)
    return Method("foam", model, optimizer, checkpointing=checkpointing)


def _check_level(level: int, width: int) -> None:
    """Blocks that no row could fill are a mistake; a few narrower layers, whose rows are one block, are none."""
    if level >= width.bit_length():  # 2^level > width
        raise GradLiteError(
            f"method 'foam': level is {level}, so a block would have 2^{level} entries, but the widest layer that it folds has "
            f"{width} columns; give a level of at most {width.bit_length() - 1}."
        )


class Foam(Optimizer):
    """FOAM on groups with ``level`` and ``scale``, AdamW on the others. Moments have the parameters' dtype."""

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        level = group.get("level")
        state = self.state[parameter]
        if not state:
            like = gradient if level is None else fold(gradient, level)
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(like), torch.zeros_like(like)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"].item()), group["betas"]
        if level is None:
            direction = adam_direction_(gradient, state["exp_avg"], state["exp_avg_sq"], step, beta1, beta2, group["eps"])
        else:
            direction = group["scale"] * folded_direction_(
                gradient, state["exp_avg"], state["exp_avg_sq"], step, beta1, beta2, group["eps"], level
            )
        parameter.mul_(1.0 - float(group["lr"]) * group["weight_decay"]).add_(direction, alpha=-float(group["lr"]))


def folded_direction_(
    gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, beta1: float, beta2: float, eps: float, level: int
) -> Tensor:
    """``m / (√v + ε)`` with bias corrections; the folded moments are updated in place."""
    folded = fold(gradient, level)
    exp_avg.lerp_(folded, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(folded, folded, value=1.0 - beta2)
    width = gradient.shape[-1]
    residual = gradient - unfold(folded, width, level)
    denominator = (unfold(exp_avg_sq, width, level) + residual.square()).sqrt_().add_(eps)
    correction = math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)
    return (unfold(exp_avg, width, level) + residual).div_(denominator).mul_(correction)


def fold(full: Tensor, level: int) -> Tensor:
    """Means over blocks of ``2^level`` neighbours along the last dimension; of a last block that is short, over what it has."""
    block = 2**level
    num_whole = full.shape[-1] // block
    whole, rest = full.split((num_whole * block, full.shape[-1] % block), dim=-1)
    means = whole.unflatten(-1, (num_whole, block)).mean(-1)
    return torch.cat((means, rest.mean(-1, keepdim=True)), dim=-1) if rest.shape[-1] else means


def unfold(folded: Tensor, width: int, level: int) -> Tensor:
    """Each mean repeated over its block, cut to ``width``."""
    return folded.repeat_interleave(2**level, dim=-1)[..., :width]
