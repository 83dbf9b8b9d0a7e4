"""MeZO: training by forward passes alone (Malladi et al., arXiv 2305.17333).

    g = (L(w + εz) − L(w − εz)) / 2ε        w ← (1 − ηλ) w − η g z        z ~ N(0, I)

``z`` is drawn anew from a seed wherever it is needed.

The authors add εz to all weights, subtract 2εz and add εz again. In short formats that does not end where it began: every
step leaves roundings behind. Here a tensor is perturbed *at use*: a module's weights show ``w + εz`` while the module runs, and
their own bits before and after. So the weights are restored bit by bit, at the cost of one module's weights at a time (the
largest is an embedding: vocabulary × width) instead of a copy of the model, and z is drawn three times a step, not four.

A step is (seed, g, learning rates): :func:`rebuild` makes the weights again from the first ones and this log, 8 bytes a number.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer

from gradlite.errors import GradLiteError
from gradlite.methods.method import Claims, Method, Rate, param_groups, trainable
from gradlite.ops.random_state import random_state, restored, seed_of
from gradlite.optim.rounding import TILE, NoiseTable, dense_update_

_SEEDS = 1 << 31
_FIRST_ROWS = 64


def mezo(
    model: nn.Module,
    lr: Rate,
    *,
    epsilon: Annotated[float, Field(gt=0)] = 1e-3,
    weight_decay: Rate = 0.0,
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0,
) -> Method:
    """Trains whatever asks for a gradient: all weights, or the adapter of a PEFT model. ``epsilon`` is the authors'; their
    learning rates are about 1e-6 for all weights and 1e-4 for adapters.
    """
    named = trainable(model)
    groups = param_groups([parameter for _, parameter in named], weight_decay)
    optimizer = ZerothOrderSGD(groups, lr, epsilon, seed)
    return MeZOMethod("mezo", model, optimizer, Claims(full_parameter=True, accumulation=True, clipping=False))


def direction(parameter: Tensor, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Where each part of ``z`` begins in the flat parameter, and the part: float32, on the parameter's device."""
    generator = torch.Generator(parameter.device).manual_seed(seed)
    for start in range(0, parameter.numel(), TILE):
        size = min(TILE, parameter.numel() - start)
        yield start, torch.randn(size, generator=generator, device=parameter.device)


def draw(optimizer: "ZerothOrderSGD", parameter: nn.Parameter) -> Tensor:
    """``z`` of one tensor in the step that is under way, float32, in its shape."""
    seed = seed_of(optimizer.seed, optimizer.numbers[id(parameter)])
    return torch.cat([z for _, z in direction(parameter, seed)]).view(parameter.shape)


class ZerothOrderSGD(Optimizer):
    """Steps along ``z`` by the projected gradient that backward left in ``projected.grad``. Keeps the log, and no more.

    Weights in bfloat16 are rounded stochastically, from the step's seed.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, epsilon: float, seed: int) -> None:
        self.epsilon = epsilon
        self._generator_seed = seed
        self._num_steps = 0
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self._rows = torch.zeros(_FIRST_ROWS, 2 + len(self.param_groups), dtype=torch.float64)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
        self.projected = torch.zeros((), device=parameters[0].device, requires_grad=True)

    @property
    def seed(self) -> int:
        """Of the step that is under way."""
        return step_seed(self._generator_seed, self._num_steps)

    @property
    def log(self) -> Tensor:
        """Steps × (seed, projected gradient, learning rate of each group), float64."""
        return self._rows[: self._num_steps]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from ``projected.grad``."""
        assert self.projected.grad is not None
        row = [self.seed, float(self.projected.grad), *(float(group["lr"]) for group in self.param_groups)]
        if self._num_steps == len(self._rows):
            self._rows = torch.cat((self._rows, torch.zeros_like(self._rows)))
        self._rows[self._num_steps] = torch.tensor(row, dtype=torch.float64)
        self._num_steps += 1
        _apply(self.param_groups, row)

    def state_dict(self) -> dict[str, Any]:
        """The log, the number of steps in it, and the groups' settings."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {"log": self.log.clone(), "seed": self._generator_seed, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        log = state_dict["log"]
        room = max(_FIRST_ROWS, len(log))
        self._rows = torch.cat((log.double(), log.new_zeros(room - len(log), log.shape[1])))
        self._num_steps, self._generator_seed = len(log), int(state_dict["seed"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)


def step_seed(seed: int, number: int) -> int:
    """A seed for step ``number``, below 2³¹; neighbouring steps share nothing (the multiplier is odd and near 2³¹/φ)."""
    return (seed * 40_503 + number * 1_327_217_885 + 1) % _SEEDS


@torch.no_grad()
def _apply(groups: list[dict[str, Any]], row: list[float]) -> None:
    seed, projected, rates = int(row[0]), row[1], row[2:]
    number, noise = 0, None
    for group, rate in zip(groups, rates, strict=True):
        decay = 1.0 - rate * group["weight_decay"]
        for parameter in group["params"]:
            own_seed = seed_of(seed, number)
            if noise is None and parameter.dtype == torch.bfloat16:
                noise = NoiseTable(torch.Generator().manual_seed(seed), parameter.device)
            flat = parameter.data.view(-1)
            for start, z in direction(parameter, own_seed):
                dense_update_(flat[start : start + len(z)], z.to(_wide_dtype(parameter)), -rate * projected, decay, noise)
            number += 1


def _wide_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def rebuild(model: nn.Module, saved: Mapping[str, Any]) -> nn.Module:
    """Makes the weights after training again, in place, from ``model`` as it was before and
    ``saved = method.state_dict()["optimizer"]``.

    Bitwise on the same kind of device. Raises GradLiteError if it belongs to a model with other groups of parameters.
    """
    groups = param_groups([parameter for _, parameter in trainable(model)], 0.0)
    if len(saved["param_groups"]) != len(groups):
        raise GradLiteError(
            f"the log has learning rates of {len(saved['param_groups'])} groups and {type(model).__name__} has {len(groups)}; "
            "give the model that was trained, with the same weights frozen."
        )
    for group, settings in zip(groups, saved["param_groups"], strict=True):
        group["weight_decay"] = settings["weight_decay"]
    for row in saved["log"].tolist():
        _apply(groups, row)
    return model


class Perturbation:
    """Shows ``w + sign·εz`` in the place of every trainable tensor while the module that owns it runs."""

    def __init__(self, model: nn.Module, optimizer: ZerothOrderSGD) -> None:
        self._optimizer = optimizer
        self.sign = 0
        self.seen: set[int] = set()
        self._own: dict[int, tuple[nn.Parameter, Tensor, int]] = {}
        self._hooks = []
        for module in model.modules():
            if any(id(parameter) in optimizer.numbers for parameter in module._parameters.values()):
                self._hooks.append(module.register_forward_pre_hook(self._enter))
                self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _mine(self, module: nn.Module) -> list[nn.Parameter]:
        parameters = module._parameters.values()
        return [one for one in parameters if one is not None and id(one) in self._optimizer.numbers]

    def _enter(self, module: nn.Module, _inputs: Any) -> None:
        if not self.sign:
            return
        for parameter in self._mine(module):
            _, own, depth = self._own.get(id(parameter), (parameter, parameter.data, 0))
            if depth == 0:
                parameter.data = self._perturbed(parameter)
                self.seen.add(id(parameter))
            self._own[id(parameter)] = parameter, own, depth + 1  # a tied tensor may be in use by two modules

    def _leave(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        for parameter in self._mine(module):
            if id(parameter) in self._own:
                _, own, depth = self._own.pop(id(parameter))
                if depth == 1:
                    parameter.data = own
                else:
                    self._own[id(parameter)] = parameter, own, depth - 1

    @torch.no_grad()
    def _perturbed(self, parameter: nn.Parameter) -> Tensor:
        seed = seed_of(self._optimizer.seed, self._optimizer.numbers[id(parameter)])
        result = torch.empty_like(parameter.data, memory_format=torch.contiguous_format)
        flat, flat_result = parameter.data.reshape(-1), result.view(-1)
        for start, z in direction(parameter, seed):
            tile = slice(start, start + len(z))
            flat_result[tile] = torch.add(flat[tile].to(_wide_dtype(parameter)), z, alpha=self.sign * self._optimizer.epsilon)
        return result


class _Direction(torch.autograd.Function):
    """The mean of an output at both perturbations; its derivative along ``z`` is their difference over 2ε."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, plus: Tensor, minus: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward((plus - minus) / (2.0 * epsilon))
        ctx.dtype = projected.dtype
        return (plus + minus) / 2.0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (grad * slope).sum().to(ctx.dtype), None, None, None


class _ZerothOrderModel(nn.Module):
    """A model of transformers whose forward pass in training runs at both perturbations."""

    gradlite_perturbation: tuple[Perturbation, ZerothOrderSGD]

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """As the model's own; in training without gradients inside, and with ``loss`` (else ``logits``) alone in the result."""
        own = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return own(*arguments, **keywords)
        perturbation, optimizer = self.gradlite_perturbation
        device = optimizer.projected.device
        state = random_state(device)
        outputs = []
        with torch.no_grad():
            for sign in (-1, 1):  # both with the same dropout
                torch.clear_autocast_cache()  # its casts are kept by parameter, and would be the other perturbation's
                perturbation.sign = sign
                try:
                    if sign < 0:
                        with restored(state, device):
                            outputs.append(own(*arguments, **keywords))
                    else:
                        outputs.append(own(*arguments, **keywords))
                finally:
                    perturbation.sign = 0
                    torch.clear_autocast_cache()
        minus, plus = outputs
        if isinstance(plus, Tensor):
            return _Direction.apply(optimizer.projected, plus, minus, optimizer.epsilon)
        key = "loss" if getattr(plus, "loss", None) is not None else "logits"
        joined = _Direction.apply(optimizer.projected, plus[key], minus[key], optimizer.epsilon)
        return type(plus)(**{key: joined})


class MeZOMethod(Method):
    """``backward()`` multiplies the projected gradient by the loss's own derivative: nothing goes through the model."""

    optimizer: ZerothOrderSGD
    clipping_instead = ": the estimate's norm is that of z times the projected gradient, far above the true one"

    def __init__(self, name: str, model: nn.Module, optimizer: ZerothOrderSGD, claims: Claims) -> None:
        super().__init__(name, model, optimizer, claims)
        self._perturbation = Perturbation(model, optimizer)
        own = type(model)
        self._own_class = own

        @functools.wraps(own.forward)  # with the own signature, which trainers inspect
        def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
            return _ZerothOrderModel.forward(self, *arguments, **keywords)  # type: ignore[arg-type]

        names = {"__module__": own.__module__, "__doc__": own.__doc__, "forward": forward}
        model.__class__ = type(own.__name__, (_ZerothOrderModel, own), names)
        model.gradlite_perturbation = (self._perturbation, optimizer)  # type: ignore[assignment]

    def backward(self, loss: Tensor) -> None:
        """Adds to the projected gradient. Raises GradLiteError for weights that no module of the model used in this step."""
        if not (self.model.training and loss.requires_grad):
            raise GradLiteError(
                f"method {self.name!r} needs the loss of method.model in training mode; call method.model.train()."
            )
        named = {id(parameter): key for key, parameter in self.model.named_parameters()}
        unused = [named[key] for key in self.optimizer.numbers if key not in self._perturbation.seen]
        if unused:
            raise GradLiteError(
                f"method {self.name!r} cannot perturb {unused[0]!r}, which no module's own forward pass used; freeze it."
            )
        super().backward(loss)

    def step(self) -> None:
        grad = self.optimizer.projected.grad
        if grad is not None and bool(grad.isfinite()):
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self._skip()
        self._perturbation.seen.clear()
        self.optimizer.projected.grad = None  # here too: the Trainer clears the model's gradients, and this is not one of them

    def zero_grad(self) -> None:
        super().zero_grad()
        self.optimizer.projected.grad = None

    def finish(self) -> nn.Module:
        self._perturbation.remove()
        self.model.__class__ = self._own_class
        self.model.__dict__.pop("gradlite_perturbation", None)
        return super().finish()

    def _state(self) -> Any:
        return [self.optimizer._rows, self.optimizer.projected]
