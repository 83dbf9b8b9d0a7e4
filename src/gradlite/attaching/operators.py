"""Finds the operators of a model whose way of waiting for backward GradLite knows, and gives each its holder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradlite.attaching import attention
from gradlite.attaching.blocks import named_blocks
from gradlite.attaching.causal_lm import can_tile_loss
from gradlite.attaching.holding import HoldPlan, Mode
from gradlite.attaching.recognise import activation_kind, gated_layout, is_tried, norm_kind
from gradlite.attaching.twins import become_itself, become_recognised
from gradlite.hold.holder import Holder
from gradlite.hold.host import Host
from gradlite.hold.mapped_file import MappedFile
from gradlite.hold.noise import Noise
from gradlite.hold.place import HERE
from gradlite.hold.shelf import Shelf
from gradlite.ops.activation import ActivationKind


@dataclass(frozen=True)
class Operator:
    """One recognised module. ``role``: norm, activation, gated, experts, attention, block or causal_lm."""

    name: str
    role: str
    module: nn.Module
    kind: object
    mode: Mode


class Operators:
    """What :func:`recognise` found; ``noise`` is the state that a resumed run needs."""

    def __init__(self, hold: HoldPlan, seed: int) -> None:
        self.plan = hold
        self.noise = Noise(seed)
        self.found: list[Operator] = []
        self._shelf = Shelf()
        self._host = Host()
        self._mapped = MappedFile()
        self._holders: dict[tuple[str, bool], Holder] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if any(operator.role == "attention" for operator in self.found):  # registered by another process, maybe
            attention.register()

    def holder(self, mode: Mode, is_boundary: bool = False) -> Holder:
        """The one holder of this mode, or of what it keeps at a replayed block's boundary; all share what is held."""
        key = mode.name, is_boundary
        if key not in self._holders:
            codec = mode.boundary if is_boundary and mode.boundary is not None else mode.codec
            is_mapped = is_boundary and mode.boundary_is_mapped
            place = self._mapped if is_mapped else self._host if mode.is_on_host else HERE
            self._holders[key] = Holder(codec, self.noise, self._shelf, place, mode.is_projected)
        return self._holders[key]

    def clear_shelf(self) -> None:
        """When a forward pass is over: nobody will ask for what it offered."""
        self._shelf.clear()


def recognise(model: nn.Module, operators: Operators, experts: Mapping[int, ActivationKind]) -> None:
    """Finds the model's operators; changes nothing yet, not even the random state (dropout is tried as well).

    ``experts``: by the module's id, those whose weights are trained in coordinates.
    """
    like = next((parameter for parameter in model.parameters() if is_tried(parameter)), None)
    if like is None:
        return
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        _recognise(model, operators, like, experts)


def _recognise(model: nn.Module, operators: Operators, like: Tensor, experts: Mapping[int, ActivationKind]) -> None:
    taken: set[int] = set()
    asks = attention.asks_the_registry(model)

    def note(name: str, role: str, module: nn.Module, kind: object) -> None:
        taken.add(id(module))
        operators.found.append(Operator(name, role, module, kind, operators.plan.mode_of(name)))

    if can_tile_loss(model):
        note("", "causal_lm", model, None)
    for name, block in named_blocks(model):
        mode = operators.plan.mode_of(name)
        if mode.boundary is not None:
            note(name, "block", block, None)
    for name, module in model.named_modules():
        if id(module) in taken:
            continue
        if id(module) in experts:
            note(name, "experts", module, experts[id(module)])
            taken.update(id(part) for part in module.children())
            continue
        layout = gated_layout(module, like)
        if layout is not None:
            note(name, "gated", module, layout)
            taken.update(id(part) for part in module.children() if not isinstance(part, nn.Linear))
        elif asks and attention.is_attention(module) and not attention.drops_out(module):
            note(name, "attention", module, None)
    for name, module in model.named_modules():
        if id(module) in taken:
            continue
        norm = norm_kind(module, like)
        activation = activation_kind(module, like) if norm is None else None
        if norm is not None:
            note(name, "norm", module, norm)
        elif activation is not None:
            note(name, "activation", module, activation)


def take_over(operators: Operators) -> None:
    """Turns what was found into twins."""
    if any(operator.role == "attention" for operator in operators.found):
        attention.register()
    for operator in operators.found:
        if operator.role == "experts":  # become twins with coordinates
            continue
        holder = operators.holder(operator.mode, is_boundary=operator.role == "block")
        if operator.role == "attention":
            operator.module.gradlite_holder = holder  # type: ignore[assignment]
        else:
            become_recognised(operator.module, operator.role, operator.kind, holder)


def give_back(operators: Operators) -> None:
    """Undoes :func:`take_over`."""
    for operator in operators.found:
        become_itself(operator.module)
