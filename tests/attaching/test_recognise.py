"""What a module computes is found out by numbers, not names, and finding out leaves no trace."""

import copy
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
