"""AdamW with moments in 8 or 4 bit: torchao's, which works on CPU and CUDA.

Moments of tensors with at least 4,096 elements (a whole number of blocks) are block-wise codes: 8 bit dynamic codes in blocks
of 256 (Dettmers et al., arXiv 2110.02861), 4 bit codes in blocks of 128 (Li et al., arXiv 2309.01507). The update of each
tensor is one compiled kernel; the first step of a process therefore takes seconds a shape.

bitsandbytes, the other home of 8-bit AdamW, has no 4-bit one.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import Tensor, nn
from torch.optim import Optimizer

from gradlite.methods.method import Betas, Epsilon, FusedBackward, Method, Rate, param_groups, trainable
from gradlite.methods.packages import hold_back_torchao_lines, require


def adamw8bit(
    model: nn.Module,
    lr: Rate,
    *,
    betas: Betas = (0.9, 0.999),
    eps: Epsilon = 1e-8,
    weight_decay: Rate = 0.0,
    bf16_stochastic_round: bool = False,
    in_backward: bool = False,
    checkpointing: bool = False,
) -> Method:
    """``torchao.optim.AdamW8bit``. ``in_backward``: each weight is stepped in the backward pass, as soon as its gradient is
    whole, and the gradient is dropped (torchao's recipe for the least memory); then nothing accumulates and nothing is clipped.
    """
    torchao_optim = _import_torchao("adamw8bit")
    groups = param_groups([parameter for _, parameter in trainable(model)], weight_decay)
    optimizer = torchao_optim.AdamW8bit(groups, lr=lr, betas=betas, eps=eps, bf16_stochastic_round=bf16_stochastic_round)
    if in_backward:
        return SteppedInBackward("adamw8bit", model, optimizer, checkpointing=checkpointing)
    return QuantisedAdamW("adamw8bit", model, optimizer, checkpointing=checkpointing)


def adamw4bit(
    model: nn.Module,
    lr: Rate,
    *,
    betas: Betas = (0.9, 0.999),
    eps: Epsilon = 1e-8,
    weight_decay: Rate = 0.0,
    bf16_stochastic_round: bool = False,
    checkpointing: bool = False,
) -> Method:
    """``torchao.optim.AdamW4bit``."""
    torchao_optim = _import_torchao("adamw4bit")
    groups = param_groups([parameter for _, parameter in trainable(model)], weight_decay)
    optimizer = torchao_optim.AdamW4bit(groups, lr=lr, betas=betas, eps=eps, bf16_stochastic_round=bf16_stochastic_round)
    return QuantisedAdamW("adamw4bit", model, optimizer, checkpointing=checkpointing)


class QuantisedAdamW(Method):
    """torchao's optimizers, without the warning that their first compiled step gives."""

    def step(self) -> None:
        with _unstable_hash_allowed():
            super().step()


class SteppedInBackward(FusedBackward):
    """One optimizer, called with one gradient at a time; it leaves out parameters without one."""

    def __init__(self, name: str, model: nn.Module, optimizer: Optimizer, *, checkpointing: bool) -> None:
        super().__init__(name, model, optimizer, checkpointing=checkpointing)
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._step_and_drop) for _, parameter in trainable(model)]

    def _step_and_drop(self, parameter: Tensor) -> None:
        self.optimizer.step()
        parameter.grad = None

    def _fused_backward(self, loss: Tensor) -> bool:
        with _unstable_hash_allowed():
            loss.backward()
        return True

    def finish(self) -> nn.Module:
        for hook in self._hooks:
            hook.remove()
        return super().finish()


def _import_torchao(method: str) -> ModuleType:
    hold_back_torchao_lines()
    return require("torchao.optim", method, "torchao")


@contextmanager
def _unstable_hash_allowed() -> Iterator[None]:
    """The compiler warns that torchao's tensors have no hash of their own for its cache; nothing depends on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not implement _stable_hash_for_caching")
        yield
