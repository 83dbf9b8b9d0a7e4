"""Blocks: the repeated layers of a model, which can be replayed in backward instead of keeping anything but their input."""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gradlite.errors import GradLiteError
from gradlite.hold.codec import Codec
from gradlite.hold.holder import Holder
from gradlite.ops.random_state import random_state, restored


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

    def __init__(self, hidden: Tensor, holder: Holder, source: "_Replay | None" = None) -> None:
        self._hidden: Tensor | None = hidden
        self._source = source  # makes the tensor anew, in the place of leaves
        self._holder = holder
        self._is_coded = hidden.is_floating_point()  # not token ids
        self._shape, self._dtype, self._needs_grad = hidden.shape, hidden.dtype, hidden.requires_grad
        self._leaves: tuple[Tensor, ...] = ()
        self._versions: list[int] = []
        self._codec: Codec = holder.codec_for(hidden.shape[-1])

    def put_away(self) -> None:
        """After the forward pass."""
        assert self._hidden is not None
        if self._source is not None:
            self._hidden = None
            return
        with torch.no_grad():
            rows = self._hidden.reshape(-1, self._shape[-1])
            leaves = self._holder.encode(rows) if self._is_coded else (rows,)
            self._leaves = tuple(leaf.detach() for leaf in leaves)
        self._versions = [leaf._version for leaf in self._leaves]
        self._hidden = None

    def get(self) -> Tensor:
        if self._hidden is not None:
            return self._hidden
        if self._source is not None:
            return self._source.result_again().requires_grad_(self._needs_grad)
        if [leaf._version for leaf in self._leaves] != self._versions:  # a leaf may be the tensor itself
            raise GradLiteError(
                "the input of a block that is computed again in backward was changed in place after the block had run; "
                "train this model with hold='exact'."
            )
        with torch.no_grad():
            rows = self._holder.decode(self._leaves, self._shape[-1], self._dtype) if self._is_coded else self._leaves[0]
            hidden = rows.view(self._shape)
        return hidden.requires_grad_(self._needs_grad)


class _Replay:
    """One block's run, which can be made again for its result. Nothing is kept of it but ``boundary``."""

    def __init__(self, run: Callable[[], Any], boundary: _Boundary, is_random: bool, device: torch.device) -> None:
        self._run = run
        self._device = device
        self._state = random_state(device) if is_random else None
        self._result: weakref.ref[Tensor] | None = None
        self._version = 0
        self.boundary = boundary

    def ended(self, result: Any) -> None:
        """Remembers which tensor came of it."""
        self._result, self._version = weakref.ref(_first(result)), _first(result)._version

    def made(self, hidden: Tensor) -> bool:
        """Whether this tensor came of it, and nobody has changed it since."""
        return self._result is not None and self._result() is hidden and hidden._version == self._version

    def result_again(self) -> Tensor:
        """With gradients, so that the operators round as they did, but what they save is dropped at once."""
        with torch.enable_grad(), saved_tensors_hooks(_drop, _never), restored(self._state, self._device):
            return _first(self._run()).detach()


class Chain:
    """Lets every second block of a model keep nothing: its input is made anew by the block before it, which is kept.

    Half the memory of all blocks' inputs, for half a forward pass of the blocks.
    """

    def __init__(self) -> None:
        self.kept: _Replay | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"kept": None}

    def clear(self) -> None:
        """When a forward pass is over."""
        self.kept = None


def _drop(_: Tensor) -> None:
    return None


def _never(_: Any) -> Tensor:
    raise AssertionError("nothing goes backward through a run that was made for its result")


def _first(result: Any) -> Tensor:
    first: Tensor = result if isinstance(result, Tensor) else result[0]
    return first


def _without_cache(block: nn.Module, argument: Any) -> Any:
    """None in the place of an empty cache. Raises GradLiteError for one with keys and values of earlier tokens."""
    from transformers.cache_utils import Cache

    if not isinstance(argument, Cache):
        return argument
    layers = (getattr(part, "layer_idx", None) for part in block.modules())
    if int(argument.get_seq_length(next((layer for layer in layers if isinstance(layer, int)), 0))):
        raise GradLiteError(
            "a block that is computed again in backward cannot read keys and values of earlier tokens; "
            "train without past_key_values, or with hold='exact'."
        )
    return None


def replayed(
    block: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], holder: Holder, chain: Chain | None = None
) -> Any:
    """Runs ``block(*arguments, **keywords)``, keeping its first tensor as ``holder`` does and nothing else.

    Through torch's non-reentrant checkpointing, so that random state is kept, hooks run, and the replay ends as soon as all
    that backward needs exists. Keys and values are not collected meanwhile: the replay would append them a second time. With a
    ``chain``, nothing is kept where the block before this one can make the tensor anew.
    """
    if not arguments and "hidden_states" not in keywords:
        return block(*arguments, **keywords)
    hidden = arguments[0] if arguments else keywords["hidden_states"]
    keywords = {key: value for key, value in keywords.items() if key != "hidden_states" or arguments}
    arguments = tuple(_without_cache(block.__self__, argument) for argument in arguments)
    keywords = {key: _without_cache(block.__self__, value) for key, value in keywords.items()}
    if "use_cache" in keywords:
        keywords["use_cache"] = False
    source = chain.kept if chain is not None and chain.kept is not None and chain.kept.made(hidden) else None
    boundary = _Boundary(hidden, holder, source)

    def run(_: Any, *others: Any) -> Any:
        holder.shelf.clear()  # what the forward pass found there must not be missing in the replay
        try:
            return block(boundary.get(), *others, **keywords)
        finally:  # also where the replay ends in the middle
            holder.shelf.clear()

    if chain is not None:
        is_training = block.__self__.training  # so that it may drop: not only modules do
        chain.kept = (
            _Replay(partial(run, None, *arguments[1:]), boundary, is_training, hidden.device) if source is None else None
        )
    # The first argument tells checkpoint which device's random state to keep: it looks at positional tensors alone.
    result = checkpoint(run, hidden.new_empty(0), *arguments[1:], use_reentrant=False)
    if chain is not None and chain.kept is not None:
        chain.kept.ended(result)
    boundary.put_away()
    return result
