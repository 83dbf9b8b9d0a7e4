"""What every way to train offers a training loop.

    loss = …
    method.backward(loss)
    method.clip(1.0)
    method.step()
    scheduler.step()        # any scheduler over method.optimizer
    method.zero_grad()

:class:`Method` does the plain thing: ``loss.backward()``, torch's clipping, one optimizer's step. A method that does something
else overrides just that, so a loop calls ``method.backward(loss)`` and never ``loss.backward()``. The model must be in training
mode: transformers checkpoints nothing otherwise.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from gradlite.errors import GradLiteError

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Epsilon = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[Decay, Decay]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Claims:
    """What a method can do; the conformance suite holds every method to it."""

    full_parameter: bool  # every weight can change
    accumulation: bool  # several backward() before step() give the gradient of all of them
    clipping: bool  # clip() bounds the global gradient norm before the weights change


ENERGY_EVERY = 10
"""Steps between two looks at :meth:`Method.energy`; a look costs one read from the device."""

PLAIN = Claims(full_parameter=True, accumulation=True, clipping=True)


class Method(ABC):  # noqa: B024 - nothing is abstract: the base does the plain thing
    """One way to train a model, as a loop needs it.

    ``model`` runs forward (PEFT's is a wrapper of the model handed in); the ``param_groups`` of ``optimizer`` carry ``lr``.
    A step whose gradients are not finite leaves weights and state as they were and is counted in ``skipped_steps``.

    Args:
        checkpointing: transformers' own gradient checkpointing, non-reentrant, until :meth:`finish`.

    Raises:
        GradLiteError: ``checkpointing`` with a model that has none.
    """

    clipping_instead = ""  # what a user who wants clipping can do where claims.clipping is False, as the end of a sentence

    def __init__(
        self, name: str, model: nn.Module, optimizer: Optimizer, claims: Claims = PLAIN, *, checkpointing: bool = False
    ) -> None:
        self.name = name
        self.model = model
        self.optimizer = optimizer
        self.claims = claims
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self._checkpointing = checkpointing
        self._total_norm: Tensor | None = None  # of the gradients at hand, once clip() has measured it
        if checkpointing:
            self._used_cache = getattr(getattr(model, "config", None), "use_cache", None)
            switch_checkpointing(model, on=True)

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``; a fused backward pass updates the weights as well."""
        self._total_norm = None
        loss.backward()

    def clip(self, max_norm: float) -> float:
        """Scales the gradients down to ``max_norm`` (0: leaves them) and returns their total norm before that.

        The norm is NaN where no gradient outlives the backward pass. Raises GradLiteError for a ``max_norm`` above 0 where
        ``claims.clipping`` is False.
        """
        if not self.claims.clipping:
            if max_norm > 0:
                raise GradLiteError(
                    f"method {self.name!r} cannot clip the gradient, which is never there as a whole: "
                    f"train with max_norm 0{self.clipping_instead}."
                )
            return math.nan
        bound = max_norm if max_norm > 0 else math.inf
        self._total_norm = clip_grad_norm_(self.model.parameters(), bound)
        return float(self._total_norm)

    def step(self) -> None:
        """One update of the weights."""
        if self._all_finite():
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self._skip()
        self._total_norm = None

    def zero_grad(self) -> None:
        """Drops all gradients."""
        self._total_norm = None
        for parameter in self.model.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, for ``torch.save``; loads with ``weights_only=True``. The weights are the model's to save."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`, with the same method and settings and on equal weights."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.skipped_steps = int(state["skipped_steps"])
        self.skipped_in_a_row = int(state["skipped_in_a_row"])

    def finish(self) -> nn.Module:
        """The model as it is to be saved (``save_pretrained``). Training it further takes a new method."""
        if self._checkpointing:
            switch_checkpointing(self.model, on=False)
            config: Any = self.model.config
            config.use_cache = self._used_cache
        return self.model

    def trained(self) -> list[nn.Parameter]:
        """The parameters that the method changes, sooner or later."""
        return [parameter for _, parameter in trainable(self.model)]

    def state_bytes(self) -> dict[str, int]:
        """Bytes that live now: ``optimizer`` (all that training keeps from step to step) and ``gradients``."""
        return {"optimizer": live_bytes(self._state()), "gradients": live_bytes(p.grad for p in self.model.parameters())}

    def energy(self) -> dict[str, float]:
        """The newest known share (0 to 1) of each weight's gradient energy inside its basis, by name; or {}."""
        return {}

    def _state(self) -> Any:
        """All that the method keeps from step to step, in any nesting."""
        return self.optimizer.state

    def _all_finite(self) -> bool:
        norm = self._total_norm
        if norm is None:
            grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            norm = get_total_norm(grads) if grads else torch.zeros(())
        return bool(norm.isfinite())

    def _skip(self) -> None:
        self.skipped_steps += 1
        self.skipped_in_a_row += 1

    def _refuse_other_backward(self) -> NoReturn:
        """Where ``step()`` finds that gradients were made past ``backward()``, which does more than the plain thing."""
        raise GradLiteError(
            f"method {self.name!r} has a backward pass of its own: call method.backward(loss) before every step(), "
            "and never loss.backward()."
        )


class FusedBackward(Method):
    """A method whose backward pass updates each weight as soon as its gradient is there, and drops the gradient.

    So no gradient can be accumulated or clipped, and only the loss is known before the weights change: a backward pass of a
    loss that is not finite is left out and counted in ``skipped_steps``.
    """

    def __init__(self, name: str, model: nn.Module, optimizer: Optimizer, *, checkpointing: bool = False) -> None:
        claims = Claims(full_parameter=True, accumulation=False, clipping=False)
        super().__init__(name, model, optimizer, claims, checkpointing=checkpointing)
        self._backwards = 0

    def backward(self, loss: Tensor) -> None:
        """Backward pass and update. Raises GradLiteError when it is called twice before ``step()``."""
        if self._backwards:
            raise GradLiteError(
                f"method {self.name!r} cannot accumulate gradients: its backward pass has changed the weights already; "
                "call step() after every backward()."
            )
        if bool(loss.detach().isfinite()) and self._fused_backward(loss):
            self.skipped_in_a_row = 0
        else:
            self._skip()
        self._backwards = 1  # not where it has raised: whoever caught that may try another batch

    @abstractmethod
    def _fused_backward(self, loss: Tensor) -> bool:
        """The backward pass of a finite loss, with the update; False if it left the weights as they were."""

    def step(self) -> None:
        """Nothing is left to do: the next ``backward()`` may come. Raises GradLiteError where none came before."""
        if not self._backwards:
            self._refuse_other_backward()
        self._backwards = 0


def switch_checkpointing(model: nn.Module, *, on: bool) -> None:
    """Turns transformers' gradient checkpointing on (and its generation cache, which excludes it, off), or off."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise GradLiteError(f"{type(model).__name__} has no gradient checkpointing; build the method with checkpointing=False.")
    network: Any = model
    if hasattr(network, "activation_checkpointing_enable"):  # its name from some release of transformers 5 on
        enable, disable = network.activation_checkpointing_enable, network.activation_checkpointing_disable
    else:
        enable, disable = network.gradient_checkpointing_enable, network.gradient_checkpointing_disable
    if on:
        enable({"use_reentrant": False})
        network.config.use_cache = False
    else:
        disable()


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that ask for a gradient. Raises GradLiteError where there is none."""
    found = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not found:
        raise GradLiteError(f"{type(model).__name__} has no parameter with requires_grad, so there is nothing to train.")
    return found


def param_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms and biases, which are never decayed, in a group of their own."""
    parameters = list(parameters)
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def without(model: nn.Module, chosen: Iterable[Tensor]) -> list[nn.Parameter]:
    """The trainable parameters that are none of ``chosen``."""
    left_out = {id(weight) for weight in chosen}
    return [parameter for _, parameter in trainable(model) if id(parameter) not in left_out]


def linear_weights(model: nn.Module, target_modules: Sequence[str]) -> list[Tensor]:
    """Trainable weights of the linear layers whose name contains one of ``target_modules``.

    So GaLore's authors choose what is projected (``["attn", "mlp"]``), and Fira's, APOLLO's, LDAdam's and FOAM's after them.
    Raises GradLiteError where no layer fits.
    """
    found = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and any(target in name for target in target_modules)
    ]
    if not found:
        raise GradLiteError(
            f"{type(model).__name__} has no trainable linear layer with {' or '.join(map(repr, target_modules))} in its name; "
            "name its layers with target_modules."
        )
    return found


def live_bytes(state: Any) -> int:
    """Bytes of the storages behind all tensors in ``state``; a storage that several tensors show counts once, and whole."""
    storages = (tensor.untyped_storage() for tensor in tensors_in(state))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def tensors_in(state: Any) -> Iterator[Tensor]:
    """Every tensor in mappings, sequences and plain objects; of a quantised tensor its codes and scales."""
    if isinstance(state, Tensor):
        if hasattr(state, "__tensor_flatten__"):
            for name in state.__tensor_flatten__()[0]:
                yield from tensors_in(getattr(state, name))
        else:
            yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, Iterable) and not isinstance(state, str):
        for value in state:
            yield from tensors_in(value)
    elif hasattr(state, "__dict__"):
        yield from tensors_in(vars(state))
