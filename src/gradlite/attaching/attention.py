"""Puts GradLite's attention into transformers models through transformers' own registry of attention functions.

It takes the place of ``sdpa``, and hands on to transformers' function whatever is not marked with a holder. A name of its own
would not do: some models ask for the name and build other masks for what they do not know.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from gradlite.ops.attention import attention

_REPLACED = "sdpa"
HOLDER = "gradlite_holder"
FRUGAL = "gradlite_is_frugal"


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers' ``sdpa_attention_forward``, which also takes whatever this operator does not offer."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    holder = getattr(module, HOLDER, None)
    unusual = any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    unusual = unusual or (attention_mask is not None and attention_mask.requires_grad)
    if holder is None or unusual or dropout > 0.0 or not query.requires_grad or query.shape[2] == 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return _held(
        query,
        key,
        value,
        attention_mask,
        attention_mask is None and bool(causal),
        scale,
        holder,
        getattr(module, FRUGAL, False),
    ), None


@torch.compiler.disable
def _held(*arguments: Any) -> Tensor:
    """A compiled model calls it as it is: graphs must not cache what is held."""
    return attention(*arguments)


def register() -> None:
    """Makes transformers call :func:`_forward` where it would call its function for ``sdpa``."""
    from transformers import AttentionInterface

    AttentionInterface.register(_REPLACED, _forward)


def asks_the_registry(model: nn.Module) -> bool:
    """Whether it is a model of transformers whose attention layers look their function up by name."""
    if "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel) and bool(model._can_set_attn_implementation())


def drops_out(module: nn.Module) -> bool:
    """Whether an attention layer drops probabilities in training, which the operator does not offer."""
    for name in ("attention_dropout", "attn_dropout", "dropout", "dropout_p", "dropout_prob"):
        dropout = getattr(module, name, 0.0)
        share = dropout.p if isinstance(dropout, nn.Dropout) else dropout
        if isinstance(share, (int, float)) and share > 0:
            return True
    return False


def is_attention(module: nn.Module) -> bool:
    """Whether a module calls the registry for ``sdpa``: transformers' attention layers are named so and carry these marks."""
    if not (type(module).__name__.endswith("Attention") and hasattr(module, "config") and hasattr(module, "is_causal")):
        return False
    return getattr(module.config, "_attn_implementation", None) == _REPLACED
