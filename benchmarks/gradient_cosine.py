"""How far each way of holding turns the gradient: cosine with exact backpropagation on SmolLM2-135M and GSM8K.

    python benchmarks/gradient_cosine.py --data-dir DIR --out benchmarks/results/gradient_cosine.jsonl

One batch of 8 problems (176 tokens, answer-only loss). Projected weights are compared inside their basis (``C.grad`` against
``G P``), the others as they are; all parts together make one vector. The truth is float32 backpropagation. In float32 the
figure is what holding costs; in bfloat16 it stands beside Hugging Face's own bfloat16 gradient, which is not exact either.
"""

import argparse
import json
from pathlib import Path

from gsm8k import encode, stack
from record import append, describe
from torch import Tensor, nn

import gradlite
from gradlite.attaching import attachment_of
from gradlite.train.models import load_model_and_tokenizer

MODES = ("exact", "int8", "int4", "recompute", "recompute-int8")


def full_gradients(model: nn.Module, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Every parameter's gradient by plain backpropagation."""
    model.zero_grad()
    model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters() if parameter.grad is not None}


def compare(model: nn.Module, mode: str, ids: Tensor, labels: Tensor, exact: dict[str, Tensor]) -> dict[str, float]:
    """Cosine and relative length of the whole gradient, and the lowest cosine of a single tensor."""
    gradlite.attach(model, hold=mode)  # type: ignore[arg-type]
    model.zero_grad()
    model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    attachment = attachment_of(model)
    assert attachment is not None
    pairs = {}
    for (name, _), collector in zip(attachment.projected, attachment.window.collectors, strict=True):
        assert collector.coordinates.grad is not None
        assert collector.basis.matrix_NR is not None
        pairs[name] = (collector.coordinates.grad.float(), exact[name] @ collector.basis.matrix_NR.float())
    for name, parameter in model.named_parameters():
        if name not in pairs and name in exact and parameter.grad is not None:
            pairs[name] = (parameter.grad.float(), exact[name])
    assert pairs.keys() == exact.keys()
    gradlite.detach(model)
    dots = {name: float((a * b).sum()) for name, (a, b) in pairs.items()}
    found = {name: float(a.square().sum()) for name, (a, _) in pairs.items()}
    true = {name: float(b.square().sum()) for name, (_, b) in pairs.items()}
    return {
        "cosine": sum(dots.values()) / (sum(found.values()) * sum(true.values())) ** 0.5,
        "relative_length": (sum(found.values()) / sum(true.values())) ** 0.5,
        "lowest_cosine_of_a_tensor": min(dots[name] / (found[name] * true[name]) ** 0.5 for name in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds gsm8k/train.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    models = {dtype: load_model_and_tokenizer("smollm2", dtype) for dtype in ("float32", "bfloat16")}
    with (arguments.data_dir / "gsm8k" / "train.jsonl").open() as file:
        rows = [json.loads(line) for line, _ in zip(file, range(8), strict=False)]
    ids, labels = stack(encode(rows, models["float32"][1]))
    # One model for both formats: the bfloat16 weights are the truth's as well.
    models["float32"][0].load_state_dict({k: v.float() for k, v in models["bfloat16"][0].state_dict().items()})
    exact = full_gradients(models["float32"][0], ids, labels)
    for dtype, (model, _) in models.items():
        if dtype == "bfloat16":
            own = full_gradients(model, ids, labels)
            dot, a, b = (sum(float((x * y).sum()) for x, y in pairs) for pairs in (
                [(own[n], exact[n]) for n in exact], [(own[n], own[n]) for n in exact], [(exact[n], exact[n]) for n in exact]
            ))  # fmt: skip
            report(arguments.out, {"dtype": dtype, "hold": "hugging face, no GradLite", "cosine": dot / (a * b) ** 0.5})
        for mode in MODES:
            report(arguments.out, {"dtype": dtype, "hold": mode, **compare(model, mode, ids, labels, exact)})


def report(out: Path, figures: dict[str, object]) -> None:
    """Prints the figures and appends them to the record."""
    print(figures, flush=True)
    append(out, {**figures, **describe()})


if __name__ == "__main__":
    main()
