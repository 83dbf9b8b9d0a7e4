"""MeZO: restores the weights bit by bit, follows the authors' formula, and makes training again from its log."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradlite
from gradlite.errors import GradLiteError
from gradlite.methods.mezo import MeZOMethod, direction, draw, rebuild, step_seed
from gradlite.ops.random_state import seed_of

transformers = pytest.importorskip("transformers")


def llama(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=32, attention_dropout=dropout,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).train()


def build(model: nn.Module, **options: Any) -> MeZOMethod:
    method = gradlite.methods.build("mezo", model, **{"lr": 1e-3, **options})
    assert isinstance(method, MeZOMethod)
    return method


IDS = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(0))


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(parameter, was) for parameter, was in zip(model.parameters(), before, strict=True))


def loss_of(method: MeZOMethod, ids: Tensor = IDS) -> Tensor:
    loss: Tensor = method.model(input_ids=ids, labels=ids).loss
    return loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_restored_bit_by_bit(dtype: torch.dtype) -> None:
    model = llama(dtype)
    before, storages = weights(model), [parameter.data_ptr() for parameter in model.parameters()]
    method = build(model, epsilon=0.1)
    loss = loss_of(method)
    method.backward(loss)
    assert method.optimizer.projected.grad != 0
    assert same(model, before)
    assert storages == [parameter.data_ptr() for parameter in model.parameters()]


def test_under_autocast_each_pass_has_its_own_weights() -> None:
    """Autocast keeps casts by parameter: the second pass would have had the first one's linear layers."""
    slopes = []
    for has_autocast in (False, True):
        method = build(llama(), epsilon=0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_autocast):
            loss = loss_of(method)
        method.backward(loss)
        assert method.optimizer.projected.grad is not None
        slopes.append(float(method.optimizer.projected.grad))
    assert abs(slopes[1] - slopes[0]) < 0.1 * abs(slopes[0])


def test_weights_are_restored_after_an_error() -> None:
    model = llama()
    before = weights(model)
    method = build(model)
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(method)
    handle.remove()
    assert same(model, before)
    assert torch.equal(
        model.eval()(input_ids=IDS).logits, llama().eval()(input_ids=IDS).logits
    )  # nothing is perturbed any more


@pytest.mark.parametrize("uses_logits", [False, True])
def test_a_step_is_the_authors_formula(uses_logits: bool) -> None:
    model, twin = llama(), llama()
    method = build(model, lr=0.01, epsilon=1e-2, weight_decay=0.3)
    if uses_logits:
        logits = method.model(input_ids=IDS).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    else:
        loss = loss_of(method)
    method.backward(loss)
    zs = [draw(method.optimizer, own) for own in model.parameters()]
    losses = []
    for sign in (1, -1):
        for own, z in zip(twin.parameters(), zs, strict=True):
            own.data += sign * 1e-2 * z
        losses.append(twin(input_ids=IDS, labels=IDS).loss.item())
        for own, z in zip(twin.parameters(), zs, strict=True):
            own.data -= sign * 1e-2 * z
    projected = (losses[0] - losses[1]) / 2e-2
    assert method.optimizer.projected.grad is not None
    assert method.optimizer.projected.grad.item() == pytest.approx(projected, rel=0.05 if uses_logits else 2e-3)
    before = weights(twin)
    projected = method.optimizer.projected.grad.item()
    method.step()
    for own, was, z in zip(model.parameters(), before, zs, strict=True):
        decay = 1 - 0.01 * 0.3 if own.dim() > 1 else 1.0
        torch.testing.assert_close(own.detach(), decay * was - 0.01 * projected * z, rtol=1e-4, atol=1e-6)


def test_directions_are_normal_and_each_tensors_own() -> None:
    many = torch.cat([z for _, z in direction(torch.empty(1_200_000), 5)])
    assert abs(many.mean()) < 4e-3
    assert many.std() == pytest.approx(1.0, abs=4e-3)
    assert many.pow(4).mean() == pytest.approx(3.0, abs=0.05)
    others = torch.cat([z for _, z in direction(torch.empty(1_200_000), 6)])
    assert abs(torch.cosine_similarity(many, others, dim=0)) < 5e-3


def test_directions_of_later_steps_are_new() -> None:
    """A CPU's generator looks at 32 bits of its seed only."""
    seen = set()
    for number in (0, 1, 1 << 12, 1 << 16, 1 << 20):
        for tensor in range(3):
            _, z = next(direction(torch.empty(8), seed_of(step_seed(0, number), tensor)))
            seen.add(tuple(z.tolist()))
    assert len(seen) == 15


def test_both_passes_drop_the_same() -> None:
    method = build(llama(dropout=0.5), epsilon=1e-7)
    method.model.config._attn_implementation = "eager"  # type: ignore[union-attr]
    other = loss_of(method).item()
    loss = loss_of(method)
    assert abs(loss.item() - other) > 1e-3  # another mask
    method.backward(loss)
    assert abs(method.optimizer.projected.grad) < 500  # type: ignore[arg-type]  # two masks would give a difference over 2e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_made_again_from_the_log(dtype: torch.dtype) -> None:
    model = llama(dtype)
    method = build(model, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(method.optimizer, lambda number: 1 / (1 + number))
    for number in range(70):  # more than the log's first room
        loss = loss_of(method, IDS.roll(number))
        method.backward(loss * (float("nan") if number == 3 else 1.0))
        method.step()
        scheduler.step()
        method.zero_grad()
    saved = method.state_dict()["optimizer"]
    log = saved["log"]
    assert log.shape == (69, 4)
    assert len(set(log[:, 0].tolist())) == 69
    assert method.skipped_steps == 1
    fresh = llama(dtype)
    assert not same(fresh, weights(model))
    assert same(rebuild(fresh, saved), weights(model))
    with pytest.raises(GradLiteError, match="2 groups and Linear has 1"):
        rebuild(nn.Linear(2, 2, bias=False), saved)


def test_loss_falls_on_few_weights() -> None:
    model = llama()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.shape == (30, 16))
    method = build(model, lr=2e-3, epsilon=1e-3)
    losses = []
    for _ in range(80):
        loss = loss_of(method)
        losses.append(loss.item())
        method.backward(loss)
        method.step()
        method.zero_grad()
    assert sum(losses[-5:]) / 5 < losses[0] - 0.1


def test_refusals_and_finish() -> None:
    model = llama()
    own = type(model)
    method = build(model)
    with pytest.raises(GradLiteError, match=r"method\.model\.train"):
        method.backward(model.eval()(input_ids=IDS, labels=IDS).loss)
    with pytest.raises(GradLiteError, match="cannot clip"):
        method.clip(1.0)
    assert type(method.finish()) is own
    assert not any(module._forward_pre_hooks for module in model.modules())
    model = llama()
    model.lonely = nn.Linear(2, 2)  # which nothing calls
    method = build(model)
    with pytest.raises(GradLiteError, match=r"cannot perturb 'lonely\.weight'"):
        method.backward(loss_of(method))


def test_a_step_takes_its_own_gradient_alone() -> None:
    """Transformers' Trainer clears the gradients of the model's parameters, and the projected one is not among them."""
    logs = []
    for clears in (True, False):
        method = build(llama())
        for _ in range(3):
            method.backward(loss_of(method))
            method.step()
            if clears:
                method.zero_grad()
        logs.append(method.state_dict()["optimizer"]["log"])
    assert torch.equal(*logs)
