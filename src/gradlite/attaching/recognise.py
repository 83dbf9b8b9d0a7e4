"""What a module computes, found out by trying it: a name can mislead, numbers cannot.

A module is recognised when its own forward pass, on a few random rows, equals one of the operators of ``gradlite.ops``. What is
not recognised keeps its own code and its own way of waiting for backward.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradlite.ops.activation import ActivationKind, activation_value
from gradlite.ops.experts import experts_value
from gradlite.ops.gated_mlp import gated_value
from gradlite.ops.norm import NormKind, norm_value
from gradlite.ops.precision import wide

_ROWS = 3
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@torch.no_grad()
def _error(own: Callable[[Tensor], Tensor], twin: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite where the module takes no such input."""
    try:
        expected, found = own(x), twin(x)
    except Exception:  # noqa: BLE001 - whatever a strange module raises on rows it was not made for
        return float("inf")
    if not isinstance(expected, Tensor) or expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    scale = wide(expected).abs().max().clamp_min(1e-30)
    return float((wide(expected) - wide(found)).abs().max() / scale)


def is_tried(like: Tensor) -> bool:
    """Whether modules whose weights are such tensors can be tried: numbers of a format that PyTorch computes in."""
    return not like.is_meta and like.dtype in _TOLERANCE


def _rows(width: int, like: Tensor) -> Tensor | None:
    if not is_tried(like):
        return None
    generator = torch.Generator().manual_seed(0)
    return (2.0 * torch.randn(_ROWS, width, generator=generator) + 0.5).to(device=like.device, dtype=like.dtype)


@contextmanager
def _with_other_values(parameters: Iterable[nn.Parameter | None], only_zeros: bool) -> Iterator[None]:
    """Random numbers in the parameters for a moment: with zeros or ones in them many formulas give the same.

    ``only_zeros``: matrices are left alone unless all of them is zero, as before training.
    """
    own = [(one, one.data) for one in parameters if one is not None and not (only_zeros and bool(one.any()))]
    generator = torch.Generator().manual_seed(1)
    try:
        for parameter, data in own:
            width = data.shape[-1]
            spread, middle = (width**-0.5, 0.0) if data.dim() > 1 else (0.5, 1.0)
            values = middle + spread * torch.randn(data.shape, generator=generator)
            parameter.data = values.to(device=data.device, dtype=data.dtype)
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


@contextmanager
def _in_every_mode(module: nn.Module, like: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Its forward pass, which raises ValueError where training changes the result: it may drop by a number of its own.

    Random states stay as they are.
    """
    was_training = module.training

    def forward(x: Tensor) -> Tensor:
        module.training = False
        result: Tensor = module.forward(x)
        module.training = True
        if not torch.equal(result, module.forward(x)):
            raise ValueError("training changes the result")
        return result

    try:
        with torch.random.fork_rng([like.device] if like.device.type == "cuda" else []):
            yield forward
    finally:
        module.training = was_training


def _far_out(x: Tensor, inner: Tensor) -> Tensor:
    """Rows that make ``inner``, which a layer makes of ``x``, as large as a thousand: some models clip it."""
    reach = 100.0 if x.dtype == torch.float16 else 1000.0
    return x * (reach / inner.abs().max().clamp_min(1e-3)).to(x.dtype)


def norm_kind(module: nn.Module, like: Tensor) -> NormKind | None:
    """The norm that ``module`` computes over its last dimension, or None. ``like``: any parameter of the model."""
    if any(True for _ in module.children()) or module._buffers or set(module._parameters) - {"weight", "bias"}:
        return None  # with buffers: a batch norm, which a trial would move
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is not None:
        if weight.dim() != 1 or "Norm" not in type(module).__name__:
            return None
        width, like = weight.shape[0], weight
    else:
        shape = getattr(module, "normalized_shape", None)
        if not isinstance(shape, tuple) or len(shape) != 1:
            return None
        width = shape[0]
    x = _rows(width, like)
    if x is None:
        return None
    x = x * torch.tensor([[1.0], [0.1], [1e-3]], device=x.device, dtype=x.dtype)  # small rows show the epsilon
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), 1e-5)
    if eps is None:  # torch's RMSNorm: the input's machine epsilon
        eps = torch.finfo(x.dtype).eps
    plain = NormKind(float(eps))
    kinds = [
        plain,
        dataclasses.replace(plain, scale_first=True),
        dataclasses.replace(plain, plus_one=True),
        dataclasses.replace(plain, plus_one=True, scale_first=True),
        dataclasses.replace(plain, centred=True),
    ]
    with _with_other_values([weight, bias], only_zeros=False), _in_every_mode(module, like) as own:
        errors = [_error(own, partial(norm_value, weight_N=weight, bias_N=bias, kind=kind), x) for kind in kinds]
        best = min(range(len(kinds)), key=lambda place: errors[place])
        if errors[best] > _TOLERANCE[x.dtype]:
            return None
        twin = partial(norm_value, weight_N=weight, bias_N=bias, kind=kinds[best])
        in_rows = x[None].expand(2, -1, -1)  # where a group norm mixes what lies between batch and width
        return kinds[best] if _error(own, twin, in_rows) <= _TOLERANCE[x.dtype] else None


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is an ``nn.Linear`` that multiplies by its weight, which is a tensor as any other (not quantised)."""
    if not isinstance(module, nn.Linear):
        return False
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or not weight.is_floating_point():
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    x = _rows(module.in_features, weight)
    return (
        x is not None and _error(module.forward, partial(F.linear, weight=weight, bias=module.bias), x) <= _TOLERANCE[x.dtype]
    )


def activation_kind(activation: Callable[[Tensor], Tensor], like: Tensor) -> ActivationKind | None:
    """The activation that a module or function computes element by element, or None."""
    if not is_tried(like):
        return None
    if isinstance(activation, nn.Module):
        if any(True for _ in activation.children()) or activation._parameters or activation._buffers:
            return None
        with _in_every_mode(activation, like) as own:
            return _activation_kind(own, like)
    return _activation_kind(activation, like)


def _activation_kind(activation: Callable[[Tensor], Tensor], like: Tensor) -> ActivationKind | None:
    near = torch.linspace(-6.0, 6.0, 97).to(device=like.device, dtype=like.dtype)[None]
    far = near.new_tensor([[-100.0, -30.0, -10.0, 10.0, 30.0, 100.0]])  # where clipped ones differ
    errors: dict[ActivationKind, float] = {}
    for kind in get_args(ActivationKind):
        twin = partial(activation_value, kind=kind)
        errors[kind] = max(_error(activation, twin, x) for x in (near, far))
    best = min(errors, key=lambda kind: errors[kind])
    return best if errors[best] <= _TOLERANCE[near.dtype] / 8 else None


@dataclasses.dataclass(frozen=True)
class GatedLayout:
    """Names of a gated MLP's parts; ``up`` is None where one layer makes gate and up, in this order."""

    kind: ActivationKind
    gate: str
    up: str | None
    down: str


_LAYOUTS = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", None, "down_proj"), ("w1", "w3", "w2"))


def _is_linear(part: nn.Module | None) -> bool:
    """A linear layer, or one that an adapter wraps (PEFT's name for what it wraps is ``base_layer``)."""
    return isinstance(part, nn.Linear) or isinstance(getattr(part, "base_layer", None), nn.Linear)


def _own_weight(layer: nn.Module) -> nn.Parameter | None:
    """The weight of a linear layer, or of the one inside an adapter; None where it is not numbers as any other (quantised)."""
    weight = getattr(layer, "base_layer", layer)._parameters.get("weight")
    return weight if type(weight) is nn.Parameter and is_tried(weight) else None


def gated_layout(module: nn.Module, like: Tensor) -> GatedLayout | None:
    """The parts of a gated MLP ``down(act(gate(x)) · up(x))``, or None."""
    parts = dict(module.named_children())
    if module._parameters or module._buffers:  # whose gradient a twin would not make
        return None
    for gate, up, down in _LAYOUTS:
        names = [name for name in (gate, up, down) if name is not None]
        if not all(_is_linear(parts.get(name)) for name in names):
            continue
        others = [part for name, part in parts.items() if name not in names]
        kinds = [kind for kind in (activation_kind(part, like) for part in others) if kind is not None]
        x = _rows(parts[gate].in_features, parts[gate].weight)  # type: ignore[arg-type]
        if len(kinds) != 1 or len(others) != 1 or x is None:
            continue
        layout = GatedLayout(kinds[0], gate, up, down)
        twin = partial(gated_forward, module, layout)
        was_training, errors = module.training, []
        with _with_other_values([_own_weight(parts[name]) for name in names], only_zeros=True):
            with torch.no_grad():
                far = _far_out(x, parts[gate](x))
            for module.training in (False, True):  # a module may drop by a number of its own in training
                errors += [_error(module.forward, twin, rows) for rows in (x, far)]
        module.training = was_training
        if max(errors) <= _TOLERANCE[x.dtype]:
            return layout
    return None


def gated_forward(
    module: nn.Module, layout: GatedLayout, x: Tensor, product: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """The MLP's forward pass by its parts. ``product``: makes ``act(gate)·up``."""
    gate = getattr(module, layout.gate)(x)
    gate, up = gate.chunk(2, -1) if layout.up is None else (gate, getattr(module, layout.up)(x))
    h = gated_value(layout.kind, gate, up) if product is None else product(gate, up)
    result: Tensor = getattr(module, layout.down)(h)
    return result


EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
"""What transformers calls the stacked weights of experts, E×2I×N and E×N×I."""


def experts_kind(module: nn.Module) -> ActivationKind | None:
    """The activation of stacked experts ``Σ_k s_k · down_e(act(gate_e(x)) · up_e(x))``, or None where it is something else."""
    parts, weights = list(module.children()), module._parameters
    activation = parts[0] if parts else getattr(module, "act_fn", None)  # LFM2's is a function
    if set(weights) != set(EXPERT_WEIGHTS) or len(parts) > 1 or module._buffers or not callable(activation):
        return None
    gate_up, down = (weights[name] for name in EXPERT_WEIGHTS)
    if gate_up is None or down is None or gate_up.dim() != 3 or down.dim() != 3:
        return None
    if tuple(gate_up.shape) != (len(down), 2 * down.shape[2], down.shape[1]):
        return None
    kind, x = activation_kind(activation, gate_up), _rows(gate_up.shape[2], gate_up)
    if kind is None or x is None:
        return None
    last = len(down) - 1
    index = torch.tensor([[0, last], [last, last // 2], [last // 2, 0]], device=x.device)[:, : len(down)]
    scale = torch.tensor([[0.75, 0.5], [1.0, -0.25], [0.5, 0.125]], device=x.device, dtype=x.dtype)[:, : len(down)]

    def own(rows: Tensor) -> Tensor:
        result: Tensor = module(rows, index, scale)
        return result

    def twin(rows: Tensor) -> Tensor:
        return experts_value(rows, index, scale, gate_up, down, kind)

    was_training, errors = module.training, []
    with _with_other_values([gate_up, down], only_zeros=True):
        far = _far_out(x, x @ gate_up[0].detach().T)
        for module.training in (False, True):
            errors += [_error(own, twin, rows) for rows in (x, far)]
    module.training = was_training
    return kind if max(errors) <= _TOLERANCE[x.dtype] else None
