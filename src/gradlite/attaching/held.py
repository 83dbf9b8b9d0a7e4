"""What waits for backward, by the operators' own formulas, and what of a model was not recognised."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from gradlite.attaching.blocks import named_blocks
from gradlite.attaching.operators import Operator, Operators
from gradlite.attaching.rank import layer_rank
from gradlite.attaching.recognise import EXPERT_WEIGHTS, GatedLayout
from gradlite.ops.attention import attention_bytes
from gradlite.ops.gated_mlp import gated_bytes
from gradlite.ops.linear import linear_bytes
from gradlite.ops.norm import norm_bytes

_ROLES = {
    "norm": "norms",
    "gated": "gated MLPs",
    "experts": "stacked experts",
    "attention": "attentions",
    "activation": "activations",
    "block": "blocks",
}
_KNOWN_BY_NAME = ("Norm", "MLP", "Experts", "Attention", "Activation")


@dataclass(frozen=True)
class HeldEntry:
    """One recognised operator. ``bytes_per_token``: that it keeps for backward; None where its width is not known."""

    name: str
    role: str
    mode: str
    bytes_per_token: int | None


@dataclass(frozen=True)
class HeldCoverage:
    """``entries``: recognised operators, without those that a replayed block runs anew. ``unrecognised``: names of modules that
    keep what PyTorch keeps. ``is_loss_tiled``: full logits never exist.
    """

    entries: tuple[HeldEntry, ...]
    unrecognised: tuple[str, ...]
    is_loss_tiled: bool

    @property
    def bytes_per_token(self) -> int:
        """Of all entries whose bytes are known."""
        return sum(entry.bytes_per_token or 0 for entry in self.entries)

    def __str__(self) -> str:
        lines = []
        for mode in dict.fromkeys(entry.mode for entry in self.entries):
            entries = [entry for entry in self.entries if entry.mode == mode]
            counts = {role: sum(entry.role == role for entry in entries) for role in _ROLES}
            parts = ", ".join(f"{count} {_ROLES[role]}" for role, count in counts.items() if count)
            size = sum(entry.bytes_per_token or 0 for entry in entries)
            unknown = sum(entry.bytes_per_token is None for entry in entries)
            note = f", {unknown} of unknown width not counted" if unknown else ""
            where = " in the host's memory" if mode == "host" else ""
            lines.append(f"held for backward, {mode}: {parts}: {size:,} bytes a token{where}{note}")
        if self.unrecognised:
            examples = ", ".join(self.unrecognised[:3]) + (", …" if len(self.unrecognised) > 3 else "")
            lines.append(f"not recognised, kept as PyTorch keeps it: {len(self.unrecognised)} modules ({examples})")
        lines.append("loss: in tiles, full logits never exist" if self.is_loss_tiled else "loss: the model's own")
        return "\n".join(lines)


def held_coverage(model: nn.Module, operators: Operators, itemsize: int, rank: int | float) -> HeldCoverage:
    """Adds up the formulas for activations of ``itemsize`` bytes an element, between two refreshes of the bases."""
    replayed = tuple(operator.name + "." for operator in operators.found if operator.role == "block")
    entries = tuple(
        HeldEntry(operator.name, operator.role, operator.mode.name, _bytes(operator, model, itemsize, rank))
        for operator in operators.found
        if (operator.role != "causal_lm" and not (operator.name + ".").startswith(replayed)) or operator.role == "block"
    )
    known = {id(operator.module) for operator in operators.found}
    gated = [operator.module for operator in operators.found if operator.role in ("gated", "experts")]
    known.update(id(part) for mlp in gated for part in mlp.children())  # the activation, which the operator computes
    tiled = any(operator.role == "causal_lm" for operator in operators.found)
    return HeldCoverage(entries, tuple(_unrecognised(model, known)), tiled)


def _unrecognised(model: nn.Module, known: set[int]) -> Iterator[str]:
    for name, block in named_blocks(model):
        for inner, module in block.named_modules():
            is_part_of_known = any(id(child) in known for child in module.children())
            if type(module).__name__.endswith(_KNOWN_BY_NAME) and id(module) not in known and not is_part_of_known:
                yield f"{name}.{inner}"


def _bytes(operator: Operator, model: nn.Module, itemsize: int, rank: int | float) -> int | None:
    module, codec = operator.module, operator.mode.codec
    if operator.role == "gated":
        assert isinstance(operator.kind, GatedLayout)
        width = _width(getattr(module, operator.kind.gate)) or 0
        return gated_bytes(codec, 1, width if operator.kind.up else width // 2, itemsize)
    if operator.role == "experts":
        down = module._parameters[EXPERT_WEIGHTS[1]]
        chosen = getattr(getattr(model, "config", None), "num_experts_per_tok", None)
        return None if down is None or chosen is None else chosen * gated_bytes(codec, 1, down.shape[2], itemsize)
    if operator.role == "attention":
        sizes = _heads(module)
        if sizes is None:
            return None
        heads, kv_heads, width = sizes
        is_flash = not codec.is_lossy and itemsize > 2
        held = attention_bytes(codec, 1, heads, kv_heads, width, itemsize, is_flash)
        is_projected = operator.mode.is_projected and not is_flash  # flash kernels keep the result themselves
        output_width = layer_rank(rank, heads * width) if is_projected else heads * width
        return held + linear_bytes(codec, 1, output_width, itemsize)
    if operator.role == "norm":
        weight = module._parameters.get("weight")
        width = module.normalized_shape[0] if weight is None else weight.shape[0]  # type: ignore[index,assignment]
        rows = _rows_of_head_norm(model, operator.name, width)
        return rows * norm_bytes(codec, 1, width, itemsize)
    if operator.role == "block":
        hidden = getattr(getattr(model, "config", None), "hidden_size", None)
        return operator.mode.boundary.nbytes(1, hidden, itemsize) if hidden and operator.mode.boundary else None
    return None


def _width(layer: nn.Module) -> int | None:
    return getattr(layer, "out_features", None)


def _heads(attention: nn.Module) -> tuple[int, int, int] | None:
    """Query heads, key-value heads, their width; None where the configuration does not tell: stages may differ."""
    config = attention.config
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    width = width or getattr(config, "hidden_size", 0) // heads
    return (heads, kv_heads, width) if isinstance(kv_heads, int) and isinstance(width, int) and width else None


def _rows_of_head_norm(model: nn.Module, name: str, width: int) -> int:
    """Rows a token: norms of queries and keys work on every head."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if not (hasattr(parent, "config") and hasattr(parent, "is_causal")):
        return 1
    sizes = _heads(parent)
    if sizes is None:
        return 1
    heads, kv_heads, head_width = sizes
    if width != head_width:
        return 1
    return kv_heads if name.rpartition(".")[2].startswith("k") else heads
