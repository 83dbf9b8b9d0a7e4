"""The coverage of what waits for backward: its bytes are the bytes that autograd saves, and what is not known is named."""

from typing import Any

import pytest
import torch
from torch import nn

import gradlite
from gradlite.attaching import attachment_of

BATCH, LENGTH, WIDTH, HEAD = 2, 16, 32, 8
TOKENS = BATCH * LENGTH


def held_by_body(model: nn.Module, held_bytes: Any, ids: torch.Tensor) -> int:
    parameters = [parameter for _, parameter in model.named_parameters()]
    body: Any = model.base_model
    return int(held_bytes(lambda: body(input_ids=ids, use_cache=False).last_hidden_state, parameters))


@pytest.mark.filterwarnings("ignore:hold='int4'")
@pytest.mark.parametrize("hold", ["exact", "int8", "int4", "projected"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3_text"])
def test_bytes_are_what_autograd_saves(family: str, hold: str, build: Any, held_bytes: Any) -> None:
    model = build(family, torch.bfloat16)
    coverage = gradlite.attach(model, rank=8, hold=hold, sample_residual=False)  # type: ignore[arg-type]
    assert not coverage.held.unrecognised
    assert coverage.held.is_loss_tiled
    ids = torch.randint(3, 50, (BATCH, LENGTH))
    if hold == "projected":  # bases come with the first batch
        model(input_ids=ids, labels=ids).loss.backward()
    held = held_by_body(model, held_bytes, ids)
    if family == "phi3" and hold in (
        "exact",
        "projected",
    ):  # v is a view of the fused projection's result, which stays whole for it
        held -= 2 * TOKENS * (WIDTH + WIDTH // 2) * 2
    # Besides: the token ids, and cosines and sines of the positions, which all layers share (Gemma 3 has two sets).
    angles = (2 if family == "gemma3_text" else 1) * 2 * LENGTH * HEAD * 2
    assert held - TOKENS * coverage.held.bytes_per_token - ids.nbytes in range(angles + 1024)


def test_a_replayed_block_counts_its_input_only(build: Any) -> None:
    model = build("llama", torch.bfloat16)
    held = gradlite.attach(model, rank=8, hold={"model.layers.0": "recompute", "model.layers.1": "recompute-int8"}).held
    blocks = {entry.name: entry.bytes_per_token for entry in held.entries if entry.role == "block"}
    assert blocks == {"model.layers.0": 2 * WIDTH, "model.layers.1": WIDTH + 2}  # one group, and its scale
    assert {entry.role for entry in held.entries} == {"block", "norm"}  # the last norm is in no block


def test_what_is_not_recognised_is_named(build: Any) -> None:
    coverage = gradlite.attach(build("gemma2", torch.bfloat16), rank=8)
    assert coverage.held.unrecognised == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert "not recognised, kept as PyTorch keeps it: 2 modules (model.layers.0.self_attn" in str(coverage)


def test_a_configuration_that_tells_no_heads_is_no_hindrance(build: Any, tokens: Any) -> None:
    """Of models whose stages differ."""
    model = build()
    vars(model.config)["num_attention_heads"] = (2, 4)  # past the configuration's own check
    coverage = gradlite.attach(model)
    assert "attention" in str(coverage)
    model(**tokens).loss.backward()


def test_attention_that_drops_is_named(build: Any) -> None:
    """Families have names of their own for the share."""
    model = build("llama", torch.bfloat16)
    model.model.layers[0].self_attn.dropout = nn.Dropout(0.1)
    assert gradlite.attach(model, rank=8).held.unrecognised == ("model.layers.0.self_attn",)


def test_the_text_counts_what_was_found(build: Any) -> None:
    model = build("llama", torch.bfloat16)
    text = str(gradlite.attach(model, rank=8, hold="int8"))
    assert "held for backward, int8: 5 norms, 2 gated MLPs, 2 attentions" in text
    assert "loss: in tiles" in text
    assert attachment_of(model) is not None
