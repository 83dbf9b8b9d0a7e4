"""Whether a checkpoint is whole, asked before anything that it would be needed for is given up."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from gradlite.errors import GradLiteError

_STATE = "trainer_state.json"
_STORED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")  # without one of them the Trainer would begin that part anew
_INDEX_SUFFIX = ".safetensors.index.json"


def check_whole(checkpoint: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise `GradLiteError` where a file of a checkpoint is missing or damaged, or does not fit the model's `weights`."""
    numbers = [folder.name.rsplit("-", 1)[1] for folder in checkpoint.parent.glob("checkpoint-*") if folder != checkpoint]
    remedy = (
        "delete it to resume from the one before"
        if any(number.isdecimal() for number in numbers)
        else "there is no other, so give --overwrite to begin again, or another --name"
    )
    for name in _file_names(checkpoint):
        try:
            _read(checkpoint / name, weights)
        except FileNotFoundError:
            raise GradLiteError(f"checkpoint {str(checkpoint)!r} is damaged ({name} is missing); {remedy}.") from None
        except Exception as error:  # a damaged file raises whatever its reader stumbles over
            raise GradLiteError(f"checkpoint {str(checkpoint)!r} is damaged ({name} cannot be read); {remedy}.") from error


def _file_names(checkpoint: Path) -> list[str]:
    """What a checkpoint must hold, and all that it holds of JSON and of weights."""
    found = {file.name for pattern in ("*.json", "*.safetensors") for file in checkpoint.glob(pattern)}
    if not any(name.endswith((".safetensors", _INDEX_SUFFIX)) for name in found):
        found.add("model.safetensors")
    return [*_STORED, *sorted({_STATE, *found, *_shards(checkpoint)})]


def _shards(checkpoint: Path) -> set[str]:
    """The files that large models' weights are spread over; nothing where the list itself is damaged, which is told."""
    try:
        return {
            name
            for index in checkpoint.glob(f"*{_INDEX_SUFFIX}")
            for name in json.loads(index.read_bytes())["weight_map"].values()
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return set()


def _read(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Read as much of a file as shows that it is whole. Raises whatever its reader raises."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as stored:  # compares the sizes in its header with the file's
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                if name in weights and tuple(stored.get_slice(name).get_shape()) != tuple(weights[name].shape):
                    raise ValueError(f"{name} has another shape than the model's")
    elif file.suffix == ".json":
        found = json.loads(file.read_bytes())
        if file.name == _STATE:
            TrainerState(**found)
        elif file.name.endswith(_INDEX_SUFFIX):
            dict(found["weight_map"])
    else:
        with safe_globals():  # the random generators' states hold numpy's
            torch.load(file, map_location="cpu", weights_only=True, mmap=True)
