"""Backward-friendly twins of modules.

A module becomes its twin by a change of class, not by replacement: it stays the same object with the same parameters, names
and hooks, ``isinstance`` holds, and changing the class back undoes it. The twin's class stands *behind* the module's own in
the method resolution order where a weight is projected, so that a subclass whose ``forward`` calls ``super().forward`` (a
scaled embedding, say) reaches the subspace operator; and before it where a forward pass is replaced as a whole (stacked experts
with their weights, too).
"""

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradlite.attaching.attention import FRUGAL
from gradlite.attaching.blocks import replayed
from gradlite.attaching.causal_lm import forward_with_loss
from gradlite.attaching.lora_twins import TwinFourBitLinear, TwinLoraLinear, TwinTiledMLP
from gradlite.attaching.names import CHAIN, COORDINATES, DOWN_COORDINATES, GATE_UP_COORDINATES, RESIDUAL_NORM
from gradlite.attaching.recognise import GatedLayout, gated_forward
from gradlite.errors import GradLiteError
from gradlite.hold.holder import Holder
from gradlite.ops.activation import ActivationKind, activation
from gradlite.ops.embedding import subspace_embedding
from gradlite.ops.experts import StackedWeight, subspace_experts
from gradlite.ops.gated_mlp import gated
from gradlite.ops.linear import subspace_linear
from gradlite.ops.norm import NormKind, norm
from gradlite.subspace.collector import Collector, Coordinates

_REGISTERED = (COORDINATES, GATE_UP_COORDINATES, DOWN_COORDINATES, RESIDUAL_NORM)
"""What attaching registers on modules as parameters."""


class _Twin(nn.Module):
    """What all twins share: copies and pickles make the class again from the module's own."""

    gradlite_own_class: type[nn.Module]
    gradlite_role: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The twin's class is made on demand and has no importable name.
        return _blank_twin, (self.gradlite_own_class, self.gradlite_role), self.__dict__


class _TwinState(_Twin):
    """Keeps the coordinates out of files, and without storage when the module moves."""

    gradlite_collectors: tuple[Collector, ...]

    @contextmanager
    def _coordinates_hidden(self) -> Iterator[None]:
        parameters = dict(self._parameters)
        for name in _REGISTERED:
            self._parameters.pop(name, None)
        try:
            yield
        finally:
            hidden = {name: parameters[name] for name in _REGISTERED if name in parameters}
            self._parameters.update(hidden)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._coordinates_hidden():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._coordinates_hidden():
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        for parameter in self._parameters.values():
            if isinstance(parameter, Coordinates):
                parameter.drop_storage()
        for collector in self.gradlite_collectors:
            collector.move(fn)
        return result


class TwinLinear(nn.Linear):
    """``nn.Linear`` whose weight's gradient is absorbed as coordinates."""

    gradlite_collectors: tuple[Collector]
    gradlite_coordinates: Coordinates
    gradlite_holder: Holder

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear.forward``. A compiled model calls it as it is: backward keeps state that graphs must not cache."""
        (collector,), holder = self.gradlite_collectors, self.gradlite_holder
        collector.reads(input)
        projector = collector if holder.projects else None
        coordinates = self.gradlite_coordinates.trained_with(self.weight)
        return subspace_linear(input, self.weight, self.bias, coordinates, collector, holder, projector)


class TwinEmbedding(nn.Embedding):
    """``nn.Embedding`` whose weight's gradient is absorbed as coordinates."""

    gradlite_collectors: tuple[Collector]
    gradlite_coordinates: Coordinates

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Embedding.forward``."""
        (collector,) = self.gradlite_collectors
        collector.window.open_if_cleared()
        coordinates = self.gradlite_coordinates.trained_with(self.weight)
        return subspace_embedding(input, self.weight, coordinates, self.padding_idx, collector)


class TwinExperts(_TwinState):
    """Stacked experts whose weights' gradients are absorbed as coordinates."""

    gradlite_kind: ActivationKind
    gradlite_gate_up_coordinates: Coordinates
    gradlite_down_coordinates: Coordinates
    gradlite_holder: Holder
    gate_up_proj: Tensor
    down_proj: Tensor

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As transformers' experts, whose own code runs where nothing waits for backward."""
        if not torch.is_grad_enabled():
            own: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return own
        reads_x, reads_h = self.gradlite_collectors
        reads_x.reads(hidden_states)
        gate_up = self.gradlite_gate_up_coordinates.trained_with(self.gate_up_proj)
        down = self.gradlite_down_coordinates.trained_with(self.down_proj)
        return subspace_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            StackedWeight(self.gate_up_proj, gate_up, reads_x),
            StackedWeight(self.down_proj, down, reads_h),
            self.gradlite_kind,
            self.gradlite_holder,
        )


class _TwinOperator(nn.Module):
    """A module of one input whose forward pass is an operator of ours wherever something waits for backward."""

    gradlite_holder: Holder

    @torch.compiler.disable
    def forward(self, *arguments: Tensor, **keywords: Tensor) -> Tensor:
        """As the module's own, which runs where nothing waits for backward."""
        given = [value for value in (*arguments, *keywords.values()) if value is not None]
        if not torch.is_grad_enabled() or len(given) != 1:  # a gated norm, say, may be called with and without its gate
            return super().forward(*arguments, **keywords)
        return self._operate(given[0])

    @abstractmethod
    def _operate(self, x: Tensor) -> Tensor:
        """The operator, on the module's one input."""


class TwinNorm(_TwinOperator):
    """A norm that keeps ``x̂``, shared with the layers that read its result."""

    gradlite_kind: NormKind

    def _operate(self, x: Tensor) -> Tensor:
        return norm(x, self._parameters.get("weight"), self._parameters.get("bias"), self.gradlite_kind, self.gradlite_holder)


class TwinActivation(_TwinOperator):
    """An activation that keeps its input only."""

    gradlite_kind: ActivationKind

    def _operate(self, x: Tensor) -> Tensor:
        return activation(x, self.gradlite_kind, self.gradlite_holder)


class TwinGatedMLP(_TwinOperator):
    """A gated MLP that keeps gate and up."""

    gradlite_kind: GatedLayout

    def _operate(self, x: Tensor) -> Tensor:
        layout = self.gradlite_kind
        return gated_forward(self, layout, x, lambda gate, up: gated(gate, up, layout.kind, self.gradlite_holder))


class TwinBlock(nn.Module):
    """A block of which only the input is kept."""

    gradlite_holder: Holder

    @torch.compiler.disable
    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """As the block's own, run again in backward."""
        own = super().forward
        if not torch.is_grad_enabled():
            return own(*arguments, **keywords)
        return replayed(own, arguments, keywords, self.gradlite_holder, getattr(self, CHAIN, None))


class TwinCausalLM(nn.Module):
    """A language model that never makes full logits for its loss."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """As the model's own; where ``labels`` are given, ``logits`` is None in the result."""
        return forward_with_loss(self, super().forward, arguments, keywords)


_BEFORE: dict[str, type[nn.Module]] = {
    "norm": TwinNorm, "activation": TwinActivation, "gated": TwinGatedMLP, "block": TwinBlock, "causal_lm": TwinCausalLM,
    "lora": TwinLoraLinear, "tiled_gated": TwinTiledMLP, "four_bit": TwinFourBitLinear,
}  # fmt: skip
_ALONE: dict[str, type[nn.Module]] = {"experts": TwinExperts}  # a twin with coordinates whose forward pass is all its own
_BEHIND: dict[str, type[nn.Module]] = {"linear": TwinLinear, "embedding": TwinEmbedding}
_TWIN_CLASSES: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def _twin_class(own: type[nn.Module], role: str) -> type[nn.Module]:
    if (own, role) not in _TWIN_CLASSES:
        if role in _BEFORE:
            bases: tuple[type, ...] = (_Twin, _BEFORE[role], own)
        elif role in _ALONE:
            bases = (_ALONE[role], own)
        else:
            twin = _BEHIND[role]
            bases = (_TwinState, twin) if own in (nn.Linear, nn.Embedding) else (_TwinState, own, twin)
        names: dict[str, Any] = {"gradlite_own_class": own, "gradlite_role": role, "__module__": own.__module__}
        if role in _BEFORE:
            names["forward"] = _with_signature_of(own, _BEFORE[role])
        _TWIN_CLASSES[own, role] = type(own.__name__, bases, names)
    return _TWIN_CLASSES[own, role]


def _with_signature_of(own: type[nn.Module], twin: type[nn.Module]) -> Callable[..., Any]:
    """The twin's forward pass with the own signature, which transformers inspects."""

    @functools.wraps(own.forward)
    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        return twin.forward(self, *arguments, **keywords)

    return forward


def _blank_twin(own: type[nn.Module], role: str) -> nn.Module:
    twin = _twin_class(own, role)
    return twin.__new__(twin)


def can_become_twin(module: nn.Module) -> bool:
    """Linear layers, and embeddings whose gradient is the plain look-up's."""
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.sparse and not module.scale_grad_by_freq
    return isinstance(module, nn.Linear)


def become_twin(module: nn.Module, collector: Collector, holder: Holder) -> None:
    """Changes the module's class and registers the coordinates on it."""
    module.__class__ = _twin_class(type(module), "linear" if isinstance(module, nn.Linear) else "embedding")
    module.register_parameter(COORDINATES, collector.coordinates)
    module.gradlite_collectors = (collector,)  # type: ignore[assignment]
    module.gradlite_holder = holder  # type: ignore[assignment]


def become_expert_twin(
    module: nn.Module, collectors: tuple[Collector, Collector], kind: ActivationKind, holder: Holder
) -> None:
    """As :func:`become_twin`, for stacked experts. ``collectors``: of gate and up, and of down."""
    module.__class__ = _twin_class(type(module), "experts")
    for name, collector in zip((GATE_UP_COORDINATES, DOWN_COORDINATES), collectors, strict=True):
        module.register_parameter(name, collector.coordinates)
    module.gradlite_collectors = collectors  # type: ignore[assignment]
    module.gradlite_kind = kind  # type: ignore[assignment]
    module.gradlite_holder = holder  # type: ignore[assignment]


def become_recognised(module: nn.Module, role: str, kind: object, holder: Holder) -> None:
    """Changes the class of a module that has no coordinates of its own. ``role``: a key of the table above."""
    module.__class__ = _twin_class(type(module), role)
    module.gradlite_kind = kind  # type: ignore[assignment]
    module.gradlite_holder = holder  # type: ignore[assignment]


def become_itself(module: nn.Module) -> None:
    """Undoes :func:`become_twin` and :func:`become_recognised`."""
    for name in _REGISTERED:
        module._parameters.pop(name, None)
    for name in ("gradlite_collectors", "gradlite_kind", "gradlite_holder", FRUGAL, CHAIN):
        module.__dict__.pop(name, None)
    own: type[nn.Module] | None = getattr(module, "gradlite_own_class", None)
    if own is not None:
        module.__class__ = own


def refuse_twins(model: nn.Module) -> None:
    """Raises GradLiteError where a part of the model is a twin already: a class stands before a module's own only once."""
    name = next((name for name, module in model.named_modules() if hasattr(type(module), "gradlite_own_class")), None)
    if name is not None:
        raise GradLiteError(
            f"{name or 'the model'} has been changed by gradlite.attach or gradlite.structured_lora already; "
            "call gradlite.detach or gradlite.undo_structured_lora on the model that was given there."
        )
