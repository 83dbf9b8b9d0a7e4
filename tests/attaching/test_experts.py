"""Models with stacked experts: what becomes of them, and that training follows AdamW where the basis is all of the space."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradlite
from gradlite.attaching import attachment_of, twins
from gradlite.attaching.recognise import experts_kind
from gradlite.train.loss import summed_loss

Build = Callable[..., nn.Module]
SHARED: dict[str, Any] = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 4}
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture
def mixture(build: Build) -> nn.Module:
    """A Qwen2-MoE, with an expert for all beside those that tokens choose."""
    return build("qwen2_moe", **SHARED, num_experts_per_tok=2)


def test_all_but_routers_and_vectors_is_projected(mixture: nn.Module, tokens: dict[str, Tensor]) -> None:
    names, state = [name for name, _ in mixture.named_parameters()], mixture.state_dict().keys()
    coverage = gradlite.attach(mixture, rank=4)
    by_name = {entry.name: entry for entry in coverage.entries}
    assert list(by_name) == names
    assert {by_name[f"{EXPERTS}.{weight}"].kind for weight in ("gate_up_proj", "down_proj")} == {"projected"}
    assert {
        entry.name.rpartition(".")[0] for entry in coverage.entries if entry.kind == "plain" and entry.num_elements > 64
    } == {f"model.layers.{layer}.mlp.gate" for layer in (0, 1)}
    assert "2 stacked experts" in str(coverage)
    assert "not recognised" not in str(coverage)
    assert "loss: in tiles" in str(coverage)
    assert mixture.state_dict().keys() == state
    gradlite.detach(mixture)
    assert type(mixture.get_submodule(EXPERTS)).__name__ == "Qwen2MoeExperts"
    assert [name for name, _ in mixture.named_parameters()] == names


@pytest.mark.parametrize("hold", ["exact", "recompute", "int8"])
def test_gradients(
    hold: Any, mixture: nn.Module, attached: Any, tokens: dict[str, Tensor], same_gradients: Any, cosine: Any
) -> None:
    model = attached(mixture, hold)
    loss, wanted = model(**tokens).loss, mixture(**tokens).loss
    torch.testing.assert_close(loss, wanted, rtol=2e-6, atol=0)
    loss.backward()
    wanted.backward()
    if hold == "int8":
        assert 0.99 < cosine(model, mixture) < 1 - 1e-9
    else:
        same_gradients(model, mixture, 1e-5)


def test_in_the_basis_of_the_axes_it_is_adamw(mixture: nn.Module, tokens: dict[str, Tensor]) -> None:
    oracle = copy.deepcopy(mixture)
    optimizer = gradlite.GradLite(mixture, lr=2e-3, rank=1.0, basis="random", moments="fp32", weight_decay=0.1, eps=1e-6)
    found = attachment_of(mixture)
    assert found is not None
    for basis in found.window.bases():
        basis.matrix_NR = torch.eye(basis.width)
    decayed = [parameter for parameter in oracle.parameters() if parameter.dim() > 1]
    others = {"params": [parameter for parameter in oracle.parameters() if parameter.dim() == 1], "weight_decay": 0.0}
    groups: list[dict[str, Any]] = [{"params": decayed}, others]
    theirs = torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.1, eps=1e-6)
    for _ in range(4):
        for model, stepped in ((mixture, optimizer), (oracle, theirs)):
            model(**tokens).loss.backward()
            stepped.step()
            stepped.zero_grad()
    for name, wanted in oracle.named_parameters():
        torch.testing.assert_close(mixture.get_parameter(name), wanted, rtol=1e-4, atol=2e-5)


def test_experts_that_no_token_chose_stay_what_they_were(mixture: nn.Module, tokens: dict[str, Tensor]) -> None:
    router = mixture.get_submodule("model.layers.0.mlp.gate")
    router.weight.data.zero_()  # type: ignore[operator]
    before = mixture.get_parameter(f"{EXPERTS}.down_proj").detach().clone()
    optimizer = gradlite.GradLite(mixture, lr=1e-2, rank=4, weight_decay=0.0)
    chosen: list[Tensor] = []
    handle = mixture.get_submodule(EXPERTS).register_forward_pre_hook(lambda _, given: chosen.append(given[1]))
    mixture(**tokens).loss.backward()
    optimizer.step()
    handle.remove()
    moved = (mixture.get_parameter(f"{EXPERTS}.down_proj") - before).flatten(1).abs().amax(1) > 0
    assert moved.tolist() == [bool((chosen[0] == expert).any()) for expert in range(4)]
    assert not moved.all()


def test_one_frozen_weight_leaves_the_other_plain(mixture: nn.Module, tokens: dict[str, Tensor]) -> None:
    mixture.get_parameter(f"{EXPERTS}.down_proj").requires_grad_(False)
    coverage = gradlite.attach(mixture, rank=4)
    kinds = {entry.name: (entry.kind, entry.reason) for entry in coverage.entries}
    assert kinds[f"{EXPERTS}.down_proj"][0] == "frozen"
    assert kinds[f"{EXPERTS}.gate_up_proj"] == ("plain", "stacked experts whose other weight is not projected")
    mixture(**tokens).loss.backward()
    assert mixture.get_parameter(f"{EXPERTS}.gate_up_proj").grad is not None


def test_copies_and_pickles(mixture: nn.Module, tokens: dict[str, Tensor]) -> None:
    gradlite.attach(mixture, rank=4)
    for other in (copy.deepcopy(mixture), pickle.loads(pickle.dumps(mixture))):
        other(**tokens).loss.backward()
        found = attachment_of(other)
        assert found is not None
        assert all(collector.coordinates.grad is not None for collector in found.window.collectors)
    assert all(parameter.grad is None for parameter in mixture.parameters())


def test_generation_runs_the_models_own_code(
    mixture: nn.Module, tokens: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = copy.deepcopy(mixture).eval()
    gradlite.attach(mixture.eval(), rank=4)
    monkeypatch.setattr(twins, "subspace_experts", None)
    generate: dict[str, Any] = {"input_ids": tokens["input_ids"][:1], "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(mixture.generate(**generate), plain.generate(**generate))  # type: ignore[operator]


@pytest.mark.parametrize("hold", ["exact", "recompute"])
@pytest.mark.parametrize("balanced", ["config", "call"])
def test_the_routers_own_loss_is_the_models(
    balanced: str, hold: Any, mixture: Any, tokens: dict[str, Tensor], attached: Any, same_gradients: Any
) -> None:
    """Beside the tiles: full logits do not come back for it."""
    given: dict[str, Any] = {"output_router_logits": True} if balanced == "call" else {}
    mixture.config.output_router_logits = balanced == "config"
    mixture.router_aux_loss_coef = 3.0  # so that its gradient is seen
    model = attached(mixture, hold)
    found, wanted = model(**tokens, **given), mixture(**tokens, **given)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(found.aux_loss, wanted.aux_loss)
    assert found.logits is None
    assert len(found.router_logits) == 2
    found.loss.backward()
    wanted.loss.backward()
    same_gradients(model, mixture, 1e-5)
    model.config.output_router_logits = False
    without = model(**tokens)
    assert without.aux_loss is None
    assert without.loss < found.loss


def test_the_routers_own_loss_is_no_part_of_a_sum_over_tokens(mixture: Any, tokens: dict[str, Tensor]) -> None:
    plain, _ = summed_loss(copy.deepcopy(mixture), tokens)
    gradlite.attach(mixture, rank=4)
    mixture.config.output_router_logits = True
    loss, _ = summed_loss(mixture, tokens)
    torch.testing.assert_close(loss, plain, rtol=2e-6, atol=0)


def test_an_activation_that_is_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """LFM2's experts have no module for it."""
    from transformers.models.lfm2_moe import Lfm2MoeConfig
    from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeExperts

    torch.manual_seed(0)
    experts = Lfm2MoeExperts(Lfm2MoeConfig(hidden_size=16, moe_intermediate_size=8, num_experts=4))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert experts_kind(experts) == "silu"
    monkeypatch.setattr(experts, "act_fn", torch.sin)
    assert experts_kind(experts) is None


def test_experts_of_another_layout_stay_plain(tokens: dict[str, Tensor]) -> None:
    """GPT-OSS: transposed, interleaved, with biases, clipped."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    coverage = gradlite.attach(AutoModelForCausalLM.from_config(config), rank=4)
    kinds = {entry.name: entry.kind for entry in coverage.entries if "experts" in entry.name}
    assert set(kinds.values()) == {"plain"}
    assert "experts" in str(coverage.held.unrecognised)
