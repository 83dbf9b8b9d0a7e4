"""PEFT's LoRA structured: gradients, losses, files and refusals, on small random models."""

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import gradlite
from gradlite import GradLiteError
from gradlite.attaching import tiles_its_loss
from gradlite.attaching.lora_twins import TwinFourBitLinear, TwinLoraLinear, TwinTiledMLP
from gradlite.ops import token_tiles
from gradlite.ops.lora import dora_scale

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated", "ignore:.gradient_checkpointing_enable"
)

Build = Callable[..., nn.Module]
Tokens = dict[str, Tensor]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(token_tiles.TILE_TOKENS, "cpu", 7)


@pytest.fixture
def lora(build: Build) -> Callable[..., Any]:
    """``lora("llama", **LoraConfig's)``: a PEFT model whose adapters are no zeros, the same one every time."""

    def make(name: str = "llama", dtype: torch.dtype = torch.float32, cast: bool = False, **options: Any) -> Any:
        settings = {"r": 3, "lora_alpha": 5, "target_modules": SEVEN, **options}
        model = peft.get_peft_model(build(name, dtype), peft.LoraConfig(**settings), autocast_adapter_dtype=cast)
        torch.manual_seed(3)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data = 0.3 * torch.randn_like(parameter)
            elif "lora_magnitude" in key:
                parameter.data *= 1.0 + 0.2 * torch.rand_like(parameter)
        return model.train()

    return make


def backward(model: Any, tokens: Tokens, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    loss: Tensor = model(**tokens, use_cache=False).loss
    loss.backward()
    return loss.detach()


def same_gradients(model: Any, plain: Any, tolerance: float) -> None:
    found, wanted = ({key: p.grad for key, p in each.named_parameters() if p.grad is not None} for each in (model, plain))
    assert found.keys() == wanted.keys()
    assert wanted
    for name, exact in wanted.items():
        assert found[name].dtype == exact.dtype
        assert (found[name] - exact).norm() <= tolerance * exact.norm(), name


def compare(plain: Any, tokens: Tokens, tolerance: float = 1e-5, **options: Any) -> Any:
    model = gradlite.structured_lora(copy.deepcopy(plain), **options)
    losses = backward(model, tokens), backward(plain, tokens)
    torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
    same_gradients(model, plain, tolerance)
    return model


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", ["recompute", "exact", {"model.layers.0": "recompute", "*": "exact"}])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_gradients_equal_pefts(name: str, hold: Any, lora: Any, tokens: Tokens) -> None:
    model = compare(lora(name), tokens, hold=hold)
    twins = [module for module in model.modules() if isinstance(module, TwinLoraLinear)]
    assert len(twins) == 14


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "mistral", "olmo2"])
def test_other_families(name: str, lora: Any, tokens: Tokens) -> None:
    compare(lora(name), tokens)


def test_fused_projections(lora: Any, tokens: Tokens) -> None:
    model = compare(lora("phi3", target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]), tokens)
    assert any(isinstance(module, TwinTiledMLP) for module in model.modules())


def test_layers_of_another_kind_keep_pefts_code(lora: Any, tokens: Tokens) -> None:
    """GPT-2's Conv1D, and an embedding."""
    with pytest.raises(GradLiteError, match="no linear layer with the LoRA adapter"):
        gradlite.structured_lora(lora("gpt2", target_modules=["c_attn"], fan_in_fan_out=True))
    compare(lora(target_modules=["q_proj", "embed_tokens"]), tokens)


SMALL: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4, "resid_pdrop": 0.0},
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 4},
    "gpt_neo": {"hidden_size": 48, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                "max_position_embeddings": 32, "resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0},
    "falcon": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "new_decoder_architecture": False},
}  # fmt: skip


def family(name: str, tokens: Tokens) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    ids = {"vocab_size": int(tokens["input_ids"].max()) + 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL[name], **ids))
    return peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)).train()


@pytest.mark.parametrize("inputs", ["every block", "every second"])
@pytest.mark.parametrize("name", SMALL)
def test_models_whose_loss_is_their_own_and_whose_blocks_fill_a_cache(name: str, inputs: str, tokens: Tokens) -> None:
    """A replay must not append keys and values a second time; Falcon adds its residual in place."""
    plain = family(name, tokens)
    structured = gradlite.structured_lora(copy.deepcopy(plain), inputs=inputs)  # type: ignore[arg-type]
    losses = [model(**tokens).loss for model in (structured, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    same_gradients(structured, plain, 1e-5)


@pytest.mark.parametrize("inputs", ["every block", "every second"])
def test_what_a_hook_changes_between_two_blocks_is_kept(inputs: str, lora: Any, tokens: Tokens) -> None:
    """In place: the tensor is the same, and the block before it would make another."""
    plain = lora()
    for block in plain.get_base_model().model.layers:

        def steer(_module: Any, _inputs: Any, output: Any) -> None:
            (output if isinstance(output, torch.Tensor) else output[0]).mul_(1.5)

        block.register_forward_hook(steer)
    compare(plain, tokens, inputs=inputs)


def test_a_replayed_block_takes_no_filled_cache(lora: Any, tokens: Tokens) -> None:
    model = gradlite.structured_lora(lora(), hold="recompute")
    ids = tokens["input_ids"]
    with torch.no_grad():
        cache = model.eval()(input_ids=ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == ids.shape[1]
    with pytest.raises(GradLiteError, match="without past_key_values"):
        model.train()(input_ids=ids, labels=ids, past_key_values=cache)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "rank_pattern": {"q_proj": 5, "layers.1.mlp.down_proj": 1}, "alpha_pattern": {"q_proj": 9}},
        {"bias": "all"},
        {"use_dora": True},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj"], "layers_to_transform": [1]},
        {"target_modules": [*SEVEN, "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 7]},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_options_of_lora(name: str, options: dict[str, Any], lora: Any, tokens: Tokens) -> None:
    compare(lora(name, **options), tokens)


def test_a_bias_beside_b(lora: Any, tokens: Tokens) -> None:
    """Of layers that have one: PEFT warns of others."""
    compare(lora("qwen2", lora_bias=True, target_modules=["q_proj", "k_proj", "v_proj"]), tokens)


@pytest.mark.parametrize("hold", ["recompute", "exact"])
def test_dropout_draws_pefts_numbers(hold: Any, lora: Any, tokens: Tokens) -> None:
    plain = lora(lora_dropout=0.3)
    compare(plain, tokens, hold=hold)
    gradients = [p.grad.clone() for p in plain.parameters() if p.grad is not None]
    plain.zero_grad()
    backward(plain, tokens, seed=1)
    assert any((p.grad - g).norm() > 0.05 * g.norm() for p, g in zip(trained(plain), gradients, strict=True))


def trained(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.grad is not None]


def mean_error(model: Any, exact: Any) -> float:
    errors = [(p.grad - q.grad).norm() / q.grad.norm() for p, q in zip(trained(model), trained(exact), strict=True)]
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("layers", [2, 5])
def test_every_second_input_kept(layers: int, dropout: float, build: Build, tokens: Tokens) -> None:
    """The same bits as with every input kept; blocks without an input run once more."""
    gradients, runs = [], []
    for inputs in ("every block", "every second"):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=3, target_modules=SEVEN, lora_dropout=dropout, init_lora_weights=False)
        plain = peft.get_peft_model(build(num_hidden_layers=layers), config)
        model = gradlite.structured_lora(plain, inputs=inputs).train()
        calls: list[int] = []
        for module in model.modules():
            if type(module).__name__ == "LlamaAttention":
                module.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        backward(model, tokens)
        gradients.append([p.grad for p in trained(model)])
        runs.append(len(calls))
    assert all(torch.equal(p, q) for p, q in zip(*gradients, strict=True))
    assert runs == [2 * layers, 2 * layers + layers // 2]


def test_every_second_input_where_attention_drops(build: Build, tokens: Tokens) -> None:
    """By a number and not by a module: the block that runs again must draw what it drew."""
    config = peft.LoraConfig(r=3, target_modules=SEVEN, init_lora_weights=False)
    plain = peft.get_peft_model(build(attention_dropout=0.3), config).train()
    compare(plain, tokens, inputs="every second")


def test_every_second_input_holds_half(build: Build) -> None:
    """Tensors that live between forward and backward, without those of autograd's parameters."""
    ids = torch.randint(3, 50, (2, 9))
    counts = []
    for inputs in ("every block", "every second"):
        plain = peft.get_peft_model(build(num_hidden_layers=6), peft.LoraConfig(r=3, target_modules=SEVEN))
        model = gradlite.structured_lora(plain, inputs=inputs)
        loss = model(input_ids=ids, labels=ids).loss
        gc.collect()
        alive = [one for one in gc.get_objects() if type(one) is Tensor and one.shape in ((2, 9, 32), (18, 32))]
        counts.append(len({one.untyped_storage().data_ptr() for one in alive}))
        del alive, loss, model, plain
        gc.collect()
    assert counts[0] - counts[1] == 3


def test_h_kept(lora: Any, tokens: Tokens) -> None:
    compare(lora(), tokens, store_h=True)


def test_accumulation_and_clipping(lora: Any, tokens: Tokens) -> None:
    plain = lora()
    model = gradlite.structured_lora(copy.deepcopy(plain))
    norms = []
    for each in (model, plain):
        for seed in range(2):
            backward(each, tokens, seed)
        norms.append(torch.nn.utils.clip_grad_norm_(each.parameters(), 0.01))
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    same_gradients(model, plain, 1e-5)


def like(tokens: Tokens, number: int) -> list[Tokens]:
    """Batches of other tokens where there are labels: one batch's rounding is a matter of luck, that of several is not."""
    scored, batches = tokens["labels"] >= 0, []
    for seed in range(number):
        drawn = torch.randint(3, 48, scored.shape, generator=torch.Generator().manual_seed(seed))
        ids, labels = (torch.where(scored, drawn, tokens[key]) for key in ("input_ids", "labels"))
        batches.append({**tokens, "input_ids": ids, "labels": labels})
    return batches


def test_bfloat16_and_wide_adapters(lora: Any, tokens: Tokens) -> None:
    """Against the exact gradient, no worse than PEFT's own rounding."""
    errors = dict.fromkeys([("ours", False), ("plain", False), ("ours", True), ("plain", True)], 0.0)
    for batch in like(tokens, 8):
        exact = lora()
        backward(exact, batch)
        for cast in (False, True):
            plain = lora(dtype=torch.bfloat16, cast=cast)
            for name, each in (("ours", gradlite.structured_lora(copy.deepcopy(plain))), ("plain", plain)):
                backward(each, batch)
                errors[name, cast] += mean_error(each, exact) / 8
    for cast in (False, True):
        assert errors["ours", cast] <= 1.1 * errors["plain", cast] <= 0.2


def test_wide_biases_of_adapters(lora: Any, tokens: Tokens) -> None:
    """PEFT's default: bfloat16 weights, float32 adapters; the bias of B is added to the layer's own."""
    options = {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    ours, own = 0.0, 0.0
    for batch in like(tokens, 8):
        exact = lora("qwen2", **options)
        plain = lora("qwen2", dtype=torch.bfloat16, cast=True, **options)
        model = gradlite.structured_lora(copy.deepcopy(plain))
        for each in (exact, plain, model):
            backward(each, batch)
        ours, own = ours + mean_error(model, exact) / 8, own + mean_error(plain, exact) / 8
    assert ours <= 1.1 * own <= 0.2


def test_a_new_doras_scale_is_one_under_autocast(lora: Any, tokens: Tokens) -> None:
    """Rounded norms would bend every layer from the first step on."""
    plain = lora(use_dora=True)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    layer = plain.get_base_model().model.layers[0].mlp.up_proj
    magnitude = layer.lora_magnitude_vector["default"]
    magnitude.weight.data = layer.base_layer.weight.norm(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        scale = dora_scale(
            layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight, magnitude.weight, 1.0
        )
    torch.testing.assert_close(scale, torch.ones_like(scale), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_autocast(options: dict[str, Any], lora: Any) -> None:
    """Against the exact gradient, no worse than PEFT's own rounding."""
    errors = []
    for batch in torch.randint(3, 50, (5, 2, 9), generator=torch.Generator().manual_seed(0)):
        exact, plain, model = lora(**options), lora(**options), gradlite.structured_lora(lora(**options))
        tokens = {"input_ids": batch, "labels": batch}
        backward(exact, tokens)
        for each in (model, plain):
            with torch.autocast("cpu", torch.bfloat16):
                backward(each, tokens)
        errors.append([mean_error(model, exact), mean_error(plain, exact)])
    ours, pefts = torch.tensor(errors).median(0).values
    assert ours <= 1.2 * pefts <= 0.1


def test_switched_off_merged_and_second_adapters_run_pefts_code(lora: Any, tokens: Tokens) -> None:
    plain = lora()
    model = gradlite.structured_lora(copy.deepcopy(plain))
    with torch.no_grad():
        with model.disable_adapter(), plain.disable_adapter():
            torch.testing.assert_close(model(**tokens).loss, plain(**tokens).loss)
        model.merge_adapter()
        plain.merge_adapter()
        torch.testing.assert_close(model(**tokens).loss, plain(**tokens).loss)
        model.unmerge_adapter()
        plain.unmerge_adapter()
    first = float(plain(**tokens).loss.detach())
    for each in (model, plain):
        torch.manual_seed(5)
        each.add_adapter("second", peft.LoraConfig(r=2, target_modules=SEVEN, init_lora_weights=False))
        each.set_adapter("second")
        backward(each, tokens)
    assert abs(float(plain(**tokens).loss.detach()) - first) > 1e-4
    torch.testing.assert_close(model(**tokens).loss, plain(**tokens).loss)
    assert all(".second." in name for name, p in plain.named_parameters() if p.grad is not None)
    same_gradients(model, plain, 1e-5)


# ---- training, files, undoing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}, {"use_dora": True}], ids=["plain", "dropout", "dora"])
def test_fifty_steps_are_the_same(options: dict[str, Any], lora: Any) -> None:
    plain = lora("qwen2", **options)
    with torch.no_grad():  # embeddings of a usual size: norms of tiny ones blow up roundings
        plain.get_base_model().model.embed_tokens.weight *= 50
    model = gradlite.structured_lora(copy.deepcopy(plain))
    curves = []
    for each in (model, plain):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-3)
        batches, curve = torch.randint(3, 12, (4, 2, 9), generator=torch.Generator().manual_seed(1)), []
        for step in range(50):
            ids = batches[step % 4]
            loss = each(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(float(loss.detach()))
        curves.append(torch.tensor(curve))
    assert curves[1][-1] < 0.99 * curves[1][0]
    torch.testing.assert_close(curves[0][:10], curves[1][:10], rtol=2e-5, atol=0)
    torch.testing.assert_close(*curves, rtol=1e-3, atol=0)  # Adam makes whole steps of the last bits of tiny gradients


def test_the_adapter_is_saved_as_always(lora: Any, build: Build, tokens: Tokens, tmp_path: Path) -> None:
    plain = lora()
    model = gradlite.structured_lora(copy.deepcopy(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(), str(tmp_path))
    with torch.no_grad():
        ids = tokens["input_ids"]
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits)


def test_undo(lora: Any, tokens: Tokens) -> None:
    plain = lora()
    model = copy.deepcopy(plain)
    assert gradlite.structured_lora(model) is model
    assert gradlite.structured_lora(model) is model  # again: replaces its earlier work
    backward(model, tokens)
    assert gradlite.undo_structured_lora(model) is model
    for (name, module), other in zip(model.named_modules(), plain.modules(), strict=True):
        assert type(module) is type(other), name
        assert not [key for key in module.__dict__ if "gradlite" in key], name
        assert len(module._forward_hooks) == len(other._forward_hooks)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert gradlite.undo_structured_lora(plain) is plain


def test_copies_and_pickles(lora: Any, tokens: Tokens) -> None:
    plain = lora()
    model = gradlite.structured_lora(copy.deepcopy(plain))
    backward(plain, tokens)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        backward(other, tokens)
        same_gradients(other, plain, 1e-5)


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_blocks_leave_nothing_with_autograd(lora: Any, build: Build, tokens: Tokens, held_bytes: Callable[..., int]) -> None:
    """What autograd saves does not grow with the number of blocks: their inputs lie in the replays, nothing else waits."""
    held = []
    for layers in (1, 4):
        plain = peft.get_peft_model(build(num_hidden_layers=layers), peft.LoraConfig(r=3, target_modules=SEVEN))
        model = gradlite.structured_lora(plain)
        held.append(held_bytes(lambda model=model: model(**tokens).loss, model.parameters()))
    assert held[0] == held[1]


def test_tiles_hold_less_than_a_whole_mlp(lora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most rows that any product of the MLP sees in forward and backward."""
    seen: list[int] = []
    model = gradlite.structured_lora(lora())
    own = TwinLoraLinear.forward

    def watch(self: Any, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if self.in_features == 48:
            seen.append(x.shape[:-1].numel())
        return own(self, x, *arguments, **keywords)

    monkeypatch.setattr(TwinLoraLinear, "forward", watch)
    ids = torch.randint(3, 50, (1, 20))
    model(input_ids=ids, labels=ids).loss.backward()
    assert max(seen) <= 7
    assert sum(seen) == 2 * 2 * 20  # forward, and once more in backward: the block's own replay stops before its MLP


# ---- four bits ------------------------------------------------------------------------------------------------------


def test_base_in_four_bits(lora: Any, tokens: Tokens) -> None:
    """Gradients equal those of a model with the rounded weights; undoing gives these back."""
    plain = lora()
    model = gradlite.structured_lora(copy.deepcopy(plain), base="int4")
    linears = [module for module in model.modules() if isinstance(module, TwinFourBitLinear)]
    assert len(linears) == 14
    assert not any(isinstance(getattr(module, "_parameters", {}).get("weight"), nn.Parameter) for module in linears)
    loss = backward(model, tokens)
    rounded = gradlite.undo_structured_lora(copy.deepcopy(model))
    rounded.zero_grad()
    torch.testing.assert_close(backward(rounded, tokens), loss, rtol=1e-5, atol=0)
    same_gradients(model, rounded, 1e-5)
    errors = [
        float((p - q).norm() / q.norm())
        for (key, p), q in zip(rounded.named_parameters(), plain.parameters(), strict=True)
        if "base_layer.weight" in key
    ]
    assert 0.01 < max(errors) < 0.15
    assert type(rounded.get_base_model().model.layers[0].mlp.gate_proj.base_layer) is nn.Linear


def test_four_bit_weights_are_neither_merged_nor_saved(lora: Any, tokens: Tokens, tmp_path: Path) -> None:
    model = gradlite.structured_lora(lora(), base="int4")
    with pytest.raises(GradLiteError, match="undo_structured_lora"):
        model.merge_adapter()
    with pytest.raises(GradLiteError, match="undo_structured_lora"):
        model.get_base_model().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    merged = gradlite.undo_structured_lora(model).merge_and_unload()
    merged.save_pretrained(tmp_path / "model")
    loaded = type(merged).from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded(**tokens).loss, merged(**tokens).loss)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_refusals(lora: Any, build: Build) -> None:
    def refused(model: Any, match: str) -> None:
        with pytest.raises(GradLiteError, match=match):
            gradlite.structured_lora(model)
        assert not any(isinstance(module, TwinLoraLinear) for module in model.modules())

    refused(build(), "takes a PEFT model, not LlamaForCausalLM")
    ia3 = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    refused(peft.get_peft_model(build(), ia3), "IA3")
    refused(lora(use_dora=True, lora_dropout=0.1), "DoRA with dropout")
    model = lora()
    model.merge_adapter()
    refused(model, "merged")
    model = lora()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    refused(model, "are active")
    model = lora()
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_()
    refused(model, r"q_proj\.base_layer\.weight is trainable")
    base = build()
    gradlite.attach(base, rank=4)
    refused(peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])), "gradlite.detach")
    model = lora()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    refused(model, "gradient_checkpointing_disable")
    with pytest.raises(GradLiteError, match="unknown; choose one of"):
        gradlite.structured_lora(lora(), hold="none")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"base": "int-4"}, "base is 'int-4', but it must be 'as it is' or 'int4'"),
        ({"inputs": "foo"}, "inputs is 'foo'"),
        ({"store_h": "no"}, "store_h is 'no'"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"inputs": "every second", "hold": "exact"}, "with hold='exact' none is"),
        ({"inputs": "every second", "hold": {"*": "exact"}}, "none is; leave one out"),
        ({"hold": "projected"}, "hold='projected' is for weights that train"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], match: str, lora: Any) -> None:
    with pytest.raises(GradLiteError, match=match):
        gradlite.structured_lora(lora(), **options)


def test_what_cannot_be_kept_in_four_bits_is_refused_before_anything_changes(build: Build, tokens: Tokens) -> None:
    odd = peft.get_peft_model(build(intermediate_size=45), peft.LoraConfig(r=3, target_modules=["q_proj"]))
    with pytest.raises(GradLiteError, match=r"layers\.0\.mlp\.down_proj cannot be kept in four bits: its width 45 is odd"):
        gradlite.structured_lora(odd, base="int4")
    assert not any(isinstance(module, (TwinLoraLinear, TwinFourBitLinear)) for module in odd.modules())
    compare(odd.train(), tokens)


def test_layers_that_are_linear_by_another_name(tokens: Tokens) -> None:
    """Falcon's are kept in four bits as any other; what computes something else keeps PEFT's code."""
    plain = family("falcon", tokens)
    model = gradlite.structured_lora(copy.deepcopy(plain), base="int4")
    assert sum(isinstance(module, TwinFourBitLinear) for module in model.modules()) == 8
    rounded = gradlite.undo_structured_lora(copy.deepcopy(model))
    losses = [backward(each, tokens) for each in (model, rounded)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    same_gradients(model, rounded, 1e-5)

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    strange = family("falcon", tokens)
    layer = strange.get_base_model().transformer.h[0].mlp.dense_h_to_4h.base_layer
    layer.__class__ = Doubled
    compare(strange, tokens)


def test_undoing_through_the_inner_model(lora: Any, tokens: Tokens) -> None:
    model = gradlite.structured_lora(lora(), base="int4")
    gradlite.undo_structured_lora(model.get_base_model())
    plain = copy.deepcopy(model)
    assert not any(isinstance(module, (TwinLoraLinear, TwinFourBitLinear)) for module in model.modules())
    compare(plain, tokens)


@pytest.mark.parametrize("rank", [3, 24])
def test_structured_and_attached_exclude_each_other(rank: int, lora: Any, tokens: Tokens) -> None:
    plain = lora(r=rank)
    wanted = backward(copy.deepcopy(plain), tokens)
    model = gradlite.structured_lora(copy.deepcopy(plain))
    with pytest.raises(GradLiteError, match="undo_structured_lora"):
        gradlite.attach(model, rank=2)
    torch.testing.assert_close(backward(model, tokens), wanted, rtol=1e-5, atol=0)
    gradlite.undo_structured_lora(model)
    if rank == 24:  # adapters large enough to be projected
        gradlite.attach(model, rank=2)
        with pytest.raises(GradLiteError, match=r"gradlite\.detach"):
            gradlite.structured_lora(model)


def test_trainers_see_that_the_loss_is_tiled(lora: Any, tokens: Tokens) -> None:
    model = lora()
    assert not tiles_its_loss(model)
    assert tiles_its_loss(gradlite.structured_lora(model))
    assert model(**tokens).logits is None


# ---- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from within the compiler
@pytest.mark.parametrize("name", ["smollm2", "qwen2.5-0.5b"])
def test_whole_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M itself; Qwen2.5-0.5B's shape with random weights. One model: PEFT's gradients first, then the structured."""
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setitem(token_tiles.TILE_TOKENS, "cpu", 128)

    torch.manual_seed(0)
    if name == "smollm2":
        from gradlite.train.models import load_model_and_tokenizer

        base, _ = load_model_and_tokenizer("smollm2", "float32")
    else:
        config = AutoConfig.for_model(
            "qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True,
        )  # fmt: skip
        base = AutoModelForCausalLM.from_config(config)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=SEVEN))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.02)
    model.train()
    ids = torch.randint(0, model.config.vocab_size, (1, 96), generator=torch.Generator().manual_seed(0))
    tokens = {"input_ids": ids, "labels": ids}
    wanted_loss = backward(model, tokens)
    wanted = [p.grad for p in trained(model)]
    model.zero_grad()
    loss = backward(gradlite.structured_lora(model), tokens)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=0)
    for found, exact in zip(trained(model), wanted, strict=True):
        assert (found.grad - exact).norm() <= 3e-5 * exact.norm()
    whole, exactly = (torch.cat([grad.flatten() for grad in each]) for each in ([p.grad for p in trained(model)], wanted))
    assert (whole - exactly).norm() <= 1e-5 * exactly.norm()
