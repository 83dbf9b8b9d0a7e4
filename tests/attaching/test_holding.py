"""Ways of holding on a whole model: whatever users do with it, it trains as unattached, and nothing is left behind."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import gradlite
from gradlite.attaching import attachment_of, blocks
from gradlite.attaching.attachment import Attachment
from gradlite.attaching.holding import HoldMode, HoldPlan
from gradlite.hold.codec import EXACT, INT8
from gradlite.train import config, fields

Build = Callable[..., nn.Module]
Tokens = dict[str, Tensor]
Check = Callable[..., None]

HOLDS: tuple[Any, ...] = ("exact", "recompute", "int8")
EXACT_HOLDS: tuple[Any, ...] = ("exact", "recompute")


def attachment(model: nn.Module) -> Attachment:
    found = attachment_of(model)
    assert found is not None
    return found


def backward(model: nn.Module, tokens: Tokens, **more: Any) -> Tensor:
    loss: Tensor = model(**tokens, **more).loss
    loss.backward()
    return loss.detach()


def test_a_replay_keeps_the_random_state_of_the_tensors_device(
    build: Build, attached: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoint looks for devices in positional tensors, and blocks get theirs by name."""
    seen: list[set[torch.device]] = []

    def spy(function: Any, *arguments: Any, **options: Any) -> Any:
        seen.append({one.device for one in arguments if isinstance(one, Tensor)})
        return checkpoint(function, *arguments, **options)

    monkeypatch.setattr(blocks, "checkpoint", spy)
    backward(attached(build(), "recompute"), tokens)
    assert seen
    assert all(torch.device("cpu") in devices for devices in seen)


def test_a_norm_without_weights_may_be_changed_in_place() -> None:
    norm = nn.LayerNorm(24, elementwise_affine=False)
    plain = nn.Sequential(nn.Linear(24, 24), norm, nn.Hardtanh(-0.5, 0.5, inplace=True), nn.Linear(24, 8))
    model = copy.deepcopy(plain)
    gradlite.attach(model, rank=24)
    x = torch.randn(5, 24)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for one, own in zip((model, plain), inputs, strict=True):
        one(own).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


# ---- inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", EXACT_HOLDS)
@pytest.mark.parametrize("case", ["left", "packed", "none", "all", "long window"])
def test_padding_and_packing(case: str, hold: Any, build: Build, attached: Any, tokens: Tokens, same_gradients: Check) -> None:
    plain = build("mistral") if case == "long window" else build()
    model = attached(plain, hold)
    if case == "left":
        tokens["attention_mask"] = tokens["attention_mask"].flip(1)
        tokens["labels"] = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    elif case == "packed":
        del tokens["attention_mask"]
        tokens["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)
    elif case != "all":
        del tokens["attention_mask"]
    # With a cache, which nobody needs in training, transformers does not look for packed sequences.
    losses = [backward(model, tokens), backward(plain, tokens, use_cache=False)]
    torch.testing.assert_close(*losses, rtol=2e-6, atol=0)
    same_gradients(model, plain, 1e-5)


def test_no_labelled_token(build: Build, attached: Any, tokens: Tokens) -> None:
    """A mean over nothing is NaN, as transformers' own; a sum is zero."""
    plain = build()
    model = attached(plain)
    tokens["labels"].fill_(-100)
    assert torch.isnan(plain(**tokens).loss)
    assert torch.isnan(model(**tokens).loss)
    loss = model(**tokens, num_items_in_batch=7).loss
    assert loss == 0
    loss.backward()


@pytest.mark.parametrize("count", [5, torch.tensor(5)])
def test_num_items_in_batch_and_other_keywords(
    count: Any, build: Build, attached: Any, tokens: Tokens, same_gradients: Check
) -> None:
    plain = build()
    model = attached(plain)
    shifted = {**tokens, "shift_labels": torch.nn.functional.pad(tokens["labels"], (0, 1), value=-100)[:, 1:].contiguous()}
    for inputs, more in ((tokens, {"num_items_in_batch": count}), (shifted, {"output_hidden_states": True})):
        outputs = [each(**inputs, **more) for each in (model, plain)]
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=2e-6, atol=0)
        for output in outputs:
            output.loss.backward()
        assert outputs[0].logits is None
        assert (outputs[0].hidden_states is None) == (outputs[1].hidden_states is None)
    same_gradients(model, plain, 1e-5)


def test_embeddings_as_inputs_and_positional_arguments(build: Build, attached: Any, tokens: Tokens) -> None:
    plain = build()
    model = attached(plain)
    embeds = plain.get_input_embeddings()(tokens["input_ids"]).detach()  # type: ignore[operator]
    inputs = {"inputs_embeds": embeds, "labels": tokens["labels"]}
    torch.testing.assert_close(model(**inputs).loss, plain(**inputs).loss, rtol=2e-6, atol=0)
    arguments = (tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(model(*arguments, labels=arguments[0]).loss, plain(*arguments, labels=arguments[0]).loss)
    torch.testing.assert_close(model(*arguments).logits, plain(*arguments).logits, rtol=1e-5, atol=1e-6)


def test_what_is_asked_for_beside_the_loss(build: Build, attached: Any, tokens: Tokens) -> None:
    """A loss of one's own, tuples, and logits of some places come from the model's own code."""
    plain = build()
    model = attached(plain)
    with torch.no_grad():
        for more in ({"logits_to_keep": 9}, {"return_dict": False}):
            found, wanted = (each(**tokens, **more)[:2] for each in (model, plain))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        model.loss_function = lambda logits, labels, **_: logits.sum() + labels.sum()
        output = model(**tokens)
        torch.testing.assert_close(output.loss, output.logits.sum() + tokens["labels"].sum())


def test_models_and_heads_of_ones_own_keep_their_own_loss(build: Build, tokens: Tokens) -> None:
    """Whatever stands between the last hidden state and the loss must not be passed over."""
    from transformers import LlamaForCausalLM

    class Scaled(LlamaForCausalLM):
        def forward(self, *arguments: Any, labels: Tensor, **keywords: Any) -> Any:
            output = super().forward(*arguments, **keywords)
            output.loss = self.loss_function(3.0 * output.logits, labels, self.config.vocab_size)
            return output

    class LoudHead(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 20.0 * super().forward(x)

    subclass, loud, hooked = build(), build(), build()
    subclass.__class__ = Scaled
    loud.get_submodule("lm_head").__class__ = LoudHead
    hooked.get_submodule("lm_head").register_forward_hook(lambda _module, _inputs, logits: 3.0 * logits)
    for model in (subclass, loud, hooked):
        wanted = model(**tokens).loss
        gradlite.attach(model, rank=4)
        output = model(**tokens)
        torch.testing.assert_close(output.loss, wanted, rtol=1e-5, atol=0)
        assert output.logits is not None


# ---- what users do with a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_autocast(name: str, hold: Any, build: Build, attached: Any, tokens: Tokens, cosine: Callable[..., float]) -> None:
    plain = build(name)
    truth, model = copy.deepcopy(plain), attached(plain, hold)
    backward(truth, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [each(**tokens).loss for each in (model, plain)]
    torch.testing.assert_close(*losses, rtol=2e-3, atol=0)
    for loss in losses:
        loss.backward()
    assert 1 - cosine(model, truth) < 2 * (1 - cosine(plain, truth)) + 1e-4


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_users_own_checkpointing(
    use_reentrant: bool, hold: Any, build: Build, attached: Any, tokens: Tokens, same_gradients: Check, cosine: Any
) -> None:
    plain = build()
    model = attached(plain, hold)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    for each in (model, plain):
        backward(each, tokens)
    if hold == "int8":
        assert cosine(model, plain) > 0.99
    else:
        same_gradients(model, plain, 1e-5)


@pytest.mark.parametrize("hold", HOLDS)
def test_a_copy_trains_as_the_original(hold: Any, build: Build, attached: Any, tokens: Tokens, same_gradients: Check) -> None:
    model = attached(build(), hold)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        backward(each, tokens)
    same_gradients(twin, model, 0.0)
    ours, theirs = ({id(m.gradlite_holder) for m in each.modules() if hasattr(m, "gradlite_holder")} for each in (model, twin))
    assert not ours & theirs
    assert len(ours) == len(theirs)  # one for each codec, shared as before
    assert attachment(twin).operators.noise is not attachment(model).operators.noise


def test_a_saved_model_is_loaded_by_a_process_that_attached_nothing(
    build: Build, attached: Any, tokens: Tokens, same_gradients: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model = attached(build(), "recompute-int8")
    torch.save(model, tmp_path / "model.pt")
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)  # as another process finds it
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    for each in (model, whole):
        backward(each, tokens)
    same_gradients(whole, model, 0.0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
@pytest.mark.parametrize("hold", ["int8", "recompute"])
def test_a_compiled_model(hold: Any, build: Build, attached: Any, tokens: Tokens, same_gradients: Check) -> None:
    """Graphs cache nothing that is held: codes of every step are those of a model that is not compiled."""
    model = attached(build(num_hidden_layers=1), hold)
    twin = copy.deepcopy(model)
    compiled: Any = torch.compile(twin, backend="eager")
    for _ in range(2):
        for each in (model, compiled):
            each.zero_grad()
            backward(each, tokens)
        same_gradients(twin, model, 1e-5)
    assert attachment(twin).operators.noise.reads == attachment(model).operators.noise.reads


@pytest.mark.parametrize("hold", HOLDS)
def test_detaching_gives_everything_back(hold: Any, family: str, build: Build, tokens: Tokens) -> None:
    model = build(family)
    config = copy.deepcopy(model.config)
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    backward(model, tokens)
    before = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    gradlite.attach(model, rank=4, hold=hold)
    backward(model, tokens)
    assert gradlite.detach(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert model.config._attn_implementation == config._attn_implementation  # type: ignore[union-attr]
    model.zero_grad()
    backward(model, tokens)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, before[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("hold", HOLDS)
def test_generation_and_evaluation_hold_nothing(hold: Any, family: str, build: Build, attached: Any, tokens: Tokens) -> None:
    plain = build(family).eval()
    model = attached(plain, hold)
    prompt = {"input_ids": tokens["input_ids"][:1, :4], "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    texts = [each.generate(**prompt, max_new_tokens=5, do_sample=False) for each in (model, plain)]  # type: ignore[operator]
    assert torch.equal(*texts)
    with torch.no_grad():
        torch.testing.assert_close(model(**tokens).loss, plain(**tokens).loss, rtol=2e-6, atol=0)
        torch.testing.assert_close(model(tokens["input_ids"]).logits, plain(tokens["input_ids"]).logits, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(model(**tokens).loss, plain(**tokens).loss, rtol=2e-6, atol=0)
    assert attachment(model).operators.noise.reads == 0
    assert attachment(model).operators._shelf._entries == []
    backward(model.train(), tokens)  # and training goes on


def test_dropout_is_the_same_in_the_replay(build: Build, attached: Any, tokens: Tokens, same_gradients: Check) -> None:
    """Attention's own dropout too, for which PyTorch's operator steps in."""
    plain = build("gpt2", resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.1)
    models = [plain, *(attached(plain, hold) for hold in EXACT_HOLDS)]
    losses = []
    for model in models:
        torch.manual_seed(11)
        losses.append(backward(model, tokens))
        torch.rand(3)
    for model, loss in zip(models[1:], losses[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=2e-6, atol=0)
        same_gradients(model, plain, 1e-5)
    torch.manual_seed(12)
    assert abs(backward(models[1], tokens) - losses[0]) > 1e-4  # or there was no dropout


@pytest.mark.parametrize("hold", EXACT_HOLDS)
def test_micro_batches_add_up(hold: Any, build: Build, attached: Any, tokens: Tokens, same_gradients: Check) -> None:
    plain = build(dtype=torch.float64)
    whole, halves = attached(plain, hold), attached(plain, hold)
    count = int((tokens["labels"] != -100).sum())
    backward(whole, tokens, num_items_in_batch=count)
    for row in range(2):
        backward(halves, {key: value[row : row + 1] for key, value in tokens.items()}, num_items_in_batch=count)
    same_gradients(halves, whole, 1e-9)


def test_a_retained_graph_goes_backward_twice(build: Build, attached: Any, tokens: Tokens, gradients: Any) -> None:
    model = attached(build(dtype=torch.float64))
    loss = model(**tokens).loss
    loss.backward(retain_graph=True)
    once = {name: grad.clone() for name, grad in gradients(model).items()}
    loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, 2 * once[name], rtol=1e-9, atol=1e-12)


def test_a_change_in_place_between_forward_and_backward_is_an_error(build: Build, attached: Any, tokens: Tokens) -> None:
    """As in PyTorch: what waits is watched."""
    model = attached(build())
    loss = model(**tokens).loss
    with torch.no_grad():
        model.get_parameter("model.norm.weight").add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("hold", HOLDS)
def test_a_frozen_part(hold: Any, build: Build, tokens: Tokens, same_gradients: Check, cosine: Any) -> None:
    plain = build(tie_word_embeddings=False)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        plain.get_parameter(name).requires_grad_(False)
    for parameter in plain.get_submodule("model.layers.0.input_layernorm").parameters():
        parameter.requires_grad_(False)
    model = copy.deepcopy(plain)
    gradlite.attach(model, rank=1.0, basis="random", hold=hold)
    losses = [backward(each, tokens) for each in (model, plain)]
    torch.testing.assert_close(*losses, rtol=2e-6, atol=0)
    if hold == "int8":
        assert cosine(model, plain) > 0.99
    else:
        same_gradients(model, plain, 1e-5)


# ---- modes by name --------------------------------------------------------------------------------------------------


def test_a_mode_of_every_block(build: Build, tokens: Tokens) -> None:
    plain = build(num_hidden_layers=4)
    gradlite.attach(plain, rank=4, hold={"model.layers.[0-1]": "recompute", "model.layers.2.mlp": "exact", "*": "int8"})
    modes = {operator.name: operator.mode.name for operator in attachment(plain).operators.found}
    blocks = [operator.name for operator in attachment(plain).operators.found if operator.role == "block"]
    assert blocks == ["model.layers.0", "model.layers.1"]
    assert modes["model.layers.1.input_layernorm"] == "recompute"
    assert modes["model.layers.2.mlp"] == "exact"
    assert modes["model.layers.2.self_attn"] == modes["model.layers.3.mlp"] == modes["model.norm"] == "int8"
    codecs = {
        name: module.gradlite_holder.codec for name, module in plain.named_modules() if hasattr(module, "gradlite_holder")
    }
    assert codecs["model.layers.0.self_attn.q_proj"] is EXACT
    assert codecs["model.layers.2.mlp.down_proj"] is EXACT
    assert codecs["model.layers.2.self_attn.q_proj"] is INT8
    assert torch.isfinite(backward(plain, tokens))


def test_patterns() -> None:
    plan = HoldPlan({"a.[0-2,5]": "int8", "b*": "recompute", "c.[11]": "recompute-int8"})
    wanted = {
        "a.0": "int8", "a.2.mlp.up": "int8", "a.5": "int8", "a.3": "exact", "a.12": "exact", "a": "exact", "bcd.e": "recompute",
        "c.1": "exact", "c.11.x": "recompute-int8", "": "exact", "x.a.0": "exact",
    }  # fmt: skip
    assert {name: plan.mode_of(name).name for name in wanted} == wanted
    plan.check_used(["a.0"], ["b1", "c.11"])


@pytest.mark.parametrize(
    ("hold", "message"),
    [
        ("int7", "hold='int7' is unknown; choose one of 'exact', 'int8'"),
        ({"*": "bf16"}, "hold='bf16' is unknown"),
        ({"model.layer.*": "int8"}, r"'model.layer.\*' decides about no module.*names look like 'model\.layers\.\d\.\w+\.\w+'"),
        ({"model.layers.[7-9]": "int8"}, "decides about no module"),
        ({"model*": "int8", "model.layers.0": "recompute"}, "an earlier pattern took them"),
        (
            {"*.q_proj": "recompute"},
            r"asks for 'recompute', which whole blocks can do only; blocks are called 'model\.layers\.0'",
        ),
        (None, "hold=None is neither a way of holding nor a mapping"),
        (["int8"], "is neither a way of holding"),
        ({1: "int8"}, "is neither a way of holding"),
    ],
)
def test_mistakes(hold: Any, message: str, build: Build) -> None:
    model = build()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(gradlite.GradLiteError, match=message):
        gradlite.attach(model, rank=4, hold=hold)
    assert [type(module) for module in model.modules()] == classes
    assert model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    assert attachment_of(model) is None


def test_the_command_line_knows_every_mode() -> None:
    assert get_args(config.HoldMode) == get_args(HoldMode)
    assert all(f"'{mode}'" in fields.accepts_of(config.TrainConfig.model_fields["hold"]) for mode in get_args(HoldMode))


def test_attention_with_dropout_is_named_as_not_recognised(build: Build) -> None:
    coverage = gradlite.attach(build(attention_dropout=0.1), rank=4)
    assert coverage.held.unrecognised == ("model.layers.0.self_attn", "model.layers.1.self_attn")


def test_int4_warns(build: Build) -> None:
    with pytest.warns(UserWarning, match="int4"):
        gradlite.attach(build(), rank=4, hold="int4")


# ---- coordinates instead of inputs, and the host's memory -----------------------------------------------------------


def reduced(model: nn.Module, hold: Any) -> nn.Module:
    """A copy at half of full rank, without a sample."""
    model = copy.deepcopy(model)
    gradlite.attach(model, rank=0.5, hold=hold, sample_residual=False)
    return model


def test_projected_gives_the_gradients_of_exact(build: Build, tokens: Tokens, same_gradients: Check, held_bytes: Any) -> None:
    """To the last bit: ``xP`` is computed before instead of after, from the same numbers. While a basis is due, ``x`` waits."""
    plain = build(dtype=torch.bfloat16)
    models = [reduced(plain, hold) for hold in ("exact", "projected")]
    held = []
    for step in range(3):
        for model in models:
            window = attachment(model).window
            for basis in window.bases():
                basis.due = step == 2
            held.append(held_bytes(lambda model=model: model(**tokens).loss, [p for _, p in model.named_parameters()]))
            backward(model, tokens)
        same_gradients(*models, 0.0)
        for model in models:
            for one in attachment(model).window.collectors:
                one.coordinates.grad = None
            attachment(model).window.clear()
    assert held[0] == held[1]  # the first batch makes the bases
    assert held[2] - held[3] == 2 * 18 * (32 - 16) * 2  # two output projections, 18 tokens, bfloat16
    assert held[4] == held[5]


def test_projected_needs_no_sample(build: Build) -> None:
    model = build()
    with pytest.raises(gradlite.GradLiteError, match=r'projected.*feedback="off"'):
        gradlite.GradLite(model, rank=4, hold={"model.layers.0": "projected"}, feedback="feedback")
    assert attachment_of(model) is None
    gradlite.GradLite(model, rank=4, hold="projected")


def test_the_host_is_where_a_model_on_a_cpu_is(build: Build, attached: Any, tokens: Tokens, same_gradients: Check) -> None:
    plain = build()
    with pytest.warns(UserWarning, match="gains nothing for a model on a CPU"):
        model = attached(plain, "host")
    assert "in the host's memory" in str(attachment(model).coverage)
    backward(model, tokens), backward(plain, tokens)
    same_gradients(model, plain, 1e-5)


# ---- what stays behind ----------------------------------------------------------------------------------------------


def test_resumed_noise_repeats(build: Build, attached: Any, tokens: Tokens, same_gradients: Check) -> None:
    """The same reads, the same codes; other reads, others."""
    models = [attached(build(), "int8") for _ in range(3)]
    for model in models[:2]:
        backward(model, tokens)
        model.zero_grad()
    reads = attachment(models[0]).operators.noise.reads
    assert reads > 0
    attachment(models[2]).operators.noise.reads = reads
    for model in (models[0], models[2]):
        backward(model, tokens)
    same_gradients(models[2], models[0], 0.0)
    attachment(models[1]).operators.noise.reads = reads + 1
    backward(models[1], tokens)
    with pytest.raises(AssertionError):
        same_gradients(models[1], models[0], 0.0)


@pytest.mark.parametrize("hold", [*HOLDS, "recompute-int8"])
def test_a_blocks_input_lives_on_only_where_it_is_kept(hold: Any, build: Build, attached: Any, tokens: Tokens) -> None:
    model = attached(build(), hold)
    found: list[StorageWeakRef] = []

    def note(one: Tensor) -> None:
        found.append(StorageWeakRef(one.untyped_storage()))

    for layer in model.get_submodule("model.layers").children():
        layer.register_forward_pre_hook(lambda _, args: note(args[0]))
        layer.get_submodule("mlp").register_forward_hook(lambda _, __, output: note(output))
    loss = model(**tokens).loss
    alive = [not storage.expired() for storage in found]  # of two blocks: the input, the MLP's result
    assert alive == [hold == "recompute", False, hold == "recompute", False]
    loss.backward()


class Storages(TorchDispatchMode):
    """Watches every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[StorageWeakRef, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self.made.append((StorageWeakRef(one.untyped_storage()), tuple(one.shape)))
        return result


@pytest.mark.parametrize("hold", [*HOLDS, "recompute-int8"])
def test_nothing_is_held_once_a_step_is_over(hold: Any, build: Build, attached: Any, tokens: Tokens) -> None:
    """No tensor of the size of activations is left, neither after backward nor when the loss is thrown away."""
    model = attached(build(), hold)
    backward(model, tokens)

    noise = attachment(model).operators.noise

    def left(work: Callable[[], Any]) -> list[tuple[int, ...]]:
        with Storages() as storages:
            work()
        assert len(storages.made) > 100
        own = [*model.state_dict().values(), *tokens.values(), *(p.grad for p in model.parameters()), noise._table]
        known = {StorageWeakRef(one.untyped_storage()).cdata for one in own if one is not None}
        return [shape for storage, shape in storages.made if not storage.expired() and storage.cdata not in known]

    assert left(lambda: model(**tokens)) == []
    assert left(lambda: backward(model, tokens)) == []
    assert attachment(model).operators._shelf._entries == []
