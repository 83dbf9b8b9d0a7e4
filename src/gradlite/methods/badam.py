"""BAdam: AdamW on one transformer layer at a time (Luo et al., arXiv 2404.02827).

Every ``switch_block_every`` steps another block's weights are made trainable and copied to float32; AdamW steps on the copies,
and its state starts anew. Gradients and state exist for the active block only.

The authors' package, badam 1.4, over ``torch.optim.AdamW``. What is adapted here:

- its ``state_dict`` is the inner optimizer's alone, without the float32 copies, the active block or the order of the blocks.
- it prints a line at every switch, whatever ``verbose`` says, and warns of float32 weights; both are held back.
- inactive blocks are left with ``requires_grad`` off; ``finish()`` puts it back.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from gradlite.errors import GradLiteError
from gradlite.methods.method import Betas, Claims, Count, Epsilon, Method, Rate, trainable
from gradlite.methods.packages import require


def badam(
    model: nn.Module,
    lr: Rate,
    *,
    switch_block_every: Count = 100,
    switch_mode: Literal["random", "ascending", "descending"] = "random",
    include_embedding: bool = False,
    include_lm_head: bool = False,
    betas: Betas = (0.9, 0.999),
    eps: Epsilon = 1e-8,
    weight_decay: Rate = 0.0,
    checkpointing: bool = False,
) -> "BAdam":
    """``badam.BlockOptimizer`` with the interval and order of the usage in the authors' README. They recommend an interval of
    n/(BD) steps, but 50 to 100 (n examples, batches of B, D blocks). Embedding, final norm and head are no block and never
    change, unless ``include_embedding`` and ``include_lm_head``.
    """
    package = require("badam", "badam", "badam")
    named = trainable(model)
    base = torch.optim.AdamW([parameter for _, parameter in named], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    with _quiet():
        blocks = package.BlockOptimizer.infer_param_groups(
            None, [name for name, _ in named], include_embedding, include_lm_head
        )
        if include_lm_head and not include_embedding:  # the package puts embeddings into the head's block then
            embeddings = _embeddings(model)
            blocks[-1] = [name for name in blocks[-1] if name not in embeddings]
        if not any(blocks):
            raise GradLiteError(f"method 'badam' finds no 'layers.0', 'layers.1', … in {type(model).__name__}, its blocks.")
        optimizer = package.BlockOptimizer(
            base_optimizer=base,
            named_parameters_list=named,
            block_prefix_list=blocks,
            switch_block_every=switch_block_every,
            switch_mode=switch_mode,
            verbose=0,
        )
    claims = Claims(full_parameter=include_embedding and include_lm_head, accumulation=True, clipping=True)
    return BAdam("badam", model, optimizer, claims, checkpointing=checkpointing)


def _embeddings(model: nn.Module) -> set[str]:
    """Names of embeddings by the package's pattern, but for one that is the head's weight, too."""
    heads = [parameter for name, parameter in model.named_parameters(remove_duplicate=False) if "lm_head" in name]
    named = ((name, parameter) for name, parameter in trainable(model) if re.search(r"embed[^.]*\.", name))
    return {name for name, parameter in named if not any(parameter is head for head in heads)}


class BAdam(Method):
    """The block optimizer, quiet, and with all of its state saved."""

    optimizer: Any

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._unfrozen = [parameter for _, parameter in self.optimizer.named_parameters_list]

    def step(self) -> None:
        with _quiet():
            super().step()

    def state_dict(self) -> dict[str, Any]:
        optimizer = self.optimizer
        active = optimizer.block_prefix_list.index(optimizer.active_param_prefixs)
        return {
            **super().state_dict(),
            "copies": {index: copy.detach() for index, copy in optimizer.param_idx2hp.items()},
            "active_block": active,
            "next_block": optimizer.current_block_idx,
            "block_order": list(getattr(optimizer, "block_order", [])),
            "global_step": optimizer.global_step,
            "param_groups": [
                {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        optimizer = self.optimizer
        optimizer.current_block_idx = state["active_block"]
        with _quiet(), torch.random.fork_rng(devices=[]):  # the switch may draw a new order
            optimizer.switch_trainable_params()
        for index, copy in state["copies"].items():
            optimizer.param_idx2hp[index].data.copy_(copy)
        super().load_state_dict(state)
        optimizer.current_block_idx = state["next_block"]
        optimizer.block_order = list(state["block_order"])
        optimizer.global_step = int(state["global_step"])
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            group.update(saved)

    def finish(self) -> nn.Module:
        for parameter in self._unfrozen:
            parameter.requires_grad_(True)
        return super().finish()

    def trained(self) -> list[nn.Parameter]:
        prefixes = [prefix for block in self.optimizer.block_prefix_list for prefix in block]
        named = self.optimizer.named_parameters_list
        return [parameter for name, parameter in named if any(prefix in name for prefix in prefixes)]

    def _state(self) -> Any:
        return [self.optimizer.base_optimizer.state, self.optimizer.param_idx2hp]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="BAdam expect model to be loaded in fp16/bf16 precision")
        yield
