"""Every method does what the protocol says and what it claims; one suite for all of them, on a Llama of 65,000 weights."""

import gc
import io
import math
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import gradlite
from gradlite.errors import GradLiteError
from gradlite.methods.method import Method
from gradlite.methods.packages import hold_back_torchao_lines

hold_back_torchao_lines()
transformers = pytest.importorskip("transformers")

# Settings that move this model in a few steps; everything else is the default.
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 3e-3},
    "adamw-checkpointed": {"lr": 3e-3},
    "adamw8bit": {"lr": 3e-3},
    "adamw8bit-in-backward": {"lr": 3e-3, "in_backward": True},
    "adamw4bit": {"lr": 3e-3},
    "lomo": {"lr": 0.1},
    "lomo-clipped": {"lr": 0.2, "clip_grad_norm": 1.0},
    "adalomo": {"lr": 0.05},
    "galore": {"lr": 1e-2, "rank": 16, "update_proj_gap": 4},
    "fira": {"lr": 3e-3, "update_proj_gap": 4},
    "apollo": {"lr": 1e-2, "rank": 16, "update_proj_gap": 4},
    "ldadam": {"lr": 3e-3},
    "badam": {"lr": 1e-2, "switch_block_every": 4},
    "foam": {"lr": 1e-2, "level": 3},
    "lora": {"lr": 3e-2},
    "dora": {"lr": 3e-2},
    "ia3": {"lr": 1.0},
    "mesp": {"lr": 3e-2},
    "mebp": {"lr": 3e-2},
    "mezo": {"lr": 1e-3, "epsilon": 1e-2},
    "gradlite": {"lr": 3e-3, "rank": 8},
}
VARIANTS = {"adamw8bit-in-backward": "adamw8bit", "lomo-clipped": "lomo"}
PACKAGES = {
    "adamw8bit": "torchao.optim",
    "adamw4bit": "torchao.optim",
    "lomo": "lomo_optim",
    "adalomo": "lomo_optim",
    "galore": "galore_torch",
    "fira": "fira",
    "apollo": "apollo_torch",
    "badam": "badam",
    "lora": "peft",
    "dora": "peft",
    "ia3": "peft",
    "mesp": "peft",
    "mebp": "peft",
}
NOT_STATE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
every_method = pytest.mark.parametrize("name", SETTINGS)


@pytest.fixture(autouse=True)
def _fast() -> Iterator[None]:
    """Torchao compiles one kernel a shape, which takes longer than all of this suite."""
    gc.freeze()
    with torch.compiler.set_stance("force_eager"):
        yield
    gc.unfreeze()


def llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def build(name: str, model: Any = None, **options: Any) -> Method:
    settings = {**SETTINGS[name], **options}
    method = gradlite.methods.build(VARIANTS.get(name, name), llama() if model is None else model, **settings)
    method.model.train()
    return method


def batch(number: int = 0) -> Tensor:
    return torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(number))


def loss_of(method: Method, ids: Tensor) -> Tensor:
    loss: Tensor = method.model(input_ids=ids, labels=ids).loss
    return loss


@torch.no_grad()
def evaluated(method: Method, ids: Tensor) -> float:
    method.model.eval()
    loss = loss_of(method, ids).item()
    method.model.train()
    return loss


def step(method: Method, ids: Tensor, scheduler: Any = None) -> float:
    loss = loss_of(method, ids)
    method.backward(loss)
    method.step()
    if scheduler is not None:
        scheduler.step()
    method.zero_grad()
    return loss.item()


def weights(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named if "gradlite_" not in name}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if name in before and not torch.equal(before[name], parameter)}


def saved_and_loaded(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_the_suite_leaves_no_method_out() -> None:
    assert {VARIANTS.get(name, name) for name in SETTINGS} == set(gradlite.methods.names())


@every_method
def test_a_memorised_batch_is_learned(name: str) -> None:
    method = build(name)
    before = evaluated(method, batch())
    for _ in range({"mezo": 60}.get(name, 12)):  # MeZO tries one direction a step
        step(method, batch())
    assert evaluated(method, batch()) < {"ia3": 0.95, "mezo": 0.98}.get(name, 0.9) * before  # IA3 has 384 weights for it
    assert method.skipped_steps == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_method
def test_a_resumed_run_ends_with_the_same_bits(name: str, dtype: torch.dtype) -> None:
    method = build(name, llama(dtype))
    scheduler = LambdaLR(method.optimizer, lambda number: 1.0 / (1.0 + number))
    for number in range(5):
        step(method, batch(number), scheduler)
    saved = saved_and_loaded([method.model.state_dict(), method.state_dict(), scheduler.state_dict(), torch.get_rng_state()])
    for number in range(5, 10):
        step(method, batch(number), scheduler)

    resumed = build(name, llama(dtype, seed=1))
    scheduler = LambdaLR(resumed.optimizer, lambda number: 1.0 / (1.0 + number))
    resumed.model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    torch.set_rng_state(saved[3])
    for number in range(5, 10):
        step(resumed, batch(number), scheduler)
    assert changed(weights(method.model), resumed.model) == set()


@every_method
def test_halves_accumulate_to_the_whole_or_are_refused(name: str) -> None:
    whole, halves = build(name), build(name)
    if not whole.claims.accumulation:
        halves.backward(loss_of(halves, batch()))
        assert all(parameter.grad is None for parameter in halves.model.parameters())
        with pytest.raises(GradLiteError, match="cannot accumulate gradients"):
            halves.backward(loss_of(halves, batch()))
        return
    for method in (whole, halves):  # GradLite's first basis is of the first micro-batch; from then on it is the same
        step(method, batch(1))
    before = weights(whole.model)
    step(whole, batch())
    for half in batch().chunk(2):
        halves.backward(loss_of(halves, half) / 2)
    halves.step()
    together, apart = weights(whole.model), weights(halves.model)
    moved = torch.cat([(together[key] - before[key]).flatten() for key in before])
    difference = torch.cat([(together[key] - apart[key]).flatten() for key in before])
    assert moved.norm() > 0
    assert difference.norm() < 1e-3 * moved.norm()


@every_method
def test_a_plain_backward_pass_trains_the_same_or_is_refused(name: str) -> None:
    """By hand, with ``loss.backward()``: never other weights in silence."""
    ours, plain = build(name), build(name)
    step(ours, batch())
    loss_of(plain, batch()).backward()
    if name in ("lomo", "lomo-clipped", "adalomo", "adamw8bit-in-backward", "ldadam"):
        with pytest.raises(GradLiteError, match=r"call method\.backward\(loss\) before every step\(\), and never loss"):
            plain.step()
        return
    plain.step()
    plain.zero_grad()
    step(ours, batch(1))
    loss_of(plain, batch(1)).backward()
    plain.step()
    assert changed(weights(ours.model), plain.model) == set()


def test_ldadam_refuses_gradients_without_their_error_memory() -> None:
    """Also where a plain backward pass came first and the method's own second; zeroed gradients are forgotten."""
    method = build("ldadam")
    step(method, batch())
    loss_of(method, batch(1)).backward()
    method.backward(loss_of(method, batch(2)))
    with pytest.raises(GradLiteError, match="has a backward pass of its own"):
        method.step()
    method.zero_grad()
    step(method, batch(3))
    method.backward(loss_of(method, batch(4)))
    method.zero_grad()
    loss_of(method, batch(5)).backward()
    with pytest.raises(GradLiteError, match="has a backward pass of its own"):
        method.step()


@every_method
def test_clipping_bounds_the_norm_or_is_refused(name: str) -> None:
    method = build(name)
    method.backward(loss_of(method, batch()))
    if not method.claims.clipping:
        assert math.isnan(method.clip(0.0))
        with pytest.raises(GradLiteError, match="cannot clip") as told:
            method.clip(1.0)
        assert ("--method-options '{clip_grad_norm: 1}'" in str(told.value)) == ("lomo" in name)
        return
    norm = method.clip(0.0)
    assert norm == pytest.approx(total_norm(method.model), rel=1e-5)
    assert method.clip(0.1 * norm) == pytest.approx(norm, rel=1e-5)
    assert total_norm(method.model) == pytest.approx(0.1 * norm, rel=1e-4)


def total_norm(model: nn.Module) -> float:
    return math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))


@every_method
def test_just_the_stated_weights_change(name: str) -> None:
    method = build(name)
    before = weights(method.model)
    for number in range(9):
        step(method, batch(number))
    moved = changed(before, method.model)
    if method.claims.full_parameter:
        assert moved == set(before)
    elif name == "badam":
        assert moved == {parameter for parameter in before if ".layers." in parameter}
    else:
        assert moved == {parameter for parameter in before if "lora_" in parameter or "ia3_" in parameter}
        assert any("magnitude" in parameter for parameter in moved) == (name == "dora")


@every_method
def test_frozen_weights_stay(name: str) -> None:
    model = llama()
    frozen = list(model.model.layers[0].mlp.requires_grad_(False).parameters())
    before = [weight.clone() for weight in frozen]
    method = build(name, model)
    for number in range(5):
        step(method, batch(number))
    assert all(torch.equal(weight, was) for weight, was in zip(frozen, before, strict=True))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # from within PEFT's loader
@every_method
def test_the_finished_model_saves_and_loads(name: str, tmp_path: Path) -> None:
    method = build(name)
    for number in range(3):
        step(method, batch(number))
    finished: Any = method.finish()
    finished.eval()
    finished.save_pretrained(tmp_path)
    if method.claims.full_parameter or name == "badam":
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
        assert all(parameter.requires_grad for parameter in finished.parameters())
    else:
        assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        assert not (tmp_path / "model.safetensors").exists()
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(llama(), tmp_path)
    loaded.eval()
    with torch.no_grad():
        logits = [model(input_ids=batch()).logits for model in (loaded, finished)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)
    before = weights(finished)
    finished(input_ids=batch(), labels=batch()).loss.backward()
    assert changed(before, finished) == set()


@every_method
def test_state_bytes_are_those_of_the_live_tensors(name: str) -> None:
    model = llama()
    method = build(name, model)
    step(method, batch(1))
    method.backward(loss_of(method, batch()))
    grads = {id(p.grad): p.grad.nbytes for p in method.model.parameters() if p.grad is not None}
    assert method.state_bytes()["gradients"] == sum(grads.values())
    method.step()
    method.zero_grad()
    counted = method.state_bytes()
    assert counted["gradients"] == 0
    assert counted["optimizer"] == pytest.approx(live_state_bytes(method), abs=128)  # single numbers: learning rates, norms
    assert (counted["optimizer"] == 0) == (VARIANTS.get(name, name) == "lomo")


def live_state_bytes(method: Method) -> int:
    """Bytes of every live storage that some object reachable from the optimizer shows, weights left out."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in [*method.model.parameters(), *method.model.buffers()]}
    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[Any] = [method.optimizer]
    while waiting:
        for one in gc.get_referents(waiting.pop()):
            if id(one) in seen or isinstance(one, NOT_STATE):
                continue
            seen.add(id(one))
            waiting.append(one)
            if isinstance(one, Tensor) and not hasattr(one, "__tensor_flatten__"):
                found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(size for address, size in found.items() if address not in left_out)


@every_method
def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(name: str) -> None:
    method = build(name)
    step(method, batch())
    before = weights(method.model)
    for _ in range(2):
        method.backward(loss_of(method, batch()) * math.nan)
        method.step()
        method.zero_grad()
    assert changed(before, method.model) == set()
    assert (method.skipped_steps, method.skipped_in_a_row) == (2, 2)
    assert saved_and_loaded(method.state_dict())
    step(method, batch())
    assert (method.skipped_steps, method.skipped_in_a_row) == (2, 0)
    assert changed(before, method.model) != set()


@pytest.mark.parametrize("entry", [math.inf, math.nan])
def test_a_clipped_fused_backward_pass_leaves_out_a_gradient_that_is_not_finite(entry: float) -> None:
    """The loss is finite, so only the norm tells."""
    method = build("lomo-clipped")
    step(method, batch())
    before = weights(method.model)
    layer = method.model.get_submodule("model.layers.0.mlp.down_proj")

    def spoil(_: nn.Module, gradients: Any) -> tuple[Tensor]:
        return (torch.full_like(gradients[0], entry),)

    broken = layer.register_full_backward_pre_hook(spoil)
    for number in range(1, 4):
        step(method, batch())
        assert (method.skipped_steps, method.skipped_in_a_row) == (number, number)
    assert changed(before, method.model) == set()
    broken.remove()
    step(method, batch())
    assert (method.skipped_steps, method.skipped_in_a_row) == (3, 0)
    assert changed(before, method.model) != set()


def test_a_norm_measured_before_another_backward_pass_is_not_trusted() -> None:
    method = build("adamw")
    method.backward(loss_of(method, batch()))
    method.clip(1.0)
    method.backward(loss_of(method, batch()) * math.nan)
    before = weights(method.model)
    method.step()
    assert (changed(before, method.model), method.skipped_steps) == (set(), 1)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("gradlite", "mesp", "mebp", "mezo")])
def test_checkpointing_replays_the_layers_and_changes_no_bit(name: str) -> None:
    plain, checkpointed = build(name, checkpointing=False), build(name, checkpointing=True)
    calls = []
    for module in checkpointed.model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    for method in (plain, checkpointed):
        step(method, batch())
    assert len(calls) == (6 if name == "lomo-clipped" else 4)  # two layers; LOMO clips by a second backward pass
    assert changed(weights(plain.model), checkpointed.model) == set()
    checkpointed.finish()
    calls.clear()
    loss_of(checkpointed, batch()).backward()
    assert len(calls) == 2


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_a_missing_package_is_told_with_the_command(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [module for module in sys.modules if module.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(GradLiteError, match=rf"method '{name}' needs .*; run `pip install .*`\.$"):
        build(name)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (("galroe", {}), "unknown method 'galroe'; did you mean 'galore'?"),
        (("galore", {"rnak": 4}), "method 'galore' has no option 'rnak'; did you mean 'rank'?"),
        (("galore", {"rank": 0}), "method 'galore': rank is 0, but it should be greater than or equal to 1."),
        (("adamw", {"lr": math.nan}), "method 'adamw': lr is nan, but it should be a finite number."),
        (("adamw", {"eps": math.inf}), "method 'adamw': eps is inf, but it should be a finite number."),
        (("apollo", {"scale_type": "row"}), "method 'apollo': scale_type is 'row', but it should be 'channel' or 'tensor'."),
        (("gradlite", {"rnak": 4}), "unknown keyword 'rnak'; did you mean 'rank'?"),
        (("gradlite", {"checkpointing": True}), "unknown keyword 'checkpointing'; known are"),
        (("galore", {"target_modules": ["conv"]}), "no trainable linear layer with 'conv' in its name"),
        (("lora", {"target_modules": ["conv"]}), "method 'lora' does not fit LlamaForCausalLM"),
    ],
)
def test_what_does_not_fit_is_told_in_a_sentence(call: tuple[str, dict[str, Any]], sentence: str) -> None:
    with pytest.raises(GradLiteError) as caught:
        gradlite.methods.build(call[0], llama(), **{"lr": 1e-3, **call[1]})
    assert sentence in str(caught.value)


def test_a_fused_backward_pass_that_raises_may_be_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after running out of memory, with a smaller batch."""
    method = build("lomo", lr=1e-3)
    own = method._fused_backward  # type: ignore[attr-defined]

    def fail(_loss: object) -> bool:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(method, "_fused_backward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        method.backward(loss_of(method, batch()))
    monkeypatch.setattr(method, "_fused_backward", own)
    method.zero_grad()
    method.backward(loss_of(method, batch()))
    method.step()
    assert method.skipped_steps == 0


@pytest.mark.parametrize("call", [gradlite.methods.build, gradlite.methods.check_options])
def test_sides_that_apollo_cannot_scale_by_channels_are_refused(call: Any) -> None:
    """Its package would scale the wrong dimension, or fail in the first step."""
    arguments: Any = (llama(),) if call is gradlite.methods.build else ()
    options: dict[str, Any] = {"proj_type": "reverse_std"}
    with pytest.raises(GradLiteError, match="proj_type 'reverse_std' needs scale_type 'tensor'"):
        call("apollo", *arguments, **({"lr": 1e-3, **options} if arguments else {"options": options}))
    gradlite.methods.check_options("apollo", {**options, "scale_type": "tensor"})


def test_what_is_no_model_and_a_model_that_is_attached_are_refused() -> None:
    for wrong in (None, "smollm2"):
        with pytest.raises(GradLiteError, match=rf"method 'adamw' needs a model \(torch\.nn\.Module\), not {wrong!r}\.$"):
            gradlite.methods.build("adamw", wrong, lr=1e-3)  # type: ignore[arg-type]
    model = llama()
    gradlite.attach(model)
    names = list(model.state_dict())
    with pytest.raises(GradLiteError, match=r"GradLite is attached to; call gradlite\.detach\(model\) first\.$"):
        gradlite.methods.build("lora", model, lr=1e-3)
    assert list(model.state_dict()) == names
    gradlite.methods.build("lora", gradlite.detach(model), lr=1e-3)


def test_a_model_without_checkpointing_and_one_without_layers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(GradLiteError, match="Sequential has no gradient checkpointing"):
        gradlite.methods.build("adamw-checkpointed", model, lr=1e-3)
    with pytest.raises(GradLiteError, match=r"'badam' finds no 'layers\.0'"):
        gradlite.methods.build("badam", model, lr=1e-3)
    with pytest.raises(GradLiteError, match="adapts models of transformers, not Sequential"):
        gradlite.methods.build("lora", model, lr=1e-3)
    with pytest.raises(GradLiteError, match="no parameter with requires_grad"):
        gradlite.methods.build("adamw", model.requires_grad_(False), lr=1e-3)


def test_badams_head_alone_is_trained_without_the_embedding() -> None:
    for is_tied in (False, True):  # where both are one tensor it is trained
        model = llama()
        if not is_tied:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        trained = {id(one) for one in gradlite.methods.build("badam", model, lr=1e-3, include_lm_head=True).trained()}
        assert {id(model.lm_head.weight), id(model.model.norm.weight)} <= trained
        assert (id(model.model.embed_tokens.weight) in trained) == is_tied


def test_a_refused_adalomo_leaves_the_model_as_it_was() -> None:
    model = llama()
    model.stacked = nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(GradLiteError, match="'stacked' has 3 dimensions"):
        gradlite.methods.build("adalomo", model, lr=1e-3, checkpointing=True)
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert model.config.use_cache is True


def test_checkpointing_gives_the_configurations_cache_back() -> None:
    for used in (False, True):
        model = llama()
        model.config.use_cache = used
        method = gradlite.methods.build("adamw-checkpointed", model, lr=1e-3)
        assert model.config.use_cache is False
        method.finish()
        assert model.config.use_cache is used


def test_badam_goes_on_with_the_blocks_in_the_order_drawn_before() -> None:
    def six_layers(seed: int) -> Method:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=6, num_attention_heads=1,
            num_key_value_heads=1, max_position_embeddings=32,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        torch.manual_seed(seed)  # of the order
        return build("badam", model, switch_block_every=1)

    method = six_layers(seed=1)
    step(method, batch())
    saved = saved_and_loaded([method.model.state_dict(), method.state_dict()])
    resumed = six_layers(seed=2)
    resumed.model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(4):
        step(method, batch())
        step(resumed, batch())
        assert changed(weights(method.model), resumed.model) == set()


def test_the_docs_name_every_option() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    rows = [line.split("|")[1:3] for line in page.split("## Options")[1].splitlines() if line.startswith("| ")]
    for name in set(gradlite.methods.names()) - {"gradlite"}:
        for option in gradlite.methods._known(gradlite.methods._factory(name)):
            mine = [(who.startswith(" all but") != (f"`{name}`" in who)) and f"`{option}`" in what for who, what in rows]
            assert any(mine), (name, option)


def test_names_are_known_without_torch() -> None:
    code = "import sys, gradlite.methods; gradlite.methods.names(); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(gradlite.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
