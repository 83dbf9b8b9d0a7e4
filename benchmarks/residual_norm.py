"""How well a few sampled tokens tell the norm of what the basis misses, on one batch of GSM8K.

    python benchmarks/residual_norm.py --data-dir DIR --out benchmarks/results/residual_norm.jsonl

SmolLM2-135M in bfloat16, 4 × 176 tokens, rank n/16, bases from another batch. The exact gradient G of every projected weight
(ordinary autograd) gives the true ‖G‖ and ‖R‖; beside them the coordinates' norm ‖C‖, the sample's own ‖R̂‖, the estimate of ‖R‖
that GradLite shows and clips by, and the share of ‖G‖² inside the bases.
"""

import argparse
import json
from pathlib import Path

import gsm8k
import torch
from record import append, describe

import gradlite
from gradlite.attaching import attachment_of
from gradlite.train.models import load_model_and_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load_model_and_tokenizer("smollm2", "bfloat16")
    lines = (arguments.data_dir / "gsm8k" / "train.jsonl").read_text().splitlines()[:40]
    rows = gsm8k.encode([json.loads(line) for line in lines], tokenizer)
    first, second = gsm8k.stack(rows[:4]), gsm8k.stack(rows[4:8])
    _backward(model, second)
    exact = {name: parameter.grad.float() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    optimizer = gradlite.GradLite(model, lr=0.0, rank=1 / 16, feedback="feedback")
    _backward(model, first)
    optimizer.step()
    optimizer.zero_grad()
    _backward(model, second)
    attachment = attachment_of(model)
    assert attachment is not None
    squares = dict.fromkeys(("gradient", "coordinates", "residual", "sample", "residual_estimate"), 0.0)
    for (name, _), collector in zip(attachment.projected, attachment.window.collectors, strict=True):
        basis, gradient = collector.basis.matrix_NR, exact[name]
        assert basis is not None
        estimate, sampled = collector.residual_squared()
        inside = gradient @ basis.float()
        squares["gradient"] += float(gradient.square().sum())
        squares["coordinates"] += float(inside.square().sum())
        squares["residual"] += float((gradient - inside @ basis.float().T).square().sum())
        squares["sample"] += float(sampled)
        squares["residual_estimate"] += float(estimate)
    norms = {f"{name}_norm": round(max(value, 0.0) ** 0.5, 3) for name, value in squares.items()}
    share = round(squares["coordinates"] / squares["gradient"], 4)
    record = {"tokens": int((second[0] != tokenizer.pad_token_id).sum()), **norms, "energy_in_bases": share}
    append(arguments.out, {**record, **describe()})
    print(record)


def _backward(model: torch.nn.Module, batch: gsm8k.Batch) -> None:
    total, count = gsm8k.loss_sum(model, batch)
    (total / count).backward()


if __name__ == "__main__":
    main()
