"""What a module computes is found out by numbers, not names, and finding out leaves no trace."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradlite
from gradlite.attaching import attachment_of
from gradlite.attaching.blocks import named_blocks
from gradlite.attaching.recognise import activation_kind, gated_layout, norm_kind
from gradlite.ops.norm import NormKind

LIKE = torch.zeros(1)


class MyNorm(nn.Module):
    """An RMSNorm with a choice of mistakes and of where its epsilon is found."""

    def __init__(self, *, eps: float = 1e-6, name: str = "eps", power: float = -0.5, shift: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24))
        setattr(self, name, eps)
        self.name, self.power, self.shift = name, power, shift

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + getattr(self, self.name)) ** self.power
        return self.weight * (x * scale + self.shift)


class Dropping(nn.Module):
    """An activation or a norm that drops in training, by a number of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.normalized_shape, self.eps = (24,), 1e-5
        self.inner: Callable[[Tensor], Tensor] = inner.forward  # no child

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x), 0.3, self.training)


@pytest.mark.parametrize("is_training", [True, False])
def test_what_drops_in_training_is_neither(is_training: bool) -> None:
    """Also where it is looked at in evaluation, as models come from a file."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert activation_kind(nn.GELU().train(is_training), LIKE) == "gelu"
    assert activation_kind(Dropping(nn.GELU()).train(is_training), LIKE) is None
    norm = Dropping(nn.LayerNorm(24, elementwise_affine=False)).train(is_training)
    assert norm_kind(norm, LIKE) is None
    assert norm.training == is_training
    assert torch.equal(torch.get_rng_state(), state)


def test_norms() -> None:
    assert norm_kind(MyNorm(), LIKE) == NormKind(1e-6)
    assert norm_kind(MyNorm(name="variance_epsilon", eps=1e-3), LIKE) == NormKind(1e-3)
    assert norm_kind(nn.RMSNorm(24, eps=1e-6), LIKE) == NormKind(1e-6)
    assert norm_kind(nn.RMSNorm(24), LIKE) == NormKind(torch.finfo(torch.float32).eps)
    assert norm_kind(nn.LayerNorm(24, elementwise_affine=False), LIKE) == NormKind(1e-5, centred=True)
    assert norm_kind(nn.LayerNorm(24), LIKE) == NormKind(1e-5, centred=True)


@pytest.mark.parametrize(
    "module",
    [
        MyNorm(power=-0.51),
        MyNorm(shift=1e-3),
        MyNorm(name="unusual", eps=1e-6),  # found nowhere, and another one than the usual 1e-5: small inputs show it
        nn.LayerNorm((4, 6)),
        nn.BatchNorm1d(24),
        nn.GroupNorm(4, 24),
        nn.GroupNorm(1, 24),  # a layer norm of two dimensions, and another one of three
        nn.Linear(24, 24),
        nn.Identity(),
    ],
)
def test_what_is_no_norm(module: nn.Module) -> None:
    assert norm_kind(module, LIKE) is None


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (nn.LeakyReLU(1e-3), None),
        (nn.ReLU6(), None),
        (nn.Hardtanh(0.0, 20.0), None),
        (nn.Mish(), None),
        (nn.Identity(), None),
        (nn.Dropout(0.5), None),
        (nn.Linear(97, 97), None),
    ],
)
def test_activations(module: nn.Module, kind: str | None) -> None:
    assert activation_kind(module, LIKE) == kind


class MyMLP(nn.Module):
    def __init__(self, *, swapped: bool = False, act: Any = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(24, 48), nn.Linear(24, 48), nn.Linear(48, 24)
        self.act, self.swapped = act or nn.SiLU(), swapped

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        result: Tensor = self.down_proj(gate * self.act(up) if self.swapped else self.act(gate) * up)
        return result


def test_gated_mlps() -> None:
    found = gated_layout(MyMLP(), LIKE)
    assert found is not None
    assert (found.kind, found.gate, found.up, found.down) == ("silu", "gate_proj", "up_proj", "down_proj")
    assert gated_layout(MyMLP(swapped=True), LIKE) is None
    assert gated_layout(MyMLP(act=nn.Mish()), LIKE) is None
    fused = MyMLP()
    fused.gate_up_proj = nn.Linear(24, 96)
    assert gated_layout(fused, LIKE) is None  # one layer more than the layout has


class DroppingMLP(MyMLP):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("training", [False, True])
def test_a_gated_mlp_that_drops_by_a_number_is_its_own(training: bool) -> None:
    module = DroppingMLP().train(training)
    assert gated_layout(module, LIKE) is None
    assert module.training == training
    assert gated_layout(MyMLP().train(training), LIKE) is not None


def test_batch_norms_are_not_moved_by_looking() -> None:
    module = nn.BatchNorm1d(24)
    norm_kind(module, LIKE)
    assert module.num_batches_tracked == 0
    assert not module.running_mean.any()  # type: ignore[union-attr]


class GatedNorm(MyNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        result = super().forward(x)
        return result if gate is None else result * gate


def test_a_norm_that_may_be_gated() -> None:
    plain = GatedNorm()
    model = nn.ModuleDict({"norm": GatedNorm(), "linear": nn.Linear(24, 24)})
    model["norm"].load_state_dict(plain.state_dict())
    gradlite.attach(model, rank=4)
    assert type(model["norm"]) is not GatedNorm  # is taken over
    x, gate = torch.randn(3, 24, requires_grad=True), torch.randn(3, 24)
    torch.testing.assert_close(model["norm"](x, gate), plain(x, gate))
    torch.testing.assert_close(model["norm"](x), plain(x))
    assert model["norm"](x).grad_fn is not None


class Axial(nn.Module):
    """Two layers that read the same storage, one of them transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(32, 32)

    def forward(self, h: Tensor) -> Tensor:
        return self.first(h.transpose(1, 2)).transpose(1, 2) + self.second(h)


class InPlace(nn.Module):
    """The caller adds to the tensor that its block has read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(2)])

    def forward(self, h: Tensor) -> Tensor:
        h = h.clone()
        for layer in self.layers:
            h += layer(h)
        return h


class PostNorm(nn.Module):
    """The first block finds what the norm before it has held already, as BERT's does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16)) for _ in range(2)])

    def forward(self, h: Tensor) -> Tensor:
        h = self.norm(h)
        for layer in self.layers:
            h = h + layer(h)
        return h


@pytest.mark.parametrize(("kind", "hold"), [(Axial, "exact"), (PostNorm, "recompute"), (PostNorm, "exact")])
def test_gradients_of_unusual_models(kind: Any, hold: Any) -> None:
    torch.manual_seed(0)
    plain = kind()
    model = copy.deepcopy(plain)
    gradlite.attach(model, rank=1.0, basis="random", hold=hold, include=["*"])
    x = torch.randn(2, 16, 32) if kind is Axial else torch.randn(2, 32, 16)
    for each in (plain, model):
        each(x.clone().requires_grad_()).sin().sum().backward()
    found = attachment_of(model)
    assert found is not None
    for (name, _), collector in zip(found.projected, found.window.collectors, strict=True):
        assert collector.coordinates.grad is not None
        assert collector.basis.matrix_NR is not None
        wanted = plain.get_parameter(name).grad
        assert wanted is not None
        torch.testing.assert_close(collector.coordinates.grad @ collector.basis.matrix_NR.T, wanted, rtol=1e-4, atol=1e-4)


def test_a_block_input_that_is_changed_later_is_refused() -> None:
    """The replay would read other values, and bend the gradient without a word."""
    model = InPlace()
    gradlite.attach(model, rank=4, hold="recompute")
    loss = model(torch.randn(2, 8, 16)).sum()
    with pytest.raises(gradlite.GradLiteError, match="changed in place after the block had run"):
        loss.backward()


class Model(nn.Module):
    """A block whose norm is as usual, one that looks so, and one list of bare layers."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.Dropout(0.5), nn.GELU(), MyNorm(shift=1.0))
        self.layers = nn.ModuleList([block])
        self.heads = nn.ModuleList([nn.Linear(24, 24)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.heads[0](x)
        return result


def test_looking_leaves_no_trace() -> None:
    """Not on the random state either: dropout draws as if nobody had looked."""
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    model = Model()
    torch.manual_seed(3)
    gradlite.attach(model, rank=4)
    assert torch.equal(torch.rand(4), wanted)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("hold", ["exact", "recompute", "int8"])
def test_a_model_of_no_family(hold: Any) -> None:
    """What is not recognised keeps its own code."""
    torch.manual_seed(0)
    plain, model = Model().double(), Model().double()
    model.load_state_dict(plain.state_dict())
    gradlite.attach(model, rank=1.0, basis="random", hold=hold)
    x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    gradients = []
    for each in (plain, model):
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(each(x).sin().sum(), [x], retain_graph=False)[0])
    if hold == "int8":
        assert F.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) > 0.999
    else:
        torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-10)


def test_blocks_are_what_has_parts() -> None:
    assert [name for name, _ in named_blocks(Model())] == ["layers.0"]


def test_zeros_and_ones_do_not_hide_what_a_module_computes() -> None:
    """Before training much is zero or one, and many formulas then give the same."""
    centred = nn.LayerNorm(24)
    nn.init.zeros_(centred.weight)
    assert norm_kind(centred, LIKE) == NormKind(1e-5, centred=True)
    assert not centred.weight.any()

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24, bias=False)
            self.act = nn.SiLU()
            nn.init.zeros_(self.down_proj.weight)

        def forward(self, x: Tensor) -> Tensor:
            down: Tensor = self.down_proj(self.act(self.gate_proj(x)) * (self.up_proj(x) + 1.0))
            return down

    odd = Odd()
    assert gated_layout(odd, LIKE) is None
    assert not odd.down_proj.weight.any()

    class Usual(Odd):
        def forward(self, x: Tensor) -> Tensor:
            down: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
            return down

    assert gated_layout(Usual(), LIKE) is not None

    class Scaled(Usual):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    assert gated_layout(Scaled(), LIKE) is None


def test_a_gated_mlp_that_clips_is_its_own() -> None:
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP

    assert gated_layout(DeepseekV4MLP(DeepseekV4Config(hidden_size=32, moe_intermediate_size=48)), LIKE) is None


def test_the_nearest_activation_is_taken() -> None:
    like = torch.zeros(1, dtype=torch.float16)
    assert activation_kind(nn.GELU(approximate="tanh"), like) == "gelu_tanh"
    assert activation_kind(nn.GELU(), like) == "gelu"


def test_models_whose_first_weights_are_no_floats() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.LayerNorm(32))
    whole = nn.Module()
    whole.register_parameter("codes", nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False))
    whole.add_module("rest", model)
    gradlite.attach(whole, rank=4)
    found = attachment_of(whole)
    assert found is not None
    assert {operator.role for operator in found.operators.found} == {"activation", "norm"}


def test_token_ids_are_not_rounded() -> None:
    """Blocks of which only the input is kept, as codes, may take token ids."""

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(1000, 32), nn.Linear(32, 32)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.out(self.words(ids))
            return out

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = nn.ModuleList([Tower(), Tower()])

        def forward(self, ids: Tensor) -> Tensor:
            return sum((tower(ids) for tower in self.towers), torch.zeros(()))

    model = Towers()
    plain = copy.deepcopy(model)
    gradlite.attach(model, rank=1.0, basis="random", hold="recompute-int8")
    ids = torch.randint(0, 1000, (3, 7))
    for each in (model, plain):
        each(ids).square().sum().backward()
    found = attachment_of(model)
    assert found is not None
    for (name, _), collector in zip(found.projected, found.window.collectors, strict=True):
        grad, matrix = collector.coordinates.grad, collector.basis.matrix_NR
        assert grad is not None
        assert matrix is not None
        torch.testing.assert_close(grad @ matrix.T, plain.get_parameter(name).grad, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("hold", ["exact", "int8"])
def test_checkpointing_by_the_user_of_parts_whose_input_a_norm_made(hold: Any) -> None:
    """A post-norm model: what the norm outside offers must not be missing when the part inside runs again."""
    from torch.utils.checkpoint import checkpoint

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)) for _ in range(2)])
            self.norms = nn.ModuleList([nn.LayerNorm(32) for _ in range(2)])

        def forward(self, x: Tensor, is_checkpointed: bool) -> Tensor:
            for part, norm in zip(self.parts, self.norms, strict=True):
                x = norm(x + (checkpoint(part, x, use_reentrant=False) if is_checkpointed else part(x)))
            return x

    torch.manual_seed(0)
    model, x = Stack(), torch.randn(5, 32)
    gradlite.attach(model, rank=1.0, basis="random", hold=hold)
    gradients = []
    for is_checkpointed in (False, True):
        model.zero_grad()
        model(x, is_checkpointed).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > (1 - 1e-6 if hold == "exact" else 0.999)


def test_results_may_be_changed_in_place() -> None:
    """As those of the plain layers."""
    model = nn.ModuleList([nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.Linear(32, 32, bias=False)])
    plain = copy.deepcopy(model)
    gradlite.attach(model, rank=4)
    x = torch.randn(2, 5, 32)
    for layer, own in zip(model, plain, strict=True):
        results = []
        for each in (layer, own):
            y = each(x.clone().requires_grad_())
            y += 1.0
            y.square().sum().backward()
            results.append(y.detach())
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_sparse_attention_keeps_its_masks(family: str) -> None:
    """These models ask for the name of the attention function, and mask for those that they know."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=50, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1,
        first_k_dense_replace=1, index_topk=3, index_n_heads=2, index_head_dim=16, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).train()
    plain, ids = copy.deepcopy(model), torch.randint(3, 50, (2, 9))
    gradlite.attach(model, rank=4)
    found, wanted = model(input_ids=ids, labels=ids).loss, plain(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0)
