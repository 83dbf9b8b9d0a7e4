"""What GradLite refuses, in one sentence that names the culprit."""

from typing import Any

import pytest
import torch
from torch import nn

import gradlite


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number, at least 0"),
        ({"betas": (1.0, 0.9)}, "betas must be two numbers"),
        ({"eps": 0.0}, "eps must be a finite number above 0"),
        ({"refresh_interval": 0}, "refresh_interval must be a whole number"),
        ({"refresh_interval": 2.5}, "refresh_interval must be a whole number"),
        ({"groups": [{"lr": 1.0}]}, 'a group needs "params"'),
    ],
)
def test_bad_keywords_are_named(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(gradlite.GradLiteError, match=message):
        gradlite.GradLite(nn.Linear(32, 32), **keywords)


def test_an_unknown_keyword_suggests_the_nearest() -> None:
    model = nn.Linear(32, 32)
    with pytest.raises(gradlite.GradLiteError, match=r"unknown keyword 'rnak'; did you mean 'rank'\?"):
        gradlite.GradLite(model, rnak=1 / 16)  # type: ignore[arg-type]  # that is: type checkers refuse it as well
    with pytest.raises(gradlite.GradLiteError, match=r"unknown keyword 'zzz'; known are lr, rank, .*, seed\.$"):
        gradlite.optimizer_factory()(model, zzz=1)


def test_parameters_are_no_model() -> None:
    with pytest.raises(gradlite.GradLiteError, match="pass the model"):
        gradlite.GradLite(list(nn.Linear(32, 32).parameters()))  # type: ignore[arg-type]


def test_a_pattern_may_stand_alone() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    coverage = gradlite.attach(model, rank=4, include="0.*")
    assert [entry.name for entry in coverage.entries if entry.kind == "projected"] == ["0.weight"]


def test_a_state_of_another_kind_is_refused_when_it_is_loaded() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    saved = gradlite.GradLite(model, rank=4, moments="fp32").state_dict()
    with pytest.raises(gradlite.GradLiteError, match="moments='fp32'"):
        gradlite.GradLite(model, rank=4, moments="int8").load_state_dict(saved)
    with pytest.raises(gradlite.GradLiteError, match="not a GradLite"):
        gradlite.GradLite(model, rank=4).load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


@pytest.mark.parametrize("stochastic_rounding", [True, False])
def test_plain_matrices_train_in_bfloat16(stochastic_rounding: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(96, 64)).bfloat16()
    model[0] = nn.Linear(32, 96).bfloat16()
    optimizer = gradlite.GradLite(model, lr=1e-2, rank=4, exclude="1.*", stochastic_rounding=stochastic_rounding)
    x, losses = torch.randn(64, 32).bfloat16(), []
    for _ in range(20):
        loss = (model(x).float() - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_stacked_experts_are_named() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(32, 32)
            self.weights = nn.Parameter(torch.zeros(4, 32, 32))

    assert "stacked experts" in str(gradlite.attach(Experts(), rank=4))


def test_groups_that_are_added_hold_parameters_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].requires_grad_(False)
    optimizer = gradlite.GradLite(model, rank=4)
    with pytest.raises(gradlite.GradLiteError, match=r"shape \(3,\) is not the model's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(gradlite.GradLiteError, match=r"'0\.weight' is trained in coordinates already"):
        optimizer.add_param_group({"params": model[0].weight})
    model[1].requires_grad_(True)
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 1e-2})
    before = [parameter.detach().clone() for parameter in model[1].parameters()]
    model(torch.randn(5, 32)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(now, then) for now, then in zip(model[1].parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"params": ["nothing*"]}, "matches no trained parameter"),
        ({"params": ["0.*"], "lr": -1.0}, r"lr in the group \['0\.\*'\] must be a finite number, at least 0, not -1"),
        ({"params": ["0.*"], "lr": "1e-4"}, "must be a finite number, at least 0, not '1e-4'"),
        ({"params": ["0.*"], "betas": (0.9,)}, r"betas .* must be two numbers in \[0, 1\)"),
        ({"params": ["0.*"], "betas": (2, 3)}, r"betas .* must be two numbers in \[0, 1\)"),
        ({"params": ["0.*"], "eps": float("nan")}, "eps .* must be a finite number above 0"),
    ],
)
def test_a_bad_group_leaves_the_model_as_it_was(settings: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with pytest.raises(gradlite.GradLiteError, match=message):
        gradlite.GradLite(model, rank=4, groups=[settings])
    assert type(model[0]) is nn.Linear
    model(torch.randn(2, 32)).sum().backward()
    assert model[0].weight.grad is not None


def test_vectors_that_are_added_later_are_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].bias.requires_grad_(False)
    optimizer = gradlite.GradLite(model, rank=4, weight_decay=0.5)
    model[1].bias.requires_grad_(True)
    optimizer.add_param_group({"params": [model[1].bias]})
    assert optimizer.param_groups[-1]["weight_decay"] == 0.0


def test_a_mixed_group_that_is_added_later_is_decayed_in_its_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].requires_grad_(False)
    optimizer = gradlite.GradLite(model, rank=4, weight_decay=0.5)
    model[1].requires_grad_(True)
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 1e-2})
    added = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    assert (added[id(model[1].bias)]["weight_decay"], added[id(model[1].weight)]["weight_decay"]) == (0.0, 0.5)
    assert added[id(model[1].bias)]["lr"] == added[id(model[1].weight)]["lr"] == 1e-2


def test_a_state_of_other_weights_is_refused() -> None:
    def build(exclude: str) -> gradlite.GradLite:
        return gradlite.GradLite(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), rank=4, exclude=exclude)

    saved = build("0.*").state_dict()
    with pytest.raises(gradlite.GradLiteError, match=r"'0\.weight' is trained in coordinates by this optimizer only; load it"):
        build("1.*").load_state_dict(saved)
    del saved["projected"]  # as in older states
    build("0.*").load_state_dict(saved)


def test_a_weight_that_was_replaced_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    gradlite.GradLite(model, rank=4)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    with pytest.raises(gradlite.GradLiteError, match=r"replaced by another tensor .*assign=True.* build the optimizer anew"):
        model(torch.randn(2, 32))


def test_weights_with_strides_of_their_own_are_trained() -> None:
    layer = nn.Linear(32, 48).bfloat16()
    layer.weight.data = layer.weight.data.T.contiguous().T
    before = layer.weight.detach().clone()
    optimizer = gradlite.GradLite(layer, lr=1e-2, rank=4)
    layer(torch.randn(8, 32).bfloat16()).square().sum().backward()
    optimizer.step()
    assert int((layer.weight != before).sum()) > before.numel() // 2


def test_large_finite_gradients_in_float16_are_no_reason_to_skip() -> None:
    model = nn.Linear(32, 32).half()
    optimizer = gradlite.GradLite(model, rank=4, basis="random")
    model(torch.full((1, 32), 100.0).half()).backward(torch.full((1, 32), 30.0).half())
    optimizer.step()
    assert optimizer.skipped_steps == 0


def test_a_state_of_another_format_is_refused() -> None:
    states = {}
    for dtype in (torch.float32, torch.float64):
        model = nn.Linear(64, 64).to(dtype)
        optimizer = gradlite.GradLite(model, rank=4)
        model(torch.randn(4, 64, dtype=dtype)).sum().backward()
        optimizer.step()
        states[dtype] = optimizer, optimizer.state_dict()
    with pytest.raises(gradlite.GradLiteError, match="trained weights in float64, this one has them in float32"):
        states[torch.float32][0].load_state_dict(states[torch.float64][1])
