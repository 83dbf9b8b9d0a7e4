"""The model card: what was trained, on what, how well, and how to do it again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gradlite.train.config import DEFAULT_DATASET, DEFAULT_MODEL, TrainConfig
from gradlite.train.words import in_bytes, in_count, in_time


@dataclass(frozen=True)
class Result:
    """What a finished run measured. Losses are in nats per held-out token."""

    steps: int
    skipped_steps: int
    num_tokens: int
    seconds: float
    peak_memory_bytes: int
    loss_before: float
    loss_after: float
    held_out_tokens: int
    answers_before: list[dict[str, str]]
    answers_after: list[dict[str, str]]
    num_parameters: int
    method: str
    full_parameter: bool
    coverage: str
    state_bytes: dict[str, int]

    @property
    def fall(self) -> float:
        """By how much the held-out loss fell, as a fraction of where it began."""
        return (self.loss_before - self.loss_after) / self.loss_before


def model_card(config: TrainConfig, result: Result, versions: Mapping[str, str]) -> str:
    """README.md in the form that the Hugging Face hub reads."""
    library = "transformers" if result.full_parameter or result.method == "badam" else "peft"
    links = {**_base_model(config.model), **_datasets(config.dataset)}
    header = yaml.safe_dump({**links, "library_name": library, "pipeline_tag": "text-generation", "tags": ["gradlite"]})
    questions = "\n".join(
        _question(before, after) for before, after in zip(result.answers_before, result.answers_after, strict=True)
    )
    return f"""---
{header}---

# {config.run_name}

{_how(config, result)}

| held-out loss ({result.held_out_tokens:,} tokens) | nats per token |
|---|---|
| before | {result.loss_before:.4f} |
| after {result.steps} steps | {result.loss_after:.4f} ({_change(result.fall)}) |

{in_count(result.num_parameters)} parameters:

{_listed(result.coverage)}

{result.num_tokens:,} training tokens in {in_time(result.seconds)}, peak memory {in_bytes(result.peak_memory_bytes)}, \
{result.skipped_steps} steps skipped because a loss or gradient was not finite.

![loss](loss.png)

## The same run again

Save this as `run.yaml` and call `gradlite train --config run.yaml`.

```yaml
{config.afresh().to_yaml().strip()}
```

Made with {", ".join(f"{name} {version}" for name, version in versions.items())}.

## Held-out questions
{questions}
"""


def _base_model(name: str) -> dict[str, str]:
    """What the hub links the card to: it knows hub ids, and refuses a card with a path of this machine in it."""
    if name == DEFAULT_MODEL:
        return {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    return {} if _lies_here(name) else {"base_model": name}


def _datasets(name: str) -> dict[str, list[str]]:
    """The data set as the hub links it; what is embedded here, or lies on this machine, is no hub id."""
    return {} if name == DEFAULT_DATASET or _lies_here(name) else {"datasets": [name]}


def _lies_here(name: str) -> bool:
    """Whether a model's or a data set's name is a path on this machine; it was loaded, so `~somebody` is known."""
    return Path(name).expanduser().exists()


def _how(config: TrainConfig, result: Result) -> str:
    what = ", all of its weights" if result.full_parameter else ""
    way = "GradLite" if result.method == "gradlite" else f"GradLite's front end and the method `{result.method}`"
    return f"`{config.model}`{what} fine-tuned on `{config.dataset}` with {way}."


def _listed(lines: str) -> str:
    """One item a line: Markdown would run them together."""
    return "\n".join(f"- {line}" for line in lines.strip().splitlines())


def _change(fall: float) -> str:
    return f"{fall:.1%} lower" if fall >= 0 else f"{-fall:.1%} higher"


def _question(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    parts = (("Question", before["question"]), ("Before", before["answer"]), ("After", after["answer"]))
    return "\n".join(f"\n{title}:\n\n{_quoted(text)}" for title, text in parts)


def _quoted(text: str) -> str:
    """Text as an indented block, which no Markdown in it can break out of."""
    return "\n".join(f"    {line}" for line in (text or "(nothing)").splitlines())
