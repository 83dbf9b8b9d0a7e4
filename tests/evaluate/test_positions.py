"""How long a text a model takes."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from gradlite.evaluate.positions import num_positions


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_table_of_positions_has_an_end(kind: str) -> None:
    """As many tokens as are told can be read, and no more."""
    small: Any = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = (
        GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1, n_positions=24))
        if kind == "gpt2"
        else OPTForCausalLM(OPTConfig(**small, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=24))
    )
    known = num_positions(model)
    assert known == 24
    model(torch.ones(1, known, dtype=torch.long))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.ones(1, known + 1, dtype=torch.long))


def test_computed_positions_have_none() -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=24,
    )
    assert num_positions(LlamaForCausalLM(config)) is None
