"""Models of every family: which operators are recognised, and that a whole model's loss and gradients stay what they were."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradlite.attaching import attachment_of
from gradlite.attaching.holding import HoldMode
from gradlite.attaching.recognise import GatedLayout
from gradlite.ops.norm import NormKind

Build = Callable[..., nn.Module]

RMS, LAYER = NormKind(1e-6), NormKind(1e-5, centred=True)
GATED = GatedLayout("silu", "gate_proj", "up_proj", "down_proj")
GEMMA = (NormKind(1e-6, plus_one=True, scale_first=True), GatedLayout("gelu_tanh", "gate_proj", "up_proj", "down_proj"))
# Norms and gated MLPs or activations of two layers and the end, and what they are; attention, and a loss in tiles.
WANTED: dict[str, tuple[int, Any, str, Any, bool]] = {
    "llama": (5, RMS, "gated", GATED, True),
    "mistral": (5, RMS, "gated", GATED, True),
    "qwen2": (5, RMS, "gated", GATED, True),
    "qwen3": (9, RMS, "gated", GATED, True),
    "smollm3": (5, RMS, "gated", GATED, True),
    "gemma": (5, GEMMA[0], "gated", GEMMA[1], True),
    "gemma2": (9, GEMMA[0], "gated", GEMMA[1], False),  # soft-capped logits: PyTorch's fused attention has no such thing
    "gemma3_text": (13, GEMMA[0], "gated", GEMMA[1], True),
    "phi3": (5, NormKind(1e-5), "gated", GatedLayout("silu", "gate_up_proj", None, "down_proj"), True),
    "phi": (3, LAYER, "activation", "gelu_tanh", True),
    "olmo": (5, LAYER, "gated", GATED, True),
    "olmo2": (9, NormKind(1e-5, scale_first=True), "gated", GATED, True),
    "gpt2": (5, LAYER, "activation", "gelu_tanh", True),
    "gpt_neox": (5, LAYER, "activation", "gelu", True),
    "starcoder2": (5, LAYER, "activation", "gelu_tanh", True),
    "mixtral": (5, NormKind(1e-5), "experts", "silu", True),
    "qwen3_moe": (9, RMS, "experts", "silu", True),
    "olmoe": (9, NormKind(1e-5), "experts", "silu", True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_recognised(family: str, dtype: torch.dtype, build: Build, attached: Callable[..., nn.Module]) -> None:
    """In bfloat16 even the order of roundings; in float32 there is nothing to see of it."""
    num_norms, norm, mlp_role, mlp, with_attention = WANTED[family]
    found = attachment_of(attached(build(family, dtype)))
    assert found is not None
    roles = Counter(operator.role for operator in found.operators.found)
    assert roles == {"causal_lm": 1, "norm": num_norms, mlp_role: 2, **({"attention": 2} if with_attention else {})}
    kinds: dict[str, set[Any]] = {
        role: {operator.kind for operator in found.operators.found if operator.role == role} for role in roles
    }
    assert kinds[mlp_role] == {mlp}
    if dtype == torch.bfloat16:
        assert kinds["norm"] == {norm}
    else:
        assert {(kind.eps, kind.centred, kind.plus_one) for kind in kinds["norm"]} == {(norm.eps, norm.centred, norm.plus_one)}


@pytest.mark.parametrize("hold", ["exact", "recompute"])
def test_float32(
    family: str, hold: HoldMode, build: Build, attached: Any, tokens: dict[str, Tensor], same_gradients: Callable[..., None]
) -> None:
    """With everything recognised: transformers' own loss, and all gradients of autograd."""
    plain = build(family)
    model = attached(plain, hold)
    loss, wanted = model(**tokens).loss, plain(**tokens).loss
    torch.testing.assert_close(loss, wanted, rtol=2e-6, atol=0)
    loss.backward()
    wanted.backward()
    same_gradients(model, plain, 1e-5)


@pytest.mark.parametrize("hold", ["exact", "recompute"])
def test_float64(
    family: str, hold: HoldMode, build: Build, attached: Any, tokens: dict[str, Tensor], same_gradients: Callable[..., None]
) -> None:
    """To ten digits, but for norms that are not recognised in float64 because they compute in float32."""
    plain = build(family, torch.float64)
    model = attached(plain, hold)
    inputs = {key: value for key, value in tokens.items() if key != "labels"}
    logits = plain(**inputs).logits  # transformers' own loss is float32's
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens["labels"][:, 1:].flatten())
    loss = model(**tokens).loss
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    loss.backward()
    wanted.backward()
    same_gradients(model, plain, 1e-9)


@pytest.mark.parametrize("hold", ["int8", "recompute-int8"])
def test_codes(
    family: str, hold: HoldMode, build: Build, attached: Any, tokens: dict[str, Tensor], cosine: Callable[..., float]
) -> None:
    """The loss is not touched, gradients point where they should."""
    plain = build(family)
    model = attached(plain, hold)
    loss, wanted = model(**tokens).loss, plain(**tokens).loss
    if hold == "int8":
        torch.testing.assert_close(loss, wanted, rtol=2e-6, atol=0)
    loss.backward()
    wanted.backward()
    assert 0.99 < cosine(model, plain) < 1 - 1e-9


def test_bfloat16_is_as_good_as_the_models_own(
    family: str, build: Build, attached: Any, tokens: dict[str, Tensor], gradients: Callable[..., dict[str, Tensor]]
) -> None:
    truth = build(family, torch.float32)
    plain = build(family, torch.bfloat16)
    truth.load_state_dict({name: value.float() for name, value in plain.state_dict().items()})
    own, found, of_losses = 0.0, 0.0, torch.zeros(3)
    for order in range(6):  # one batch's error is a matter of luck
        others = (tokens["input_ids"] - 3 + 7 * order) % 47 + 3
        batch = {**tokens, "input_ids": others, "labels": torch.where(tokens["labels"] < 0, tokens["labels"], others)}
        model = attached(plain)
        for each in (truth, plain):
            each.zero_grad()
        losses = [each(**batch).loss for each in (truth, plain, model)]
        for loss in losses:
            loss.backward()
        exact, *rounded = (gradients(each) for each in (truth, plain, model))
        errors = (sum(float((of[name].float() - exact[name]).square().sum()) for name in exact) ** 0.5 for of in rounded)
        own, found = (before + error for before, error in zip((own, found), errors, strict=True))
        of_losses += torch.stack([(loss.detach() - losses[0].detach()).abs().float() for loss in losses])
    # Coordinates are rounded to bfloat16 once more than full gradients, and turned back in bfloat16 here.
    assert found <= 1.5 * own
    assert of_losses[2] <= 1.5 * of_losses[1] + 6 * 2e-3


@pytest.mark.parametrize("hold", ["int8", "recompute", "recompute-int8"])
def test_bfloat16_with_other_ways_of_holding(
    hold: HoldMode, build: Build, attached: Any, tokens: dict[str, Tensor], gradients: Callable[..., dict[str, Tensor]]
) -> None:
    """Against float32: ``recompute`` is as good as exact holding, codes add their rounding to bfloat16's."""
    truth = build("llama", torch.float32)
    plain = build("llama", torch.bfloat16)
    truth.load_state_dict({name: value.float() for name, value in plain.state_dict().items()})
    models = [truth, attached(plain), attached(plain, hold)]
    for each in models:
        each(**tokens).loss.backward()
    exact, usual, found = ({name: grad.float() for name, grad in gradients(each).items()} for each in models)
    if hold == "recompute":
        assert all(torch.equal(found[name], usual[name]) for name in usual)
    a, b = (torch.cat([each[name].flatten().double() for name in exact]) for each in (found, exact))
    assert torch.cosine_similarity(a, b, dim=0) > 0.99
