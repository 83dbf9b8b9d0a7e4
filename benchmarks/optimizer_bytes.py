"""Bytes per projected parameter that training keeps beside the weights, counted from the tensors that exist.

    python benchmarks/optimizer_bytes.py --out benchmarks/results/optimizer_bytes.jsonl

SmolLM2-135M in bfloat16 at rank n/16: the tensors alive between a backward pass and its step (gradients, bases with their
sketches, residual samples, error memory, moments) are added up in seven windows, of which the largest counts but for the first,
with feedback off (the default) and on. For comparison: AdamW in bfloat16 holds 6 (gradient and two moments). The second part
is the same count for five layers of 4,096 × 4,096 at rank 256, so many that a basis is refreshed in most windows.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from record import append, describe
from torch import nn

import gradlite
from gradlite.train.models import load_model_and_tokenizer


def per_parameter(optimizer: gradlite.GradLite, counted: dict[str, int]) -> dict[str, float]:
    """Bytes per projected parameter by category, and their sum; plain parameters' bytes are counted in, weights are not."""
    projected = optimizer.coverage.num_elements("projected")
    shares = {name: round(size / projected, 4) for name, size in counted.items() if name != "weights"}
    return {**shares, "total": round(sum(size for name, size in counted.items() if name != "weights") / projected, 4)}


def count(model: nn.Module, inputs: dict[str, Any], steps: int, **options: Any) -> dict[str, Any]:
    """The largest count over ``steps`` windows, the first (which has no state yet) left out, and the formula's."""
    optimizer = gradlite.GradLite(model, lr=1e-5, **options)
    counts = []
    for _ in range(steps + 1):
        output = model(**inputs) if "input_ids" in inputs else model(inputs["x"]).square().mean()
        (output.loss if hasattr(output, "loss") else output).backward()
        counts.append(optimizer.state_bytes())
        optimizer.step()
        optimizer.zero_grad()
    largest = max(counts[1:], key=lambda counted: sum(counted.values()))
    return {
        "options": options,
        "projected_parameters": optimizer.coverage.num_elements("projected"),
        "counted_bytes_per_parameter": per_parameter(optimizer, largest),
        "formula_bytes_per_parameter": per_parameter(optimizer, optimizer.expected_bytes()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    for feedback in ("off", "feedback"):
        torch.manual_seed(0)
        model, _ = load_model_and_tokenizer("smollm2", "bfloat16")
        ids = torch.randint(0, 49152, (1, 128))
        measured = count(model, {"input_ids": ids, "labels": ids}, 6, rank=1 / 16, feedback=feedback)
        append(arguments.out, {"work": "SmolLM2-135M, rank n/16", **measured, **describe()})
        layers = [layer for _ in range(5) for layer in (nn.Linear(4096, 4096, bias=False), nn.ReLU())]
        wide = nn.Sequential(*layers).bfloat16()
        measured = count(wide, {"x": torch.randn(256, 4096).bfloat16()}, 6, rank=256, feedback=feedback)
        append(arguments.out, {"work": "4,096-wide layers, rank 256", **measured, **describe()})
        print(feedback, "done")


if __name__ == "__main__":
    main()
