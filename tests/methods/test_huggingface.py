"""GradLite under transformers: a tiny Llama, its files, and the Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

import gradlite
from gradlite.attaching import attachment_of

datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")  # what third parties warn of is not ours to fail on


def llama(tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def words() -> Any:
    """A tokenizer whose tokens are numbers."""
    vocabulary = {str(number): number for number in range(64)}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="0"))


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(12) * (1 + index % 3) + index) % 64
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_is_covered_counted_and_saved_as_it_is(tied: bool, tmp_path: Path) -> None:
    model = llama(tied)
    count, keys = model.num_parameters(), list(model.state_dict())
    optimizer = gradlite.GradLite(model, lr=1e-2, rank=4)
    assert optimizer.coverage.num_elements() == model.num_parameters() == count
    assert model.num_parameters(only_trainable=True) == count
    assert list(model.state_dict()) == keys
    ids = Rows()[0]["input_ids"][None]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = attachment_of(model)
    assert found is not None
    basis_of = {name: c.basis for (name, _), c in zip(found.projected, found.window.collectors, strict=True)}
    for layer in (0, 1):
        prefix = f"model.layers.{layer}."
        q, k, v = (basis_of[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv")
        gate, up = (basis_of[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up"))
        assert q is k is v
        assert gate is up
    assert len(set(map(id, basis_of.values()))) == 2 * 4 + (1 if tied else 2)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "gradlite" in name or "coordinates" in name]
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    with torch.no_grad():
        logits = [each(input_ids=ids).logits for each in (loaded, model.eval())]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        model.generate(ids[:, :4], max_new_tokens=4, do_sample=False),
        loaded.generate(ids[:, :4], max_new_tokens=4, do_sample=False),
    )


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_resized_after_attaching_are_refused_until_it_is_attached_anew(tied: bool) -> None:
    model, ids = llama(tied), Rows()[0]["input_ids"][None]
    optimizer = gradlite.GradLite(model, lr=1e-2, rank=4)
    model(input_ids=ids, labels=ids).loss.backward()
    model.resize_token_embeddings(80)
    for call in (optimizer.step, lambda: model(input_ids=ids)):
        with pytest.raises(gradlite.GradLiteError, match=r"resize .* before attaching, or build the optimizer anew"):
            call()
    optimizer = gradlite.GradLite(model, lr=1e-2, rank=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids + 16, labels=ids + 16).loss.backward()
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gradlite.detach(model)
    model.resize_token_embeddings(64)
    model(input_ids=ids)


def trainer(model: nn.Module, directory: Path, steps: int, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(directory), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_grad_norm=0.5, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=1, warmup_steps=2,
        lr_scheduler_type="cosine", learning_rate=1.0, save_strategy="steps", save_steps=5, **options,
    )  # fmt: skip
    settings = {"lr": 5e-3, "rank": 8, "refresh_interval": 2}
    return transformers.Trainer(
        model, arguments, train_dataset=Rows(), optimizer_cls_and_kwargs=(gradlite.optimizer_factory, settings)
    )


def test_trainer_trains_clips_accumulates_logs_and_resumes(tmp_path: Path) -> None:
    model = llama()
    first = trainer(model, tmp_path / "whole", 10)
    first.train()
    logs = [entry for entry in first.state.log_history if "grad_norm" in entry]
    assert len(logs) == 10
    assert all(entry["grad_norm"] > 0.5 for entry in logs[:2])  # shown before clipping
    assert logs[-1]["loss"] < logs[0]["loss"] - 0.2
    assert max(entry["learning_rate"] for entry in logs) == pytest.approx(5e-3)  # GradLite's lr, the scheduler's shape
    optimizer = getattr(first.optimizer, "optimizer", first.optimizer)
    assert isinstance(optimizer, gradlite.GradLite)
    assert optimizer._global_step == 10
    resumed_model = llama()
    again = trainer(resumed_model, tmp_path / "whole", 10)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for (name, value), other in zip(model.state_dict().items(), resumed_model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_trainer_with_gradient_checkpointing(tmp_path: Path) -> None:
    plain, saving = llama(), llama()
    trainer(plain, tmp_path / "a", 3).train()
    trainer(saving, tmp_path / "b", 3, gradient_checkpointing=True).train()
    for (name, value), other in zip(plain.state_dict().items(), saving.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4, msg=name)


def test_trls_trainer_trains(tmp_path: Path) -> None:
    """It multiplies by the head's weight past its layer, which is told, and trains all the same."""
    trl = pytest.importorskip("trl")
    model = llama(tied=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, seed=1, bf16=False, gradient_checkpointing=False, save_strategy="no", max_length=16,
    )  # fmt: skip
    rows = [{key: part.tolist() for key, part in Rows()[number].items()} for number in range(24)]
    settings = {"lr": 5e-3, "rank": 8}
    optimizer = (gradlite.optimizer_factory, settings)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words(), pad_token="0", eos_token="1")
    data = datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=data, processing_class=tokenizer, optimizer_cls_and_kwargs=optimizer
    )
    with pytest.warns(UserWarning, match="is used outside its layer"):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
