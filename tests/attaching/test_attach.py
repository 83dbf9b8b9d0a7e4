"""Attaching says what became of every parameter, leaves the model itself untouched, and undoes itself."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradlite
from gradlite.attaching import attachment_of
from gradlite.attaching.attachment import Attachment
from gradlite.attaching.rank import layer_rank

Build = Callable[..., nn.Module]
Batches = Callable[..., list[Tensor]]
CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-10}


def attachment(model: nn.Module) -> Attachment:
    found = attachment_of(model)
    assert found is not None
    return found


def check_gradients(model: nn.Module, exact: dict[str, Tensor]) -> None:
    """Every projected weight's ``C.grad`` is ``G P``, every other gradient is exact."""
    found = attachment(model)
    for (name, weight), collector in zip(found.projected, found.window.collectors, strict=True):
        assert weight.grad is None
        assert collector.basis.matrix_NR is not None
        torch.testing.assert_close(collector.coordinates.grad, exact[name] @ collector.basis.matrix_NR, **CLOSE)
    for entry in found.coverage.entries:
        if entry.kind == "plain" and entry.name in exact:
            torch.testing.assert_close(model.get_parameter(entry.name).grad, exact[entry.name], **CLOSE)


def exact_gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    plain = copy.deepcopy(model)
    loss(plain).backward()
    return {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def members(model: nn.Module) -> set[frozenset[str]]:
    """The names that share a basis."""
    found = attachment(model)
    groups: dict[int, set[str]] = {}
    for (name, _), collector in zip(found.projected, found.window.collectors, strict=True):
        groups.setdefault(id(collector.basis), set()).add(name)
    return {frozenset(group) for group in groups.values()}


# ---- coverage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_coverage_names_every_parameter_once(tied: bool, tiny_model: Build) -> None:
    model = tiny_model(tied=tied)
    wanted = {name: (p.numel(), p.nbytes) for name, p in model.named_parameters()}
    coverage = gradlite.attach(model, rank=4)
    assert {e.name: (e.num_elements, e.num_bytes) for e in coverage.entries} == wanted
    assert len(coverage.entries) == len(wanted)
    assert coverage.num_elements() == sum(p.numel() for p in model.parameters())
    assert coverage.num_bytes() == sum(coverage.num_bytes(kind) for kind in ("projected", "plain", "frozen"))
    assert {e.name for e in coverage.entries if e.kind == "plain"} == {
        name for name in wanted if "norm" in name or "bias" in name
    }
    assert all((e.rank == 4) == (e.kind == "projected") for e in coverage.entries)
    assert "projected" in str(coverage)
    assert "frozen" not in str(coverage)


def test_include_exclude_frozen_and_small(tiny_model: Build, batches: Batches) -> None:
    model = tiny_model()
    model.get_parameter("o.weight").requires_grad_(False)
    coverage = gradlite.attach(model, rank=4, include=["*.weight"], exclude=["gate.*", "embed*"])
    kinds = {e.name: e.kind for e in coverage.entries}
    assert kinds["o.weight"] == "frozen"
    assert kinds["gate.weight"] == kinds["embed.weight"] == "plain"
    assert kinds["up.weight"] == "projected"
    model(batches(1)[0]).backward()
    assert model.get_parameter("o.weight").grad is None
    check_gradients(model, exact_gradients(gradlite.detach(copy.deepcopy(model)), lambda m: m(batches(1)[0])))
    small = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64))
    entries = gradlite.attach(small, rank=4).entries
    assert entries[0].kind == "plain"
    assert "below 16" in entries[0].reason


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "at least 1"),
        (-3, "at least 1"),
        (0.0, "share"),
        (1.5, "share"),
        (float("nan"), "rank"),
        ("8", "rank"),
        (True, "rank"),
    ],
)
def test_bad_ranks(rank: float, message: str, tiny_model: Build) -> None:
    with pytest.raises(gradlite.GradLiteError, match=message):
        gradlite.attach(tiny_model(), rank=rank)


def test_weights_that_are_freed_by_name_are_trained(tiny_model: Build, batches: Batches) -> None:
    """Names from before attaching do not have the coordinates', which follow their weights."""
    model = tiny_model()
    names = {name for name, _ in model.named_parameters()}
    optimizer = gradlite.GradLite(model, rank=6, lr=1e-2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(batches(1)[0]).backward()
    optimizer.step()
    assert [name for name, value in model.state_dict().items() if torch.equal(value, before[name])] == []


def test_rank_of_a_layer() -> None:
    assert [layer_rank(r, 64) for r in (1, 16, 500, 1 / 16, 1.0, 1e-9)] == [1, 16, 64, 4, 64, 1]
    model = nn.Linear(32, 40)
    with pytest.warns(UserWarning, match="above the input width of 1 layers"):
        assert gradlite.attach(model, rank=33).entries[0].rank == 32


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.LayerNorm(4)),
        nn.Conv1d(3, 4, 5),
        nn.Identity(),
        nn.Linear(4, 4),
        nn.Linear(32, 32).requires_grad_(False),
    ],
)
def test_nothing_to_project(model: nn.Module) -> None:
    with pytest.raises(gradlite.GradLiteError, match="no linear layer"):
        gradlite.attach(model)
    assert attachment_of(model) is None


def test_a_pattern_that_matches_nothing(tiny_model: Build) -> None:
    with pytest.raises(gradlite.GradLiteError, match=r"'atention.' matches no .* look like 'embed\.weight' or 'embed'"):
        gradlite.attach(tiny_model(), include=["atention*"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("pattern", ["embed.weight", "embed", "head.weight", "head", "h*d"])
def test_a_pattern_names_a_parameter_its_layer_or_a_tied_use(pattern: str, tiny_model: Build) -> None:
    kinds = {e.name: e.kind for e in gradlite.attach(tiny_model(tied=True), rank=4, exclude=[pattern, "o"]).entries}
    assert kinds["embed.weight"] == kinds["o.weight"] == "plain"
    assert kinds["q.weight"] == "projected"
    model = torch.compile(tiny_model(tied=True))
    optimizer = gradlite.GradLite(model, rank=4, groups=[{"params": pattern, "lr": 0.5}])  # type: ignore[arg-type]
    assert [len(group["params"]) for group in optimizer.param_groups if group["lr"] == 0.5] == [1]


def test_unknown_choices_and_numbers(tiny_model: Build) -> None:
    model = tiny_model()
    for keyword, value in {
        "feedback": "on", "feedback_memory": "int8", "basis": "svd", "moments": "int4", "lr": -1.0, "eps": -1.0,
        "betas": (1.0, 0.9), "weight_decay": -0.1, "refresh_interval": 0,
    }.items():  # fmt: skip
        with pytest.raises(gradlite.GradLiteError, match=keyword):
            gradlite.GradLite(model, **{keyword: value})  # type: ignore[arg-type]
    with pytest.raises(gradlite.GradLiteError, match="never moves"):
        gradlite.GradLite(model, basis="random", feedback="feedback")


# ---- the model stays what it was ------------------------------------------------------------------------------------


def test_names_counts_and_files_are_untouched(tiny_model: Build, batches: Batches) -> None:
    model, plain = tiny_model(), tiny_model()
    output = model(batches(1)[0])
    gradlite.attach(model, rank=4)
    assert torch.equal(model(batches(1)[0]), output)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    assert model.load_state_dict(plain.state_dict()).missing_keys == []
    for module in model.modules():
        assert not hasattr(module, "gradlite_collectors") or isinstance(module, (nn.Linear, nn.Embedding))
    storage = [p.untyped_storage().nbytes() for name, p in model.named_parameters() if "gradlite" in name]
    assert max(storage) <= 8


def test_detaching_gives_back_classes_and_bits(tiny_model: Build, batches: Batches) -> None:
    model = tiny_model(torch.bfloat16)
    classes = [type(module) for module in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    optimizer = gradlite.GradLite(model, lr=1e-2, rank=4)
    model(batches(1)[0]).backward()
    optimizer.step()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert gradlite.detach(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [name for name, _ in model.named_parameters()] == names
    assert attachment_of(model) is None
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any("gradlite" in key for module in model.modules() for key in vars(module))
    model.zero_grad()
    model(batches(1)[0]).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    with pytest.raises(gradlite.GradLiteError, match="detached"):
        optimizer.step()
    assert gradlite.detach(model) is model  # nothing to undo


def test_attaching_again_replaces(tiny_model: Build, batches: Batches) -> None:
    model = tiny_model()
    first = gradlite.GradLite(model, rank=4)
    second = gradlite.GradLite(model, rank=6)
    model(batches(1)[0]).backward()
    with pytest.raises(gradlite.GradLiteError, match="newest"):
        first.step()
    second.step()
    assert {collector.basis.rank for collector in attachment(model).window.collectors} == {6}


def test_copies_train_on_their_own(tiny_model: Build, batches: Batches) -> None:
    model = tiny_model()
    optimizer = gradlite.GradLite(model, lr=1e-2, rank=4)
    ids = batches(1)[0]
    model(ids).backward()
    optimizer.step()
    optimizer.zero_grad()
    twin = copy.deepcopy(model)
    assert attachment(twin).window is not attachment(model).window
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    twin_optimizer = gradlite.GradLite(twin, lr=1e-2, rank=4)
    for _ in range(3):
        twin(ids).backward()
        twin_optimizer.step()
        twin_optimizer.zero_grad()
    assert twin(ids) < model(ids)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model(ids).backward()
    optimizer.step()
    assert not torch.equal(model.get_parameter("q.weight"), weights["q.weight"])


def test_a_model_and_its_optimizer_are_copied_together(tiny_model: Build, batches: Batches, tmp_path: Path) -> None:
    """The copies go on bit for bit as the originals do, by themselves; so does what `torch.save` wrote."""

    def steps(model: nn.Module, optimizer: gradlite.GradLite) -> dict[str, Tensor]:
        for ids in batches(7):
            model(ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: value.clone() for name, value in model.state_dict().items()}

    formats: tuple[Literal["factored", "int4"], ...] = ("factored", "int4")
    for feedback_memory in formats:
        model = tiny_model(torch.float32)
        optimizer = gradlite.GradLite(
            model,
            lr=1e-2,
            rank=4,
            feedback="feedback",
            feedback_memory=feedback_memory,
        )
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        steps(model, optimizer)
        torch.save((model, optimizer), tmp_path / "both.pt")
        pairs = [copy.deepcopy((model, optimizer)), torch.load(tmp_path / "both.pt", weights_only=False)]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        copied = [steps(*pair) for pair in pairs]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        wanted = steps(model, optimizer)
        for twin, values in zip(pairs, copied, strict=True):
            assert twin[1]._attachment is attachment(twin[0])
            assert all(torch.equal(value, wanted[name]) for name, value in values.items())
            assert twin[1].state_bytes() == optimizer.state_bytes()


def test_a_copy_absorbs_uses_past_the_layer_without_being_attached_again() -> None:
    model = nn.Sequential(nn.Linear(24, 24)).double()
    optimizer = gradlite.GradLite(model, rank=4)
    model, optimizer = copy.deepcopy((model, optimizer))
    weight = model.get_parameter("0.weight")
    with pytest.warns(UserWarning, match="outside its layer"):
        F.linear(torch.randn(3, 24).double(), weight).sum().backward()
    assert weight.grad is None
    before = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, before)
    gradlite.detach(model)
    F.linear(torch.randn(3, 24).double(), weight).sum().backward()
    assert weight.grad is not None


def test_copies_of_attached_models_absorb_uses_past_the_layer(tiny_model: Build) -> None:
    layer = nn.Linear(24, 24).double()
    gradlite.attach(layer, rank=4)
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 24).double()
    with pytest.warns(UserWarning, match="outside its layer"):
        F.linear(x, layer.weight).sum().backward()
    assert layer.weight.grad is None
    gradlite.attach(twin, rank=4)
    with pytest.warns(UserWarning, match="outside its layer"):
        F.linear(x, twin.weight).sum().backward()
    assert twin.weight.grad is None


@pytest.mark.parametrize("moved_at", [0, 1])
def test_moving_to_another_format(moved_at: int, tiny_model: Build, batches: Batches) -> None:
    model = tiny_model(torch.float32)
    optimizer = gradlite.GradLite(model, lr=1e-2, rank=4)
    for step, ids in enumerate(batches(3)):
        if step == moved_at:
            model.to(torch.bfloat16)
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = attachment(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {c.basis.matrix_NR.dtype for c in found.window.collectors if c.basis.matrix_NR is not None} == {torch.bfloat16}
    assert all(c.coordinates.untyped_storage().nbytes() == 2 for c in found.window.collectors)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_in_evaluation_it_is_the_plain_model(tiny_model: Build, batches: Batches) -> None:
    plain, model = tiny_model(), tiny_model()
    gradlite.attach(model, rank=4)
    model(batches(1)[0]).backward()  # makes the bases
    for each in (plain, model):
        each.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(batches(1)[0]), plain(batches(1)[0]), rtol=0, atol=1e-12)
    assert model.train().training


# ---- shared bases ---------------------------------------------------------------------------------------------------


def test_layers_that_read_the_same_tensor_share_a_basis(tiny_model: Build, batches: Batches) -> None:
    model = tiny_model()
    gradlite.attach(model, rank=4)
    with torch.no_grad():
        model(batches(1)[0])
    model(batches(1)[0]).backward()
    wanted = [{"q", "k", "v"}, {"gate", "up"}, {"o"}, {"down"}, {"embed"}]
    assert members(model) == {frozenset(f"{name}.weight" for name in group) for group in wanted}


def test_a_tensor_changed_in_place_is_another_tensor() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            self.a(x)
            result: Tensor = self.b(x.mul_(2)).sum()
            return result

    model = InPlace()
    gradlite.attach(model, rank=4)
    model(torch.randn(5, 24)).backward()
    assert len(members(model)) == 2


def test_gradient_checkpointing_changes_nothing(tiny_model: Build, batches: Batches) -> None:
    for reentrant in (False, True):
        model, other = tiny_model(), tiny_model()
        inner = other.block
        other.block = lambda h, inner=inner, r=reentrant: checkpoint(inner, h, use_reentrant=r)  # type: ignore[assignment]
        optimizers = [gradlite.GradLite(m, lr=1e-2, rank=4, moments="fp32", feedback="same_step") for m in (model, other)]
        for ids in batches(4):
            for m in (model, other):
                m(ids).backward()
            assert members(model) == members(other)
            for a, b in zip(attachment(model).window.collectors, attachment(other).window.collectors, strict=True):
                torch.testing.assert_close(a.coordinates.grad, b.coordinates.grad, rtol=0, atol=1e-9)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


# ---- kinds of modules -----------------------------------------------------------------------------------------------


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class PastTheLayer(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


def test_a_subclass_that_calls_super() -> None:
    model = nn.Sequential(ScaledEmbedding(30, 24, padding_idx=1), nn.Linear(24, 30)).double()
    ids = torch.tensor([[1, 2, 3], [2, 2, 29]])

    def loss(m: nn.Module) -> Tensor:
        result: Tensor = m(ids).square().sum()
        return result

    exact = exact_gradients(model, loss)
    coverage = gradlite.attach(model, rank=5)
    assert isinstance(model[0], ScaledEmbedding)
    assert [e.kind for e in coverage.entries] == ["projected", "projected", "plain"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(model).backward()
    check_gradients(model, exact)
    assert type(gradlite.detach(model)[0]) is ScaledEmbedding  # type: ignore[index]


@pytest.mark.parametrize("kind", ["subclass", "attention"])
def test_weights_used_past_their_layer(kind: str) -> None:
    model: nn.Module = nn.Sequential(PastTheLayer(24, 24), nn.Linear(24, 24)).double()
    if kind == "attention":
        model = nn.TransformerEncoderLayer(24, 2, 32, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 5, 24).double()

    def loss(m: nn.Module) -> Tensor:
        result: Tensor = m(x).square().sum()
        return result

    exact = exact_gradients(model, loss)
    coverage = gradlite.attach(model, rank=5)
    assert any(e.kind == "projected" for e in coverage.entries)
    with pytest.warns(UserWarning, match="outside its layer"):
        loss(model).backward()
    check_gradients(model, exact)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        loss(model).backward()
    check_gradients(model, {name: 2 * gradient for name, gradient in exact.items()})
    optimizer = gradlite.GradLite(model, rank=5)
    with pytest.warns(UserWarning, match="outside its layer"):
        loss(model).backward()
    optimizer.step()


def test_one_module_used_twice_and_one_weight_in_two_modules() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24, bias=False)
            self.b.weight = self.a.weight
            self.same = self.a

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(self.same(self.a(x).tanh()).tanh())
            return result

    model, x = Twice().double(), torch.randn(7, 24).double()
    exact = exact_gradients(model, lambda m: m(x).square().sum())
    coverage = gradlite.attach(model, rank=5)
    assert len(coverage.entries) == 2
    model(x).square().sum().backward()
    check_gradients(model, exact)
    gradlite.detach(model)
    assert {type(m) for m in model.modules()} == {Twice, nn.Linear}


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool, tiny_model: Build, batches: Batches) -> None:
    """Also with backward inside autocast: what is made of a gradient keeps the gradient's own format."""
    model, plain = tiny_model(torch.float32), tiny_model(torch.float32)
    optimizer = gradlite.GradLite(model, lr=1e-2, rank=4)
    ids = batches(1)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, wanted = model(ids), plain(ids)
        if inside:
            loss.backward()
            wanted.backward()
    if not inside:
        loss.backward()
        wanted.backward()
    torch.testing.assert_close(loss, wanted)
    found = attachment(model)
    for (name, _), collector in zip(found.projected, found.window.collectors, strict=True):
        exact, basis, grad = plain.get_parameter(name).grad, collector.basis.matrix_NR, collector.coordinates.grad
        assert exact is not None
        assert basis is not None
        assert grad is not None
        assert grad.dtype == basis.dtype == torch.float32
        assert (grad - exact @ basis).norm() < 0.02 * exact.norm()
        if name == "o.weight":
            eye = torch.eye(4)
            torch.testing.assert_close(basis.T @ basis, eye, rtol=0, atol=2e-2)
    before = loss.item()
    for _ in range(4):
        optimizer.step()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids)
        loss.backward()
    assert loss.item() < before


def test_backward_inside_autocast_loses_no_precision() -> None:
    table = nn.Embedding(40, 32)  # look-ups are not cast: the gradient is float32, and so must be what is made of it
    exact = copy.deepcopy(table)
    gradlite.attach(table, rank=4)
    ids, target = torch.randint(0, 40, (9,)), torch.randn(9, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for module in (table, exact):
            (module(ids) - target).square().sum().backward()
    collector = attachment(table).window.collectors[0]
    assert collector.basis.matrix_NR is not None
    assert exact.weight.grad is not None
    torch.testing.assert_close(collector.coordinates.grad, exact.weight.grad @ collector.basis.matrix_NR)
    eye = torch.eye(4)
    torch.testing.assert_close(collector.basis.matrix_NR.T @ collector.basis.matrix_NR, eye, rtol=0, atol=1e-5)


def test_compiled_models_train_as_others(tiny_model: Build, batches: Batches) -> None:
    model, other = tiny_model(), tiny_model()
    optimizer = gradlite.GradLite(model, lr=1e-2, rank=4, moments="fp32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(other, backend="aot_eager")
        other_optimizer = gradlite.GradLite(compiled, lr=1e-2, rank=4, moments="fp32")  # type: ignore[arg-type]
        for ids in batches(4):
            for m, o in ((model, optimizer), (compiled, other_optimizer)):
                m(ids).backward()
                o.step()
                o.zero_grad()
    assert attachment_of(other) is not None
    assert members(model) == members(other)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=name)
    gradlite.detach(compiled)  # type: ignore[arg-type]
    assert attachment_of(other) is None


def test_the_door_stays_a_function() -> None:
    import gradlite.attaching.rank

    assert callable(gradlite.attach)
    assert gradlite.attach(nn.Linear(32, 32), rank=2).num_elements("projected") == 1024


def test_an_attached_model_survives_torch_save(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    gradlite.attach(model, rank=4)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(5, 32)
    for each in (model, loaded):
        each(x).square().sum().backward()
    assert torch.equal(loaded[0].weight, model[0].weight)  # type: ignore[arg-type]
    assert loaded[0].gradlite_coordinates.grad.shape == (32, 4)
    assert type(gradlite.detach(loaded)[0]) is nn.Linear  # type: ignore[index]
