"""LOMO and AdaLomo: the weights are updated inside the backward pass, so no two gradients live at a time.

LOMO (Lv et al., arXiv 2306.09782) is SGD: ``W ← W − η G``. AdaLomo (Lv et al., arXiv 2310.10195) divides by the root of a
second moment held as the outer product of its row and column means, normalises the update's RMS to at most 1, and scales it by
the weight's RMS. Both are the authors' package, lomo-optim 0.1.1, used as it is but for what keeps it from running here:

- its constructors take the whole model and register hooks that nothing can remove. Here they see a model without names, and the
  hooks are registered by :class:`Lomo`, which removes them in ``finish()``.
- ``AdaLomo`` calls ``.cuda()`` on its state, so it cannot be built without a GPU; with a model without names it makes no state,
  which is made here, on each parameter's device.
- neither saves its state; AdaLomo's is saved here.

Learning rates of the authors: LOMO 0.03, AdaLomo 5e-4 (their fine-tuning scripts).
"""

from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from gradlite.errors import GradLiteError
from gradlite.methods.method import FusedBackward, Rate, trainable
from gradlite.methods.packages import require

Norm = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_MOMENTS = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")


def lomo(
    model: nn.Module,
    lr: Rate,
    *,
    weight_decay: Rate = 0.0,
    clip_grad_norm: Norm | None = None,
    clip_grad_value: Norm | None = None,
    checkpointing: bool = False,
) -> "Lomo":
    """``lomo_optim.Lomo``. ``clip_grad_norm`` costs a second backward pass, which measures the norm first."""
    package = require("lomo_optim", "lomo", "lomo-optim")
    settings = {"weight_decay": weight_decay, "clip_grad_norm": clip_grad_norm, "clip_grad_value": clip_grad_value}
    return Lomo("lomo", model, package.Lomo(_WithoutNames(model), lr=lr, **settings), checkpointing=checkpointing)


def adalomo(
    model: nn.Module,
    lr: Rate,
    *,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: Norm = 1.0,
    decay_rate: float = -0.8,
    weight_decay: Rate = 0.0,
    clip_grad_norm: Norm | None = None,
    clip_grad_value: Norm | None = None,
    checkpointing: bool = False,
) -> "AdaLomo":
    """``lomo_optim.AdaLomo`` with the authors' defaults, who recommend it without ``clip_grad_norm`` (a second pass)."""
    package = require("lomo_optim", "adalomo", "lomo-optim")
    optimizer = package.AdaLomo(
        _WithoutNames(model),
        lr=lr,
        eps=eps,
        clip_threshold=clip_threshold,
        decay_rate=decay_rate,
        weight_decay=weight_decay,
        clip_grad_norm=clip_grad_norm,
        clip_grad_value=clip_grad_value,
    )
    return AdaLomo("adalomo", model, optimizer, checkpointing=checkpointing)


class _WithoutNames:
    """Stands in for the model in the package's constructors, which do per name what :class:`Lomo` does instead."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return []

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in trainable(self._model))


class Lomo(FusedBackward):
    """The package's ``fused_backward``, with the learning rate of the param group."""

    optimizer: Any
    clipping_instead = (
        ", or build the method with clip_grad_norm (on the command line --method-options '{clip_grad_norm: 1}'), "
        "which clips by a second backward pass"
    )

    def __init__(self, name: str, model: nn.Module, optimizer: Optimizer, *, checkpointing: bool) -> None:
        super().__init__(name, model, optimizer, checkpointing=checkpointing)
        self.optimizer.model = model
        self.optimizer.step = MethodType(_no_step, self.optimizer)  # the package has none, and a scheduler counts its calls
        self._hooks = [parameter.register_hook(self.optimizer.grad_func) for _, parameter in trainable(model)]

    def _fused_backward(self, loss: Tensor) -> bool:
        if self.optimizer.clip_grad_norm is not None:
            self.optimizer.grad_norm(loss)
            coefficient = self.optimizer.clip_coef  # NaN or, of an infinite norm, 0: times an infinite gradient that is NaN
            if not bool(torch.isfinite(coefficient)) or not bool(coefficient > 0):
                return False
        self.optimizer.fused_backward(loss, self.optimizer.param_groups[0]["lr"])
        return True

    def step(self) -> None:
        super().step()
        self.optimizer.step()

    def finish(self) -> nn.Module:
        for hook in self._hooks:
            hook.remove()
        return super().finish()


def _no_step(_: Optimizer) -> None:
    """The backward pass has done it all."""


class AdaLomo(Lomo):
    """LOMO's pass with AdaLomo's factored second moments, by parameter name."""

    def __init__(self, name: str, model: nn.Module, optimizer: Optimizer, *, checkpointing: bool) -> None:
        for key, parameter in trainable(model):  # before the hooks are there
            if parameter.dim() not in (1, 2):
                raise GradLiteError(f"method 'adalomo' factors matrices only, but {key!r} has {parameter.dim()} dimensions.")
        super().__init__(name, model, optimizer, checkpointing=checkpointing)
        for key, parameter in trainable(model):
            shapes = (
                dict(zip(_MOMENTS[1:], parameter.shape, strict=True)) if parameter.dim() == 2 else {_MOMENTS[0]: len(parameter)}
            )
            for moment, length in shapes.items():
                getattr(self.optimizer, moment)[key] = torch.zeros(length, dtype=torch.float32, device=parameter.device)

    def state_dict(self) -> dict[str, Any]:
        moments = {moment: getattr(self.optimizer, moment) for moment in _MOMENTS}
        return {**super().state_dict(), "moments": moments, "step_num": self.optimizer.step_num}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.step_num = int(state["step_num"])
        for moment, by_name in state["moments"].items():
            for key, value in getattr(self.optimizer, moment).items():
                value.copy_(by_name[key])

    def _state(self) -> Any:
        return [getattr(self.optimizer, moment) for moment in _MOMENTS]
