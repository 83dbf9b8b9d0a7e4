"""A damaged checkpoint is named before anything of the run that it belongs to is replaced."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gradlite.errors import GradLiteError
from gradlite.train.checkpoint import check_whole

Train = Callable[..., Any]  # the fixture's function: settings → what the run left

FILES = (
    "model.safetensors", "config.json", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
)  # fmt: skip


def test_each_file_of_a_checkpoint_is_looked_at_before_the_finished_run_is_replaced(train: Train, model_dir: Path) -> None:
    outcome = train(save_every=3)
    record = (outcome.path / "run.json").read_bytes()
    folder = outcome.path / "checkpoints" / "checkpoint-6"
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    check_whole(folder, model.state_dict())
    for name in FILES:
        whole = (folder / name).read_bytes()
        for damage, said in ((whole[: len(whole) // 2], "cannot be read"), (None, "is missing")):
            (folder / name).unlink() if damage is None else (folder / name).write_bytes(damage)
            if damage is None and name == "config.json":
                continue  # nothing that a resumed run asks for
            with pytest.raises(GradLiteError, match=rf"checkpoint-6.*\({name} {said}\); delete it to resume from") as error:
                check_whole(folder, model.state_dict())
            assert "\n" not in str(error.value)
        (folder / name).write_bytes(whole)

    state = folder / "trainer_state.json"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GradLiteError, match="trainer_state"):
        train(save_every=3, resume=True, max_steps=8)
    assert (outcome.path / "run.json").read_bytes() == record
    shutil.rmtree(folder.parent / "checkpoint-3")
    with pytest.raises(GradLiteError, match="no other, so give --overwrite"):
        check_whole(folder, {})
    state.write_bytes(whole)
    assert train(save_every=3, resume=True, max_steps=8).record()["steps"] == 8


def test_weights_of_another_model_are_not_taken_for_this_ones(train: Train) -> None:
    outcome = train(save_every=6)
    with pytest.raises(GradLiteError, match=r"model\.safetensors cannot be read"):
        check_whole(outcome.path / "checkpoints" / "checkpoint-6", {"model.norm.weight": torch.zeros(63)})


def test_adapters_and_weights_in_several_files_are_weights_too(train: Train) -> None:
    outcome = train(save_every=6, method="lora")
    folder = outcome.path / "checkpoints" / "checkpoint-6"
    check_whole(folder, {})
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(GradLiteError, match=r"model-1\.safetensors is missing"):
        check_whole(folder, {})
