"""Accumulation, clipping, skipping, clearing, saving and bytes of the whole optimizer."""

import io
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import gradlite
from gradlite.attaching import attachment_of
from gradlite.attaching.attachment import Attachment
from gradlite.optim.moments import MomentsFormat
from gradlite.optim.subspace_adamw import MemoryFormat
from gradlite.subspace.collector import BasisKind

Build = Callable[..., nn.Module]
Batches = Callable[..., list[Tensor]]
Feedback = Literal["feedback", "same_step", "off"]


def attachment(model: nn.Module) -> Attachment:
    found = attachment_of(model)
    assert found is not None
    return found


def sample_everything(model: nn.Module) -> None:
    for collector in attachment(model).window.collectors:
        collector.sample_count = 10_000


def own(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters, copied."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first: Any, second: Any) -> None:
    """Equal to the bit, through nested states."""
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    else:
        assert first == second


EXACT: dict[str, Any] = {"lr": 2e-3, "rank": 6, "moments": "fp32", "feedback_memory": "fp32", "refresh_interval": 3}


# ---- accumulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", ["feedback", "same_step", "off"])
@pytest.mark.parametrize("pieces", [2, 4])
def test_micro_batches_equal_one_batch(pieces: int, feedback: Feedback, tiny_model: Build, batches: Batches) -> None:
    whole, split = tiny_model(), tiny_model()
    optimizers = [gradlite.GradLite(model, feedback=feedback, **EXACT) for model in (whole, split)]
    for model in (whole, split):
        sample_everything(model)
    for step, ids in enumerate(batches(8, 4)):
        whole(ids).backward()
        for part in ids.chunk(1 if step == 0 else pieces):  # the first bases come from one batch, the same for both
            (split(part) / (1 if step == 0 else pieces)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for (name, first), second in zip(own(whole).items(), own(split).values(), strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=1e-9, msg=name)


# ---- clipping -------------------------------------------------------------------------------------------------------


def dense_gradients(model: nn.Module) -> list[Tensor]:
    """``C Pᵀ + R̂`` of every projected weight and the exact gradient of every other."""
    result = []
    for collector in attachment(model).window.collectors:
        grad, basis, sample = collector.coordinates.grad, collector.basis.matrix_NR, collector.sample
        assert grad is not None
        assert basis is not None
        dense = grad @ basis.T
        result.append(dense if sample is None else dense + sample.left_KM.T @ sample.right_KN)
    plain = [entry.name for entry in attachment(model).coverage.entries if entry.kind == "plain"]
    gradients = [model.get_parameter(name).grad for name in plain]
    assert all(gradient is not None for gradient in gradients)
    return result + [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("feedback", ["feedback", "off"])
def test_stock_clipping_sees_the_norm_of_the_approximate_gradient(
    feedback: Feedback, micro_batches: int, tiny_model: Build, batches: Batches
) -> None:
    model = tiny_model()
    gradlite.GradLite(model, feedback=feedback, **EXACT)
    sample_everything(model)
    for ids in batches(micro_batches):
        model(ids).backward()
    wanted = torch.stack([gradient.norm() for gradient in dense_gradients(model)]).norm()
    shown = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.testing.assert_close(shown, wanted, rtol=1e-9, atol=0)
    if feedback == "feedback":  # all of the residual is in the sample: the norm is the exact gradient's own
        plain = tiny_model()
        for ids in batches(micro_batches):
            plain(ids).backward()
        torch.testing.assert_close(shown, nn.utils.clip_grad_norm_(plain.parameters(), 1e9), rtol=1e-9, atol=0)


@pytest.mark.parametrize("feedback", ["feedback", "same_step", "off"])
@pytest.mark.parametrize("sampled", ["all", "few"])
def test_clipping_equals_a_smaller_loss(feedback: Feedback, sampled: str, tiny_model: Build, batches: Batches) -> None:
    clipped, scaled = tiny_model(), tiny_model()
    optimizers = [gradlite.GradLite(model, feedback=feedback, **EXACT) for model in (clipped, scaled)]
    for model in (clipped, scaled) if sampled == "all" else ():
        sample_everything(model)
    for step, ids in enumerate(batches(8)):
        clipped(ids).backward()
        norm = nn.utils.clip_grad_norm_(clipped.parameters(), 0.05 * (step + 1))
        factor = min(1.0, 0.05 * (step + 1) / (norm.item() + 1e-6))
        assert factor < 1
        (scaled(ids) * factor).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for (name, first), second in zip(own(clipped).items(), own(scaled).values(), strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=1e-8, msg=name)


def test_a_loss_scaler_changes_nothing(tiny_model: Build, batches: Batches) -> None:
    plain, scaled = tiny_model(torch.float32), tiny_model(torch.float32)
    optimizers = [gradlite.GradLite(model, feedback="same_step", **EXACT) for model in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for ids in batches(5):
        plain(ids).backward()
        optimizers[0].step()
        scaler.scale(scaled(ids)).backward()
        scaler.step(optimizers[1])
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    for (name, first), second in zip(own(plain).items(), own(scaled).values(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5, msg=name)


# ---- skipping and clearing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["coordinates", "plain"])
@pytest.mark.parametrize("when", [0, 3])
def test_a_bad_gradient_skips_the_step(bad: float, place: str, when: int, tiny_model: Build, batches: Batches) -> None:
    model = tiny_model(torch.float32)
    optimizer = gradlite.GradLite(model, lr=1e-3, rank=4)
    for step, ids in enumerate(batches(6)):
        loss = model(ids)
        if step != when:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.skipped_in_a_row == 0
            continue
        before, state = own(model), io.BytesIO()
        torch.save(optimizer.state_dict()["state"], state)
        if place == "coordinates":
            (loss * bad).backward()
        else:
            loss.backward()
            gradient = model.get_parameter("norm1.bias").grad
            assert gradient is not None
            gradient[3] = bad
        optimizer.step()
        optimizer.zero_grad()
        assert (optimizer.skipped_steps, optimizer.skipped_in_a_row) == (1, 1)
        assert_same(own(model), before)
        state.seek(0)
        assert_same(optimizer.state_dict()["state"], torch.load(state, weights_only=True))
    assert optimizer.skipped_steps == 1  # the others went well, the first bases not being made of NaN
    assert all(torch.isfinite(value).all() for value in own(model).values())


@pytest.mark.parametrize("how", ["optimizer", "model", "optimizer to zero", "model to zero"])
@pytest.mark.parametrize("abandoned", [False, True])
@pytest.mark.parametrize("feedback", ["same_step", "off"])
def test_every_way_to_clear_gradients(
    feedback: Feedback, how: str, abandoned: bool, tiny_model: Build, batches: Batches
) -> None:
    """Also where a backward pass is abandoned: its samples must not leak into the next step."""
    model, fresh = tiny_model(), tiny_model()
    optimizer, other = (gradlite.GradLite(m, feedback=feedback, **EXACT) for m in (model, fresh))
    for m in (model, fresh):
        sample_everything(m)
    first, second, third = batches(3)

    def clear() -> None:
        (optimizer if how.startswith("optimizer") else model).zero_grad(set_to_none=not how.endswith("zero"))

    for m, o in ((model, optimizer), (fresh, other)):
        m(first).backward()
        o.step()
        clear() if m is model else o.zero_grad()
    if abandoned:
        model(second).backward()
        clear()
    for m, o in ((model, optimizer), (fresh, other)):
        m(third).backward()
        o.step()
    for (name, a), b in zip(own(model).items(), own(fresh).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("feedback", ["same_step", "off"])
@pytest.mark.parametrize("clips", [True, False])
def test_evaluation_between_backward_and_step_changes_nothing(
    feedback: Feedback, clips: bool, tiny_model: Build, batches: Batches
) -> None:
    """Nor where gradients were scaled before it, which is not clearing them."""
    model, fresh = tiny_model(), tiny_model()
    optimizers = [gradlite.GradLite(m, feedback=feedback, **EXACT) for m in (model, fresh)]
    with torch.inference_mode():
        model(batches(1)[0])
    for ids in batches(4):
        for m, optimizer in zip((model, fresh), optimizers, strict=True):
            m(ids).backward()
            if clips:
                torch.nn.utils.clip_grad_norm_(m.parameters(), 1e-3)
            if m is model:
                m.eval()
                with torch.inference_mode():
                    m(ids)
                with torch.no_grad():
                    m(ids)
                m.train()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(own(model), own(fresh))


def test_a_state_of_another_basis_is_refused(tiny_model: Build) -> None:
    saved = gradlite.GradLite(tiny_model(), **EXACT).state_dict()
    with pytest.raises(gradlite.GradLiteError, match="the saved optimizer has basis='gradient', this one basis='random'"):
        gradlite.GradLite(tiny_model(), basis="random", **EXACT).load_state_dict(saved)
    del saved["subspace"]["formats"]["basis"]  # as in older states
    gradlite.GradLite(tiny_model(), **EXACT).load_state_dict(saved)


def test_a_weight_without_gradient_keeps_pace_with_its_basis(tiny_model: Build, batches: Batches) -> None:
    """Where q rests while k and v move their common basis, q's moments move along."""
    model = tiny_model()
    optimizer = gradlite.GradLite(model, feedback="off", **{**EXACT, "refresh_interval": 1})
    names = [name for name, _ in attachment(model).projected]
    collector = attachment(model).window.collectors[names.index("q.weight")]
    for step, ids in enumerate(batches(3)):
        model(ids).backward()
        if step == 2:
            collector.coordinates.grad = None
        state, old = optimizer.state[collector.coordinates], collector.basis.matrix_NR
        moment = state["exp_avg"].clone() if step else torch.zeros(())
        optimizer.step()
        optimizer.zero_grad()
    new = collector.basis.matrix_NR
    assert old is not None
    assert new is not None
    assert not torch.equal(old, new)
    torch.testing.assert_close(optimizer.state[collector.coordinates]["exp_avg"], moment @ (old.T @ new))


@pytest.mark.parametrize(("feedback", "memory"), [("same_step", "factored"), ("feedback", "factored"), ("feedback", "fp32")])
def test_a_batch_that_the_basis_misses_makes_no_giant_step(feedback: Feedback, memory: MemoryFormat) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 32, bias=False)
    start = layer.weight.detach().clone()
    optimizer = gradlite.GradLite(
        layer, lr=1e-3, rank=8, feedback=feedback, feedback_memory=memory, moments="fp32", refresh_interval=2
    )
    for step in range(6):
        x = torch.zeros(64, 32)
        inputs = slice(0, 8) if step % 2 == 0 else slice(8, 32)  # C.grad is exactly zero every other time
        x[:, inputs] = torch.randn(64, 32)[:, inputs]
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (layer.weight - start).abs().max() < 1  # NaN before φ was bounded


def test_closures_and_param_groups(tiny_model: Build, batches: Batches) -> None:
    model = tiny_model()
    groups = [{"params": "q.weight", "lr": 0.0}, {"params": ["norm*", "*.bias"], "lr": 0.0}]
    optimizer = gradlite.GradLite(model, lr=1e-3, rank=4, weight_decay=0.1, groups=groups)
    before, (ids,) = own(model), batches(1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(ids)
        loss.backward()
        return float(loss.item())

    assert optimizer.step(closure) == pytest.approx(tiny_model()(ids).item())
    moved = {name for name, value in own(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name != "q.weight" and not name.startswith("norm") and "bias" not in name}
    with pytest.raises(gradlite.GradLiteError, match="'nothing'"):
        gradlite.GradLite(model, groups=[{"params": "nothing"}])
    with pytest.raises(gradlite.GradLiteError, match="unknown setting 'momentum'"):
        gradlite.GradLite(model, groups=[{"params": "q.weight", "momentum": 1.0}])


def test_an_override_leaves_norms_and_biases_undecayed(tiny_model: Build) -> None:
    groups = [{"params": ["norm*", "q.weight"], "lr": 0.5}, {"params": ["*.bias"], "weight_decay": 0.3}]
    model = tiny_model()
    optimizer = gradlite.GradLite(model, rank=4, weight_decay=0.1, groups=groups)
    decays = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    plain = {name: decays.get(id(parameter)) for name, parameter in model.named_parameters()}
    assert {plain[name] for name in plain if name.startswith("norm") and not name.endswith("bias")} == {0.0}
    assert {plain[name] for name in plain if name.endswith("bias") and not name.startswith("norm")} <= {0.3}
    assert sum(group["lr"] == 0.5 for group in optimizer.param_groups) == 2


def test_a_weight_that_is_frozen_later_stays(tiny_model: Build, batches: Batches) -> None:
    model = tiny_model()
    optimizer = gradlite.GradLite(model, lr=1e-2, rank=4)
    for frozen in (False, True, False):
        model.get_parameter("q.weight").requires_grad_(not frozen)
        before = own(model)
        model(batches(1)[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = own(model)
        assert torch.equal(after["q.weight"], before["q.weight"]) == frozen
        assert not torch.equal(after["o.weight"], before["o.weight"])


@pytest.mark.parametrize("memory", ["factored", "int4", "fp32"])
@pytest.mark.parametrize("feedback", ["feedback", "off"])
def test_a_step_inside_autocast_is_the_same(
    feedback: Feedback, memory: MemoryFormat, tiny_model: Build, batches: Batches
) -> None:
    models = []
    for inside in (False, True):
        model = tiny_model()
        optimizer = gradlite.GradLite(model, lr=1e-2, rank=4, feedback=feedback, feedback_memory=memory, refresh_interval=2)
        for ids in batches(6):
            model(ids).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()
            optimizer.zero_grad()
        models.append(own(model))
    assert_same(*models)


# ---- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("feedback", "memory", "moments"),
    [
        ("feedback", "factored", "int8"),
        ("feedback", "int4", "fp32"),
        ("feedback", "fp32", "int8"),
        ("same_step", "factored", "int8"),
        ("off", "factored", "fp32"),
    ],
)
def test_resuming_is_exact_to_the_bit(
    dtype: torch.dtype, feedback: Feedback, memory: MemoryFormat, moments: MomentsFormat, batches: Batches
) -> None:
    def build() -> nn.Module:  # wide enough that moments are coded
        torch.manual_seed(1)
        return nn.Sequential(nn.Embedding(600, 32), nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 600)).to(dtype)

    def start(model: nn.Module) -> tuple[gradlite.GradLite, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = gradlite.GradLite(
            model,
            lr=1e-2,
            rank=8,
            feedback=feedback,
            feedback_memory=memory,
            moments=moments,
            refresh_interval=2,
        )
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def train(model: nn.Module, optimizer: gradlite.GradLite, scheduler: Any, data: list[Tensor]) -> None:
        for ids in data:
            model(ids).float().square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    data = batches(8)
    whole = build()
    whole_optimizer, whole_scheduler = start(whole)
    train(whole, whole_optimizer, whole_scheduler, data[:4])
    file = io.BytesIO()
    saved = (whole.state_dict(), whole_optimizer.state_dict(), whole_scheduler.state_dict())
    torch.save(saved, file)
    train(whole, whole_optimizer, whole_scheduler, data[4:])
    file.seek(0)
    weights, state, schedule = torch.load(file, weights_only=True)
    resumed = build()
    resumed.load_state_dict(weights)
    optimizer, scheduler = start(resumed)
    optimizer.load_state_dict(state)
    scheduler.load_state_dict(schedule)
    train(resumed, optimizer, scheduler, data[4:])
    assert_same(own(resumed), own(whole))
    assert_same(optimizer.state_dict(), whole_optimizer.state_dict())
    assert any("codes" in name for s in state["state"].values() for name in s) == (moments == "int8" or memory == "int4")


def test_a_state_of_another_rank_is_refused(tiny_model: Build, batches: Batches) -> None:
    model = tiny_model()
    optimizer = gradlite.GradLite(model, rank=4)
    model(batches(1)[0]).backward()
    optimizer.step()
    saved = optimizer.state_dict()
    with pytest.raises(gradlite.GradLiteError, match="rank 4"):
        gradlite.GradLite(model, rank=6).load_state_dict(saved)
    with pytest.raises(gradlite.GradLiteError, match=r"'o\.weight' is trained in coordinates by the saved optimizer only"):
        gradlite.GradLite(model, rank=4, exclude=["o.weight"]).load_state_dict(saved)
    del saved["projected"]  # as in older states
    with pytest.raises(gradlite.GradLiteError, match="8 projected weights, this one has 7"):
        gradlite.GradLite(model, rank=4, exclude=["o.weight"]).load_state_dict(saved)


@pytest.mark.parametrize("basis", ["gradient", "activation"])
def test_loading_a_state_before_the_first_step(basis: BasisKind, tiny_model: Build, batches: Batches) -> None:
    """As accelerate does when it prepares an optimizer."""
    model, fresh = tiny_model(), tiny_model()
    optimizer, other = (gradlite.GradLite(m, basis=basis, **EXACT) for m in (model, fresh))
    optimizer.load_state_dict(optimizer.state_dict())
    for ids in batches(3):
        for m, o in ((model, optimizer), (fresh, other)):
            m(ids).backward()
            o.step()
            o.zero_grad()
    assert_same(own(model), own(fresh))


def test_a_state_from_another_kind_of_device_or_an_older_version_loads(tiny_model: Build, batches: Batches) -> None:
    """A CUDA generator's state has 16 bytes, a CPU's 5056; once, shares of energy were not saved."""
    model = tiny_model()
    optimizer = gradlite.GradLite(model, rank=4)
    model(batches(1)[0]).backward()
    optimizer.step()
    saved = optimizer.state_dict()
    saved["subspace"]["generator"] = torch.arange(16, dtype=torch.uint8)
    del saved["subspace"]["shares_inside"]
    optimizer.load_state_dict(saved)
    draws = []
    for _ in range(2):
        fresh = gradlite.GradLite(tiny_model(), rank=4)
        fresh.load_state_dict(saved)
        draws.append(torch.rand(4, generator=fresh._window.generator))
    assert torch.equal(*draws)  # the same state goes on in the same way
    assert fresh.energy() == {}


# ---- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"feedback": "same_step"},
        {"feedback": "off", "moments": "fp32"},
        *({"feedback": "feedback", "feedback_memory": memory} for memory in ("factored", "int4", "fp32")),
    ],
)
def test_expected_bytes_are_the_bytes_that_exist(
    dtype: torch.dtype, settings: dict[str, Any], tiny_model: Build, batches: Batches
) -> None:
    model = tiny_model(dtype)
    optimizer = gradlite.GradLite(model, rank=8, refresh_interval=100, **settings)
    for ids in batches(2):
        optimizer.zero_grad()
        model(ids).backward()
        for collector in attachment(model).window.collectors:
            assert not collector.basis.due
        if optimizer.state:
            assert optimizer.state_bytes() == optimizer.expected_bytes()
        optimizer.step()
    assert optimizer.state_bytes()["residual sample"] == 0
    assert (optimizer.expected_bytes()["error memory"] > 0) == (settings.get("feedback") == "feedback")
    assert optimizer.expected_bytes()["weights"] == sum(
        value.nbytes for value in {id(p): p for p in own_parameters(model)}.values()
    )


def own_parameters(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if "gradlite" not in name]
