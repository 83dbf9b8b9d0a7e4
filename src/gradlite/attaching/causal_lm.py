"""Causal language models whose loss is computed in tiles over the vocabulary head: full logits never exist."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradlite.attaching.names import COORDINATES
from gradlite.ops.frozen_head import frozen_head_cross_entropy
from gradlite.ops.loss import LossKind, tiled_cross_entropy
from gradlite.subspace.collector import Coordinates

MODEL_TYPES = frozenset(
    "gemma gemma2 gemma3_text gpt2 gpt_neox llama mistral mixtral olmo olmo2 olmo3 olmoe phi phi3 qwen2 qwen2_moe qwen3 "
    "qwen3_moe smollm3 starcoder2".split()
)
"""Whose logits are the head's product with the body's last hidden state, soft-capped if the config says so; see the tests."""


def can_tile_loss(model: nn.Module) -> bool:
    """Whether the model is one of :data:`MODEL_TYPES`, with a head, and a language model's own loss."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in MODEL_TYPES or not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return False
    if not model.forward.__module__.startswith("transformers."):  # a user's own, which may do anything with the logits
        return False
    head = model.get_output_embeddings()  # type: ignore[operator]
    own_class = getattr(type(head), "gradlite_own_class", type(head))
    is_plain = isinstance(head, nn.Linear) and own_class.forward is nn.Linear.forward
    return is_plain and "labels" in inspect.signature(model.forward).parameters


def forward_with_loss(model: Any, own_forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """The model's forward pass; with ``labels`` the loss comes from tiles, and ``logits`` is None."""
    bound = inspect.signature(own_forward).bind_partial(*arguments, **keywords).arguments
    given = {**bound.pop("kwargs", {}), **bound}
    labels = given.pop("labels", None)
    usual = given.get("return_dict") is not False and _is_default(given.get("logits_to_keep")) and _has_usual_loss(model)
    head = model.get_output_embeddings()
    balances = given.get("output_router_logits")  # then the model's own loss has a second part
    balances = getattr(model.config, "output_router_logits", False) if balances is None else balances
    balancing_loss: Any = getattr(sys.modules[own_forward.__module__], "load_balancing_loss_func", None)
    usual = usual and not (balances and balancing_loss is None)
    usual = usual and not head._forward_hooks and not head._forward_pre_hooks  # which want to see the logits, or change them
    if labels is None or not usual:
        return own_forward(*arguments, **keywords)
    own_loss = {
        key: given.pop(key) for key in ("num_items_in_batch", "ignore_index", "shift_labels", "label_smoothing") if key in given
    }
    given.pop("logits_to_keep", None)
    if given.get("use_cache") is None and torch.is_grad_enabled():
        given["use_cache"] = False  # the config's default would keep every layer's keys and values
    if balances:
        given["output_router_logits"] = True
    outputs = model.base_model(**given)
    loss, of_routers = causal_lm_loss(model, outputs[0], labels, **own_loss), {}
    if balances:
        routers = outputs.router_logits
        balance = balancing_loss(routers, model.num_experts, model.num_experts_per_tok, given.get("attention_mask"))
        loss = loss + model.router_aux_loss_coef * balance.to(loss.device)
        of_routers = {"router_logits": routers, "aux_loss": balance}
    from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast, MoeModelOutputWithPast

    result = MoeCausalLMOutputWithPast if isinstance(outputs, MoeModelOutputWithPast) else CausalLMOutputWithPast
    return result(
        loss=loss,
        past_key_values=outputs.get("past_key_values"),
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
        **of_routers,
    )


def _has_usual_loss(model: Any) -> bool:
    """Users may give a model a loss of their own."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return model.loss_function is ForCausalLMLoss


def _is_default(logits_to_keep: Any) -> bool:
    return logits_to_keep is None or (isinstance(logits_to_keep, int) and logits_to_keep == 0)


@torch.compiler.disable
def causal_lm_loss(
    model: Any,
    hidden: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """As transformers' ``ForCausalLMLoss``: mean over the labelled tokens, or their sum over ``num_items_in_batch``."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    labels_T = shift_labels.reshape(-1).to(hidden.device)
    h_TN = hidden.reshape(-1, hidden.shape[-1])
    counts_T = labels_T != ignore_index
    count = counts_T.sum()
    head = model.get_output_embeddings()
    (collector,) = getattr(head, "gradlite_collectors", (None,))
    if collector is not None:
        collector.reads(hidden)
    place_T = counts_T.nonzero().squeeze(1)
    if len(place_T) < len(labels_T):
        h_TN, labels_T = h_TN.index_select(0, place_T), labels_T[place_T]
    coordinates = head._parameters.get(COORDINATES)
    if isinstance(coordinates, Coordinates):
        coordinates = coordinates.trained_with(head.weight)
    kind = LossKind(getattr(model.config, "final_logit_softcapping", None) or 0.0, label_smoothing)
    is_trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    if h_TN.requires_grad and torch.is_grad_enabled() and not is_trained:
        total = frozen_head_cross_entropy(h_TN, head.weight, head.bias, labels_T, kind)
    else:
        total = tiled_cross_entropy(
            h_TN, head.weight, head.bias, labels_T, coordinates_VR=coordinates, measure=collector, kind=kind
        )
    return total / (count if num_items_in_batch is None else num_items_in_batch)
