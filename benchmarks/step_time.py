"""How long the optimizer's step takes beside forward and backward: SmolLM2-135M in bfloat16, 2,048 tokens a step.

    python benchmarks/step_time.py --out benchmarks/results/step_time.jsonl

Batches of 8 × 256 tokens. After warm-up, the times of two full rounds of basis refreshes are summed, so the refreshes are
amortised as in training; torch's fused AdamW on the same model stands beside it. Measure while nothing else computes.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from record import append, describe

import gradlite
from gradlite.train.models import load_model_and_tokenizer

WARMUP, MEASURED = 3, 10


def measure(method: str, **options: Any) -> dict[str, Any]:
    """Seconds of forward + backward and of the step, over MEASURED steps."""
    torch.manual_seed(0)
    model, _ = load_model_and_tokenizer("smollm2", "bfloat16")
    model.train()
    optimizer: torch.optim.Optimizer
    if method == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True, **options)
    else:
        optimizer = gradlite.GradLite(model, lr=1e-5, **options)
    passes, steps = [], []
    for step in range(WARMUP + MEASURED):
        ids = torch.randint(0, 49152, (8, 256))
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        passed = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        stepped = time.perf_counter()
        if step >= WARMUP:
            passes.append(passed - began)
            steps.append(stepped - passed)
    return {
        "method": method,
        "options": options,
        "tokens_per_step": ids.numel(),
        "forward_backward_seconds": {"median": round(statistics.median(passes), 3), "sum": round(sum(passes), 3)},
        "step_seconds": {
            "median": round(statistics.median(steps), 3),
            "max": round(max(steps), 3),
            "sum": round(sum(steps), 3),
        },
        "step_over_forward_backward": round(sum(steps) / sum(passes), 4),
        "tokens_per_second": round(ids.numel() * MEASURED / (sum(passes) + sum(steps)), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    for method, options in (("gradlite", {}), ("gradlite", {"feedback": "feedback"}), ("adamw", {})):
        record = measure(method, **options)
        append(arguments.out, {**record, **describe()})
        print(
            method,
            options,
            record["step_over_forward_backward"],
            record["step_seconds"],
            record["forward_backward_seconds"],
        )


if __name__ == "__main__":
    main()
