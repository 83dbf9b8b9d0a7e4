"""Packed rows are for models that keep their examples apart, and for no others."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gradlite.errors import GradLiteError
from gradlite.train.packing import check_packing

GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4}
WIDTHS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**WIDTHS, "intermediate_size": 48},
    "gpt2": GPT,
    "opt": {**WIDTHS, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    ids = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **MODELS[name], **ids)).to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_that_can(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype).train()
    check_packing(model)
    assert model.training


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_models_that_cannot(name: str) -> None:
    with pytest.raises(GradLiteError, match=r"does not keep packed examples apart.*leave out --packing"):
        check_packing(build(name))
