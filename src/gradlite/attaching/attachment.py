"""Walks a model, turns what it can into twins, and undoes it."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradlite.attaching.blocks import named_blocks
from gradlite.attaching.coverage import Coverage, Entry
from gradlite.attaching.experts import Decision, keep_pairs, stacked_experts
from gradlite.attaching.held import held_coverage
from gradlite.attaching.holding import Hold, HoldPlan
from gradlite.attaching.names import RESIDUAL_NORM
from gradlite.attaching.operators import Operators, give_back, recognise, take_over
from gradlite.attaching.patterns import matches, names_by_parameter
from gradlite.attaching.rank import layer_rank, warn_if_clipped
from gradlite.attaching.recognise import EXPERT_WEIGHTS
from gradlite.attaching.twins import become_expert_twin, become_itself, become_twin, can_become_twin, refuse_twins
from gradlite.errors import GradLiteError
from gradlite.ops.activation import ActivationKind
from gradlite.ops.factors import LookupFactors
from gradlite.subspace.collector import BasisKind, Collector, Coordinates, Window
from gradlite.subspace.feedback import memory_rank

MIN_WIDTH = 16
"""A weight with fewer rows or columns stays plain: its basis would weigh as much as the weight."""

_ATTRIBUTE = "_gradlite_attachment"


class Attachment:
    """What :func:`attach` left on a model. ``projected``: name and weight of every collector, in the window's order."""

    def __init__(self, window: Window, coverage: Coverage, operators: Operators) -> None:
        self.window = window
        self.coverage = coverage
        self.operators = operators
        self.projected: list[tuple[str, nn.Parameter]] = []
        self.modules: list[nn.Module] = []
        self.hooks: list[RemovableHandle] = []
        self.active = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for (name, weight), collector in zip(self.projected, self.window.collectors, strict=True):
            self.absorb_uses_past_the_layer(name, weight, collector)  # copied tensors come without their hooks

    def absorb_uses_past_the_layer(self, name: str, weight: nn.Parameter, collector: Collector) -> None:
        """Sees to it that a full-size gradient, where model code makes one, becomes coordinates as well."""
        self.hooks.append(weight.register_post_accumulate_grad_hook(_DenseAbsorber(name, collector)))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s wrapper."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def attachment_of(model: nn.Module) -> Attachment | None:
    """The model's attachment, or None."""
    return getattr(unwrapped(model), _ATTRIBUTE, None)


def tiles_its_loss(model: nn.Module) -> bool:
    """Whether the model, called with ``labels``, computes its loss without ever making full logits."""
    return any(getattr(module, "gradlite_role", None) == "causal_lm" for module in model.modules())  # PEFT wraps it


def attach(
    model: nn.Module,
    *,
    rank: int | float = 1 / 16,
    basis: BasisKind = "gradient",
    sample_residual: bool = True,
    hold: Hold = "exact",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    seed: int = 0,
) -> Coverage:
    """Attaches coordinates to every linear layer, embedding and stack of experts, in place; says what became of each parameter.

    Afterwards a backward pass leaves ``C.grad = δᵀ(xP)`` (rows × rank) instead of full-size weight gradients. Names,
    values, ``state_dict()`` and saved files are untouched. Attaching again replaces the earlier attachment.

    Args:
        model: any module; frozen parameters stay frozen. rank: a whole number, or a fraction of each layer's input width.
        basis: ``gradient`` (leading singular space, moves), ``activation`` (principal space of the inputs, moves) or
            ``random`` (static). sample_residual: whether backward also samples what the basis misses.
        hold: how tensors wait for backward: ``exact`` (each once), ``int8``, ``int4``, ``projected`` (linear inputs as ``xP``
            where nothing else keeps them), ``host`` (in the host's memory), ``recompute``, ``recompute-int8`` or
            ``recompute-mapped`` (each block's input only: exact, as codes, in a mapped file), or ``{pattern: mode}`` on names
            of modules; the first pattern that matches a module or a parent of it decides.
        include, exclude: patterns (``fnmatch``) on names of parameters or their layers; what is left out is trained plain,
            not frozen.
        seed: of the bases and samples.

    Raises:
        GradLiteError: a bad rank, a pattern that matches nothing, a model without a linear layer that could be projected.
    """
    include = [include] if isinstance(include, str) else include
    exclude = [exclude] if isinstance(exclude, str) else exclude
    model = unwrapped(model)
    detach(model)
    refuse_twins(model)
    names = names_by_parameter(model)
    owners = _owners(model)
    _check_patterns([*(include or ()), *(exclude or ())], list(names.values()))
    experts = stacked_experts(model)
    decisions = {
        id(parameter): _decide(names[id(parameter)], parameter, owners.get(id(parameter), []), experts, include, exclude)
        for parameter in model.parameters()
    }
    keep_pairs(model, experts, decisions)
    chosen: list[tuple[str, nn.Parameter]] = []
    entries: list[Entry] = []
    for name, parameter in model.named_parameters():
        kind, reason = decisions[id(parameter)]
        layer = layer_rank(rank, parameter.shape[-1]) if kind == "projected" else None
        if kind == "projected":
            chosen.append((name, parameter))
        entries.append(Entry(name, kind, reason, layer, parameter.numel(), parameter.nbytes))
    layer_rank(rank, 1)  # a bad rank is named even where nothing can be projected
    if not chosen:
        raise GradLiteError(_why_nothing(model, entries))
    warn_if_clipped(rank, [parameter.shape[-1] for _, parameter in chosen])
    plan = HoldPlan(hold)
    _check_hold(plan, sample_residual, chosen[0][1].device)
    operators = Operators(plan, seed)
    recognise(model, operators, experts)
    module_names = {id(module): name for name, module in model.named_modules()}
    projected = [module_names[id(module)] for _, parameter in chosen for module in owners[id(parameter)]]
    operators.plan.check_used(projected, [name for name, _ in named_blocks(model)])
    window = Window(basis, sample_residual, seed, chosen[0][1])
    take_over(operators)
    coverage = Coverage(tuple(entries), held_coverage(model, operators, chosen[0][1].itemsize, rank))
    attachment = Attachment(window, coverage, operators)
    collectors = {id(parameter): _collect(attachment, name, parameter, rank) for name, parameter in chosen}
    for parameter in (parameter for _, parameter in chosen):
        for module in owners[id(parameter)]:
            if id(module) not in experts:
                holder = operators.holder(plan.mode_of(module_names[id(module)]))
                become_twin(module, collectors[id(parameter)], holder)
                attachment.modules.append(module)
    for module in (module for module in model.modules() if id(module) in experts):
        reads_x, reads_h = (collectors[id(module._parameters[name])] for name in EXPERT_WEIGHTS)
        holder = operators.holder(plan.mode_of(module_names[id(module)]))
        become_expert_twin(module, (reads_x, reads_h), experts[id(module)], holder)
        attachment.modules.append(module)
    attachment.modules[0].register_parameter(RESIDUAL_NORM, attachment.window.residual_norm)
    attachment.hooks.append(model.register_forward_pre_hook(_refuse_if_changed))
    attachment.hooks.append(model.register_forward_hook(_clear_shelf, always_call=True))
    object.__setattr__(model, _ATTRIBUTE, attachment)
    return attachment.coverage


def detach(model: nn.Module) -> nn.Module:
    """Gives the model back with its own classes and bit-identical weights; returns it. Nothing happens if not attached."""
    model = unwrapped(model)
    attachment = attachment_of(model)
    if attachment is not None:
        for handle in attachment.hooks:
            handle.remove()
        for module in attachment.modules:
            become_itself(module)
        give_back(attachment.operators)
        attachment.active = False
        object.__delattr__(model, _ATTRIBUTE)
    return model


def check_unchanged(model: nn.Module) -> None:
    """Raises GradLiteError if parameters were resized, added or removed since attaching: they would be trained wrongly."""
    attachment = attachment_of(model)
    if attachment is None:
        return
    then, now = attachment.coverage.num_elements(), sum(parameter.numel() for parameter in model.parameters())
    weights = {id(weight) for _, weight in attachment.projected}
    names = ("weight", *EXPERT_WEIGHTS)
    for module in attachment.modules:
        if any(name in module._parameters and id(module._parameters[name]) not in weights for name in names):
            raise GradLiteError(
                f"a weight of {type(module).__name__} was replaced by another tensor after GradLite had been attached "
                "(load_state_dict(assign=True) does so); load before attaching, or build the optimizer anew."
            )
    if now != then:
        raise GradLiteError(
            f"{type(unwrapped(model)).__name__} had {then:,} parameters when GradLite was attached and has {now:,} now; "
            "resize the token embeddings (or whatever was changed) before attaching, or build the optimizer anew."
        )


@torch.compiler.disable
def _refuse_if_changed(model: nn.Module, _inputs: tuple[Any, ...]) -> None:
    if torch.is_grad_enabled():
        check_unchanged(model)


@torch.compiler.disable
def _clear_shelf(model: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
    """After a forward pass autograd alone decides how long held tensors live."""
    attachment = attachment_of(model)
    if attachment is not None:
        attachment.operators.clear_shelf()


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    return owners


def _decide(
    names: Sequence[str],
    parameter: nn.Parameter,
    owners: list[nn.Module],
    experts: Mapping[int, ActivationKind],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> Decision:
    if not parameter.requires_grad:
        return "frozen", "requires_grad is off"
    is_stacked = all(id(owner) in experts for owner in owners)
    if parameter.dim() > 2 and not is_stacked:
        return "plain", f"{parameter.dim()}-dimensional tensor of {type(owners[0]).__name__}, such as stacked experts"
    if not parameter.is_floating_point() or parameter.dim() < 2:
        return "plain", "norms, biases and other tensors that are no matrix"
    is_layers = all(can_become_twin(owner) and owner._parameters.get("weight") is parameter for owner in owners)
    if not (is_stacked or is_layers):
        return "plain", f"matrix of {type(owners[0]).__name__}, which is neither a linear layer nor a plain look-up"
    if min(parameter.shape[:-1].numel(), parameter.shape[-1]) < MIN_WIDTH:
        return "plain", f"matrix with a side below {MIN_WIDTH}"
    if include is not None and not matches(names, include):
        return "plain", "not included"
    if exclude is not None and matches(names, exclude):
        return "plain", "excluded"
    return "projected", "stacked experts" if is_stacked else "linear layers and embeddings"


def _check_patterns(patterns: Sequence[str], names: Sequence[Sequence[str]]) -> None:
    for pattern in patterns:
        if not any(matches(own, [pattern]) for own in names):
            raise GradLiteError(
                f"the pattern {pattern!r} matches no parameter or layer; names look like "
                f"{' or '.join(map(repr, names[0][:2]))}, and * stands for anything."
            )


def _check_hold(plan: HoldPlan, sample_residual: bool, device: torch.device) -> None:
    if plan.names("projected") and sample_residual:
        raise GradLiteError(
            'hold="projected" keeps no inputs from which the residual could be sampled; use feedback="off" '
            '(in gradlite.attach: sample_residual=False) or hold="int8".'
        )
    if plan.names("host") and device.type == "cpu":
        warnings.warn(
            'hold="host" gains nothing for a model on a CPU, which is in the host memory already; it does what "exact" does.',
            stacklevel=4,
        )


def _why_nothing(model: nn.Module, entries: Sequence[Entry]) -> str:
    reasons = sorted({entry.reason for entry in entries})
    found = "; ".join(reasons) if reasons else "it has no parameters"
    return f"{type(model).__name__} has no linear layer that GradLite could project ({found}); nothing was attached."


def _collect(attachment: Attachment, name: str, weight: nn.Parameter, rank: int | float) -> Collector:
    """The weight's collector, and what sees to it that no gradient passes it by."""
    layer = layer_rank(rank, weight.shape[-1])
    rows, width = weight.shape[:-1].numel(), weight.shape[-1]
    collector = Collector(attachment.window, rows, width, layer, memory_rank(layer), weight)
    attachment.projected.append((name, weight))
    attachment.absorb_uses_past_the_layer(name, weight, collector)
    return collector


class _DenseAbsorber:
    """Takes a full-size gradient that model code made past the twin (``F.linear(x, layer.weight)``) into coordinates."""

    def __init__(self, name: str, collector: Collector) -> None:
        self.name = name
        self.collector = collector
        self.warned = False

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> None:
        if weight.grad is None:  # the twin's operator returns no gradient for the weight, and autograd calls all the same
            return
        if not self.warned:
            warnings.warn(
                f"{self.name} is used outside its layer, so its full gradient is made for a moment in every backward pass.",
                stacklevel=1,
            )
            self.warned = True
        rows = torch.arange(self.collector.rows, device=weight.device)
        coordinates: Coordinates = self.collector.coordinates
        gradient_MR = self.collector(LookupFactors(rows, weight.grad.flatten(0, -2), self.collector.rows))
        weight.grad = None
        coordinates.grad = gradient_MR if coordinates.grad is None else coordinates.grad + gradient_MR
