"""How long a model's texts can be: where positions are rows of a table, what lies beyond has none."""

import re

from torch import nn

_NAMES = re.compile(r"(^|\.)(wpe|[a-z_]*position[a-z_]*)$")


def num_positions(model: nn.Module) -> int | None:
    """Tokens that a model with learned positions (GPT-2, OPT) takes; None for models that compute positions, as RoPE's do."""
    has_table = any(isinstance(module, nn.Embedding) and _NAMES.search(name) for name, module in model.named_modules())
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found if has_table and isinstance(found, int) else None
