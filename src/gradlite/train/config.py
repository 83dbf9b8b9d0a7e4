"""Every setting of a training run, in one place.

A key of this model is a key of `run.yaml` and a flag of `gradlite train` (underscore ↔ dash): the command line is
generated from the fields below, so the three can never drift apart. Whatever is wrong with a value is told in one
sentence (`GradLiteError`) that names the key, the value given and what is accepted. Importing this module is light: no
torch, no transformers.
"""

import difflib
import json
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from gradlite.errors import GradLiteError
from gradlite.methods import SEEDED, names
from gradlite.train.fields import (
    EVALUATION,
    GRADLITE,
    MODEL_AND_DATA,
    OUTPUT,
    TRAINING,
    accepted_kinds,
    accepts_of,
    flag_of,
    group_of,
    setting,
)
from gradlite.train.values import fraction_text, int_or_float, mapping, short_name
from gradlite.train.yaml_file import read_mapping
from gradlite.validation import shown

HoldMode = Literal["exact", "int8", "int4", "projected", "host", "recompute", "recompute-int8", "recompute-mapped"]

LORA_METHODS = ("lora", "dora", "mesp", "mebp")

DEFAULT_MODEL = "smollm2"
DEFAULT_DATASET = "python-help"


# What other trainers call these keys; used only to suggest ours.
_NAMES_ELSEWHERE = {
    "dataset_config_name": "dataset_config",
    "eval_steps": "eval_every",
    "gradient_accumulation_steps": "accumulation",
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "max_length": "seq_len",
    "max_seq_length": "seq_len",
    "model_name_or_path": "model",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "save_steps": "save_every",
    "steps": "max_steps",  # as `gradlite compare` calls it
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
}


def nearest_key(word: str) -> str | None:
    """The known key that looks most like `word` (or that other trainers call so), or None if none is close."""
    known = {**_NAMES_ELSEWHERE, **{key: key for key in TrainConfig.model_fields}}
    matches = difflib.get_close_matches(word.lower().replace("-", "_"), known, n=1, cutoff=0.6)
    return known[matches[0]] if matches else None


class TrainConfig(BaseModel):
    """The settings of one run, validated and immutable. `from_sources` reads them, `to_yaml` writes them back."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    model: str = setting(
        DEFAULT_MODEL,
        MODEL_AND_DATA,
        "a path or a hub id",
        "Model: 'smollm2' (embedded), a path, or a hub id.",
        min_length=1,
    )
    dataset: str = setting(
        DEFAULT_DATASET,
        MODEL_AND_DATA,
        "a path or a hub id",
        "Data: 'python-help' (embedded), a path (jsonl, json, csv, parquet, directory), or a hub id.",
        min_length=1,
    )
    dataset_config: str | None = setting(
        None,
        MODEL_AND_DATA,
        "a configuration's name, or none",
        "Configuration of --dataset on the hub, such as 'main'; none: its only or default one.",
        min_length=1,
    )
    eval_dataset: str | None = setting(
        None,
        MODEL_AND_DATA,
        "a path, a hub id, or none",
        "Held-out data; none: the data set's own held-out split, or else rows split off.",
        min_length=1,
    )
    train_on: Literal["answer", "all"] = setting(
        "answer", MODEL_AND_DATA, "'answer' or 'all'", "Tokens that the loss covers: the answer's, or all."
    )
    seq_len: int = setting(
        512, MODEL_AND_DATA, "a whole number, 2 or more", "Longest sequence, in tokens; what is longer is cut.", ge=2
    )
    packing: bool = setting(False, MODEL_AND_DATA, "true or false", "Put several short examples into one sequence.")

    rank: int | float = setting(
        1 / 16,
        GRADLITE,
        "a whole number of at least 1, or a fraction of the layer's input width above 0 and up to 1 such as 1/16",
        "Rank of the gradient: a number (64), or a fraction of each layer's input width (1/16).",
    )
    feedback: Literal["feedback", "same_step", "off"] = setting(
        "off",
        GRADLITE,
        "'feedback', 'same_step' or 'off'",
        "What happens to the gradient outside the basis: remembered, applied at once, or dropped.",
    )
    feedback_memory: Literal["factored", "int4", "fp32"] = setting(
        "factored", GRADLITE, "'factored', 'int4' or 'fp32'", "How the error memory is held."
    )
    basis: Literal["gradient", "activation", "random"] = setting(
        "gradient", GRADLITE, "'gradient', 'activation' or 'random'", "What the basis follows."
    )
    refresh_interval: int = setting(
        5, GRADLITE, "a whole number, 1 or more", "Steps between two refreshes of one layer's basis.", ge=1
    )
    moments: Literal["int8", "fp32"] = setting("int8", GRADLITE, "'int8' or 'fp32'", "How AdamW's moments are held.")
    betas: tuple[float, float] = setting(
        (0.9, 0.999), GRADLITE, "two numbers from 0 to below 1, such as 0.9,0.999", "AdamW's two decay rates."
    )
    eps: float = setting(1e-8, GRADLITE, "a number above 0", "AdamW's epsilon.", gt=0)
    hold: HoldMode | dict[str, HoldMode] = setting(
        "exact",
        GRADLITE,
        "'exact', 'int8', 'int4', 'projected', 'host', 'recompute', 'recompute-int8', 'recompute-mapped', or a mapping of "
        "module patterns to these",
        "How tensors wait for backward: kept, as codes, in host memory, or computed again; {pattern: mode} by module.",
    )
    include: list[str] = setting(
        [], GRADLITE, "a pattern or a list of patterns", "Project only layers whose name fits this pattern (repeatable)."
    )
    exclude: list[str] = setting(
        [], GRADLITE, "a pattern or a list of patterns", "Do not project layers whose name fits this pattern (repeatable)."
    )
    stochastic_rounding: bool = setting(
        True, GRADLITE, "true or false", "Round bf16 weights stochastically, so that small updates are not lost."
    )

    method: str = setting(
        "gradlite",
        TRAINING,
        f"one of {', '.join(names())}",
        f"Way to train, one of {len(names())}: adamw8bit, lomo, galore, lora …; any other word lists them.",
    )
    method_options: dict[str, Any] | None = setting(
        None,
        TRAINING,
        "a mapping of the method's options such as {rank: 8}, or none",
        "Options of --method, as a mapping: {rank: 8}. GradLite's are flags of their own.",
    )
    lora_rank: int | None = setting(
        None,
        TRAINING,
        "a whole number of at least 1, or none",
        f"Rank of the adapters of --method {', '.join(LORA_METHODS)}; none: 8.",
        ge=1,
    )
    lr: float = setting(1e-4, TRAINING, "a number above 0", "Peak learning rate, on AdamW's usual scale.", gt=0)
    batch_size: int = setting(4, TRAINING, "a whole number, 1 or more", "Sequences in one micro-batch.", ge=1)
    accumulation: int = setting(1, TRAINING, "a whole number, 1 or more", "Micro-batches in one step.", ge=1)
    epochs: float = setting(1.0, TRAINING, "a number above 0", "Passes over the data, unless --max-steps is given.", gt=0)
    max_steps: int | None = setting(
        None, TRAINING, "a whole number of at least 1, or none", "Stop after this many optimizer steps.", ge=1
    )
    schedule: Literal["cosine", "linear", "constant"] = setting(
        "cosine", TRAINING, "'cosine', 'linear' or 'constant'", "How the learning rate goes down after the warm-up."
    )
    warmup: int | float = setting(
        0.1,
        TRAINING,
        "a fraction of the run from 0 to below 1, or a whole number of steps",
        "Warm-up: a fraction of the run (below 1), or a number of steps.",
    )
    weight_decay: float = setting(0.0, TRAINING, "a number, 0 or more", "Decoupled weight decay.", ge=0)
    max_grad_norm: float | None = setting(
        None,
        TRAINING,
        "a number, 0 or more, or none",
        "Clip the gradient to this norm; 0: no clipping; none: 1 where the method can clip.",
        ge=0,
    )
    dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "auto",
        TRAINING,
        "'auto', 'bfloat16' or 'float32'",
        "Number format of the weights and of the computation; auto: bfloat16, but float32 on a CPU that is slow with it.",
    )
    seed: int = setting(0, TRAINING, "a whole number from 0 to 4294967295", "Seed of everything random.", ge=0, le=2**32 - 1)

    eval_examples: int = setting(
        64, EVALUATION, "a whole number, 1 or more", "Held-out examples that the evaluation uses.", ge=1
    )
    eval_every: int | None = setting(
        None,
        EVALUATION,
        "a whole number of at least 1, or none",
        "Evaluate every so many steps; none: before and after the run only.",
        ge=1,
    )
    save_every: int | None = setting(
        None,
        EVALUATION,
        "a whole number of at least 1, or none",
        "Write a checkpoint every so many steps; none: only the finished model is written.",
        ge=1,
    )
    resume: bool = setting(False, EVALUATION, "true or false", "Go on from the run's last checkpoint.")

    output_dir: Path = setting(Path("runs"), OUTPUT, "a directory's path", "Directory that holds the runs.")
    name: str | None = setting(
        None,
        OUTPUT,
        "the name of one directory (no slash), or none",
        "The run's directory in --output-dir; none: made from model, dataset and seed.",
    )
    overwrite: bool = setting(False, OUTPUT, "true or false", "Replace a finished run of the same name.")
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = setting(
        [],
        OUTPUT,
        "a list of 'tensorboard', 'trackio' or 'wandb'",
        "Also log to this tool (repeatable).",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _from_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Read what a YAML file or a command line writes differently from Python."""
        key = str(info.field_name)
        kinds = accepted_kinds(cls.model_fields[key])
        if key == "feedback" and value is False:
            return "off"  # YAML 1.1 reads a bare `off` as false
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError("a truth value is not accepted here")
        if isinstance(value, str):
            text = value.strip()
            if types.NoneType in kinds and text.lower() == "none":
                return None
            if key in ("include", "exclude"):
                return [text]
            if key in ("hold", "method_options") and text.startswith("{"):
                return mapping(text)
            if key == "betas":
                return [part.strip() for part in text.split(",")]
            if kinds == {int, float}:
                return int_or_float(text)
        return value

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method not in names():
            raise ValueError("unknown method")
        return method

    @field_validator("rank")
    @classmethod
    def _rank_in_range(cls, rank: int | float) -> int | float:
        if (isinstance(rank, int) and rank >= 1) or (isinstance(rank, float) and 0 < rank <= 1):
            return rank
        raise ValueError("rank out of range")

    @field_validator("warmup")
    @classmethod
    def _warmup_in_range(cls, warmup: int | float) -> int | float:
        if warmup < 0 or (warmup >= 1 and not float(warmup).is_integer()):
            raise ValueError("warmup out of range")
        return int(warmup) if warmup >= 1 else warmup

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if all(0 <= beta < 1 for beta in betas):
            return betas
        raise ValueError("betas out of range")

    @field_validator("output_dir")
    @classmethod
    def _expand_home(cls, path: Path) -> Path:
        try:
            return path.expanduser()
        except RuntimeError as error:  # ~somebody
            raise ValueError("no such home directory") from error

    @field_validator("name")
    @classmethod
    def _one_directory(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip() or name in {".", ".."} or re.search(r"[/\\\0]", name)):
            raise ValueError("not the name of one directory")
        return name

    @model_validator(mode="after")
    def _not_both(self) -> Self:
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: give one of them.")
        return self

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> Self:
        options = self.method_options or {}
        own = next((str(key) for key in options if key in ("lr", "weight_decay")), None)
        if own:
            raise ValueError(f"method_options must not hold {own!r}, which is a key of its own: give {flag_of(own)}.")
        if self.lora_rank is not None:
            if self.method not in LORA_METHODS:
                raise ValueError(
                    f"--lora-rank is a setting of the methods {', '.join(LORA_METHODS)}, not of {self.method!r}: "
                    + ("give --rank." if self.method == "gradlite" else "leave it out.")
                )
            if "rank" in options:
                raise ValueError("--lora-rank and the rank in --method-options exclude each other: give one of them.")
        if self.method == "gradlite":
            if options:
                key = str(next(iter(options)))
                known = key in TrainConfig.model_fields
                raise ValueError(
                    "method_options must be none with method 'gradlite', whose settings are keys of their own: "
                    + (f"give {flag_of(key)}." if known else f"it has none called {key!r}.")
                )
            return self
        for key, field in TrainConfig.model_fields.items():
            if group_of(field) == GRADLITE and getattr(self, key) != field.get_default(call_default_factory=True):
                remedy = "leave it out (--method-options takes the method's own)"
                if key == "rank" and self.method in LORA_METHODS:
                    remedy = "give --lora-rank"
                raise ValueError(f"{flag_of(key)} is a setting of method 'gradlite', not of {self.method!r}: {remedy}.")
        return self

    @property
    def run_name(self) -> str:
        """`name`, or else one made from model, dataset, method (but GradLite) and seed: equal settings give an equal name."""
        method = "" if self.method == "gradlite" else f"-{self.method}"
        return self.name or f"{short_name(self.model)}-{short_name(self.dataset)}{method}-seed{self.seed}"

    @property
    def run_dir(self) -> Path:
        """The directory that this run writes to: `output_dir / run_name`."""
        return self.output_dir / self.run_name

    def optimizer_keywords(self) -> dict[str, Any]:
        """The keywords of `gradlite.GradLite(model, **keywords)`; there, an empty list of patterns is None."""
        keys = [key for key, field in TrainConfig.model_fields.items() if group_of(field) == GRADLITE]
        keywords = {key: getattr(self, key) for key in [*keys, "lr", "weight_decay", "seed"]}
        return {key: (value or None) if isinstance(value, list) else value for key, value in keywords.items()}

    def method_keywords(self) -> dict[str, Any]:
        """The keywords of `gradlite.methods.build(method, model, **keywords)`."""
        if self.method == "gradlite":
            return self.optimizer_keywords()
        rank = {} if self.lora_rank is None else {"rank": self.lora_rank}
        seed = {"seed": self.seed} if self.method in SEEDED else {}
        return {"lr": self.lr, "weight_decay": self.weight_decay, **seed, **rank, **(self.method_options or {})}

    def afresh(self) -> Self:
        """The same run without `resume` and `overwrite`, which say what becomes of an earlier one."""
        return self.model_copy(update={"resume": False, "overwrite": False})

    def settings(self) -> dict[str, Any]:
        """All keys in the order of the fields, as plain text, numbers and lists that read back equal."""
        settings = self.model_dump(mode="json")
        if isinstance(self.rank, float):
            settings["rank"] = fraction_text(self.rank)
        return settings

    def to_yaml(self) -> str:
        """`settings()` as YAML."""
        settings = self.settings()
        printable = json.dumps(settings, ensure_ascii=False).isprintable()  # PyYAML writes a raw U+0085 wrongly
        return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=printable))

    @classmethod
    def from_sources(cls, config_file: Path | None = None, flags: Mapping[str, object] | None = None) -> Self:
        """Defaults, overridden by the YAML file, overridden by the flags (only those that were given).

        Raises `GradLiteError` if the file cannot be read as a YAML mapping, or for the first key that is unknown or has
        a value that is not accepted.
        """
        from_file = {} if config_file is None else read_mapping(config_file)
        from_flags = dict(flags or {})
        for key in [*from_file, *from_flags]:
            if key not in cls.model_fields:
                guess = nearest_key(str(key))
                hint = f"did you mean {guess!r}?" if guess else "`gradlite train --help` lists the known keys."
                raise GradLiteError(f"unknown key {key!r}{f' in {config_file}' if key in from_file else ''}; {hint}")
        try:
            return cls.model_validate({**from_file, **from_flags})
        except ValidationError as error:
            problem = error.errors()[0]
        if not problem["loc"]:
            raise GradLiteError(str(problem["ctx"]["error"]))
        key = str(problem["loc"][0])
        label, given = (flag_of(key), from_flags[key]) if key in from_flags else (f"{key} in {config_file}", from_file[key])
        raise GradLiteError(f"{label} is {shown(given)}, but it must be {accepts_of(cls.model_fields[key])}.")
