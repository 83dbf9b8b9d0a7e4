"""MeSP and MeBP train as PEFT's LoRA does; block inputs in memory-mapped files; the model comes back as it was."""

import copy
import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gradlite
from gradlite.attaching.lora_twins import TwinLoraLinear
from gradlite.errors import GradLiteError
from gradlite.hold.mapped_file import MappedFile
from gradlite.methods.method import Method

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 30, (4, 2, 7), generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def build(name: str, **options: Any) -> Method:
    torch.manual_seed(0)
    method = gradlite.methods.build(name, llama(), **{"lr": 1e-2, **options})
    method.model.train()
    return method


def train(method: Method, steps: int = 6) -> Tensor:
    torch.manual_seed(1)
    losses = []
    for number in range(steps):
        loss = method.model(input_ids=IDS[number % 4], labels=IDS[number % 4]).loss
        method.backward(loss)
        method.step()
        method.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("mesp", {}),
    ("mesp", {"store_h": True, "hold": "exact"}),
    ("mesp", {"dropout": 0.2}),
    ("mesp", {"hold": "recompute-mapped"}),
    ("mebp", {}),
    ("mebp", {"block_inputs": "mapped", "loss": "tiled"}),
    ("mebp", {"dropout": 0.2}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_trains_as_lora(name: str, options: dict[str, Any]) -> None:
    method = build(name, **options)
    plain = build("lora", **{key: value for key, value in options.items() if key == "dropout"})
    torch.testing.assert_close(train(method), train(plain), rtol=1e-4, atol=0)
    assert not method.claims.full_parameter


@pytest.mark.parametrize("hold", ["int8", "recompute-int8"])
def test_a_resumed_run_rounds_as_the_uninterrupted_one(hold: str) -> None:
    whole, parts = build("mesp", hold=hold), build("mesp", hold=hold)
    train(whole, 3)
    other = build("mesp", hold=hold, seed=1)
    for method in (parts, other):
        method.model.load_state_dict(whole.model.state_dict())
        method.load_state_dict(copy.deepcopy(whole.state_dict()))
    losses = train(whole)
    assert torch.equal(train(parts), losses)
    assert not torch.equal(train(other), losses)  # the rounding does matter here


@pytest.mark.parametrize(("name", "options"), [("mesp", {"hold": "recompute-mapped"}), ("mebp", {"block_inputs": "mapped"})])
def test_block_inputs_are_in_files(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    put, sizes = MappedFile.put, []

    def counted(self: MappedFile, leaves: tuple[Tensor, ...]) -> Any:
        sizes.append([tuple(leaf.shape) for leaf in leaves])
        return put(self, leaves)

    monkeypatch.setattr(MappedFile, "put", counted)
    train(build(name, **options), 1)
    assert sizes == [[(14, 16)]] * 2  # of two blocks


@pytest.mark.parametrize("name", ["mesp", "mebp"])
def test_finish_gives_the_model_back(name: str) -> None:
    method = build(name)
    plain = build("lora")
    train(method, 1)
    finished = method.finish()
    assert [type(module) for module in finished.modules()] == [type(module) for module in plain.model.modules()]


def test_blocks_are_replayed() -> None:
    method = build("mebp")
    calls: list[int] = []
    for module in method.model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    train(method, 1)
    assert len(calls) == 4


def test_four_bits_reach_the_model() -> None:
    method = build("mesp", base="int4")
    assert train(method)[-1] < train(build("mesp"), 1)[0]
    layer = next(module for module in method.model.modules() if isinstance(module, TwinLoraLinear))
    assert "gradlite_codes" in dict(layer.base_layer.named_buffers())  # type: ignore[union-attr]


def test_refusals() -> None:
    with pytest.raises(GradLiteError, match="did you mean 'block_inputs'"):
        build("mebp", block_input="mapped")
    with pytest.raises(GradLiteError, match="block_inputs is 'disk'"):
        build("mebp", block_inputs="disk")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve a file's room")
def test_a_full_disk_is_told_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(GradLiteError, match=r"cannot be had in .*\(No space left on device\); .*TMPDIR"):
        MappedFile().put((torch.zeros(3),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_mapped_files(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = MappedFile()
    leaves = (torch.arange(6).to(dtype).view(2, 3), torch.empty(0, 4, dtype=dtype))
    waiting = place.put(leaves)
    assert list(tmp_path.iterdir()) == []  # unlinked, and yet there
    assert waiting[0].data_ptr() != leaves[0].data_ptr()
    for found, leaf in zip(place.fetch(waiting), leaves, strict=True):
        assert torch.equal(found, leaf)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert f"{tmp_path}/gradlite-" in maps.read_text()
        del waiting, found
        assert f"{tmp_path}/gradlite-" not in maps.read_text()
