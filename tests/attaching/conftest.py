"""Small random models of the families that attaching knows, and what their tests compare."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradlite
from gradlite.attaching import attachment_of

_COMMON: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_NO_DROPOUT: dict[str, Any] = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 4, "head_dim": 8},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "smollm3": _GROUPED,
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {**_GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "phi3": _GROUPED,
    "phi": {},
    "olmo": {},
    "olmo2": _GROUPED,
    "gpt2": _NO_DROPOUT,
    "gpt_neox": {},
    "starcoder2": _GROUPED,
    "mixtral": {**_GROUPED, "num_local_experts": 4},
    "qwen3_moe": {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}

Build = Callable[..., nn.Module]


@pytest.fixture(params=_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture
def build() -> Build:
    """``build("llama", dtype, **changes)``: a model in training mode, the same one every time."""

    def make(name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **{**_COMMON, **_FAMILIES.get(name, _GROUPED), **changes})
        model: nn.Module = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # norms that are no ones, biases that are no zeros
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        if dtype == torch.float64:  # which the grouped products of experts do not know
            model.config._experts_implementation = "eager"  # type: ignore[union-attr]
        return model.to(dtype).train()

    return make


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    """Two sequences of nine tokens, the second padded on the right; the first two tokens of each are no target."""
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    found = attachment_of(model)
    if found is None:
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    plain = {entry.name for entry in found.coverage.entries if entry.kind == "plain"}
    gradients = {name: p.grad for name, p in model.named_parameters() if name in plain and p.grad is not None}
    for (name, weight), collector in zip(found.projected, found.window.collectors, strict=True):
        grad, matrix = collector.coordinates.grad, collector.basis.matrix_NR
        if grad is not None:
            assert matrix is not None
            gradients[name] = (grad @ matrix.T).view(weight.shape)
    return gradients


@pytest.fixture
def gradients() -> Callable[[nn.Module], dict[str, Tensor]]:
    """All gradients by name, those of coordinates at full rank as the weights'."""
    return _gradients


@pytest.fixture
def attached() -> Callable[..., nn.Module]:
    """A copy of a model, attached at full rank, where coordinates lose nothing: ``attached(model, hold="int8")``."""

    def attach(model: nn.Module, hold: Any = "exact") -> nn.Module:
        model = copy.deepcopy(model)
        gradlite.attach(model, rank=1.0, basis="random", hold=hold)
        return model

    return attach


@pytest.fixture
def same_gradients() -> Callable[..., None]:
    """``same_gradients(model, other, tolerance)``: of every parameter, relative to the norm of its own."""

    def check(model: nn.Module, other: nn.Module, tolerance: float) -> None:
        found, wanted = _gradients(model), _gradients(other)
        assert found.keys() == wanted.keys()
        for name, exact in wanted.items():
            assert found[name].dtype == exact.dtype
            assert (found[name] - exact).norm() <= tolerance * exact.norm(), name

    return check


@pytest.fixture
def cosine() -> Callable[[nn.Module, nn.Module], float]:
    """Of all gradients of two models."""

    def compute(model: nn.Module, other: nn.Module) -> float:
        found, wanted = _gradients(model), _gradients(other)
        assert found.keys() == wanted.keys()
        a, b = (torch.cat([each[name].flatten().double() for name in wanted]) for each in (found, wanted))
        return float(torch.cosine_similarity(a, b, dim=0))

    return compute
