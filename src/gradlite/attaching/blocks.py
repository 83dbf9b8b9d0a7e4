"""Blocks: the repeated layers of a model, which can be replayed in backward instead of keeping anything but their input."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradlite.hold.codec import Codec
from gradlite.hold.holder import Holder


def named_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The members of the outermost ModuleLists that are made of parts and hold weights."""
    outer: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(prefix + ".") for prefix in outer):
            outer.append(name)
            for key, block in module.named_children():
                parts, weights = (any(True for _ in of) for of in (block.children(), block.parameters()))
                if parts and weights and type(block).forward is not nn.Module.forward:
                    yield f"{name}.{key}" if name else key, block


class _Boundary:
    """A block's input: the tensor itself during the forward pass, its leaves until the replay."""

    def __init__(self, hidden: Tensor, holder: Holder) -> None:
        self._hidden: Tensor | None = hidden
        self._holder = holder
        self._shape, self._dtype, self._needs_grad = hidden.shape, hidden.dtype, hidden.requires_grad
        self._leaves: tuple[Tensor, ...] = ()
        self._codec: Codec = holder.codec_for(hidden.shape[-1])

    def put_away(self) -> None:
        """After the forward pass."""
        assert self._hidden is not None
        with torch.no_grad():
            rows = self._hidden.reshape(-1, self._shape[-1])
            self._leaves = tuple(leaf.detach() for leaf in self._holder.encode(rows))
        self._hidden = None

    def get(self) -> Tensor:
        if self._hidden is not None:
            return self._hidden
        with torch.no_grad():
            hidden = self._holder.decode(self._leaves, self._shape[-1], self._dtype).view(self._shape)
        return hidden.requires_grad_(self._needs_grad)


def replayed(block: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], holder: Holder) -> Any:
    """Runs ``block(*arguments, **keywords)``, keeping its first tensor as ``holder`` does and nothing else.

    Through torch's non-reentrant checkpointing, so that random state is kept, hooks run, and the replay ends as soon as all
    that backward needs exists. Keys and values are not collected meanwhile.
    """
    if not arguments and "hidden_states" not in keywords:
        return block(*arguments, **keywords)
    hidden = arguments[0] if arguments else keywords["hidden_states"]
    keywords = {key: value for key, value in keywords.items() if key != "hidden_states" or arguments}
    for key, off in (("past_key_values", None), ("use_cache", False)):
        if key in keywords:
            keywords[key] = off
    boundary = _Boundary(hidden, holder)

    def run(*others: Any) -> Any:
        try:
            return block(boundary.get(), *others, **keywords)
        finally:  # also where the replay ends in the middle
            holder.shelf.clear()

    result = checkpoint(run, *arguments[1:], use_reentrant=False)
    boundary.put_away()
    return result
