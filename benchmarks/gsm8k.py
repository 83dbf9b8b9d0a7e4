"""Learning on GSM8K: AdamW against GradLite on SmolLM2-135M-Instruct, same batches, same seeds.

    python benchmarks/gsm8k.py --data-dir DIR --out benchmarks/results/gsm8k.jsonl [--only adamw-1.5e-4-s0,…]

Work: GSM8K's training problems in batches of 4 × 176 tokens (chat template, answer-only loss, padded), 60 steps, cosine to
zero with 10 warm-up steps, clipping at 1.0; held-out loss is the mean over the answer tokens of 64 test problems. Weights are
float32 and layers compute in bfloat16 (autocast), for both methods; runs whose name ends in `-bf16` keep the weights in
bfloat16 as well, which AdamW then rounds to nearest and GradLite stochastically. One JSON line a run is appended to the
record; runs that stand there already are skipped, so it can be interrupted.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from record import append, describe
from torch import Tensor, nn
from torch.nn import functional as F

import gradlite
from gradlite.train.models import load_model_and_tokenizer

BATCH, LENGTH, STEPS, WARMUP, HELD_OUT = 4, 176, 60, 10, 64
Batch = tuple[Tensor, Tensor]


def encode(rows: list[dict[str, str]], tokenizer: Any) -> list[Batch]:
    """Rows to (ids, labels) of LENGTH tokens; labels are -100 outside the answer and its end mark."""
    encoded = []
    for row in rows:
        question = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        ids = (prompt_ids + answer_ids)[:LENGTH]
        labels = ([-100] * len(prompt_ids) + answer_ids)[:LENGTH]
        if all(label == -100 for label in labels):
            continue
        padding = LENGTH - len(ids)
        encoded.append((torch.tensor(ids + [tokenizer.pad_token_id] * padding), torch.tensor(labels + [-100] * padding)))
    return encoded


def stack(items: list[Batch]) -> Batch:
    """Rows to one batch, cut to its longest row (padding lies behind the labels, where causal attention never looks)."""
    ids, labels = (torch.stack(part) for part in zip(*items, strict=True))
    longest = int((labels != -100).nonzero()[:, 1].max()) + 1
    return ids[:, :longest], labels[:, :longest]


def loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    ids, labels = batch
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits[:, :-1].float()
    targets = labels[:, 1:]
    total = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100, reduction="sum")
    return total, int((targets != -100).sum())


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: list[Batch]) -> float:
    model.eval()
    sums = [loss_sum(model, batch) for batch in batches]
    model.train()
    return sum(total.item() for total, _ in sums) / sum(count for _, count in sums)


def schedule(step: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1.0 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def train(
    method: str, options: dict[str, Any], lr: float, seed: int, weights: str, train_rows: list[Batch], held_out: list[Batch]
) -> dict[str, Any]:
    """One run; returns its record."""
    torch.manual_seed(seed)
    model, _ = load_model_and_tokenizer("smollm2", weights)
    model.train()
    optimizer: torch.optim.Optimizer
    if method == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    else:
        optimizer = gradlite.GradLite(model, lr=lr, seed=seed, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    order = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(seed)).tolist()
    start = held_out_loss(model, held_out)
    losses, norms, began = [], [], time.perf_counter()
    for step in range(STEPS):
        batch = stack([train_rows[i] for i in order[step * BATCH : (step + 1) * BATCH]])
        total, count = loss_sum(model, batch)
        (total / count).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total.item() / count)
        print(f"{step}: {losses[-1]:.4f} {norms[-1]:.2f} {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return {
        "start_held_out_loss": start,
        "held_out_loss": held_out_loss(model, held_out),
        "train_losses": [round(loss, 4) for loss in losses],
        "gradient_norms": [round(norm, 3) for norm in norms],
        "seconds": round(time.perf_counter() - began, 1),
    }


Run = tuple[str, dict[str, Any], float, int, str]


def runs() -> dict[str, Run]:
    """Name → (method, options, learning rate, seed, dtype of the weights)."""
    methods = {
        "adamw": ("adamw", {}),
        **{f"gradlite-n/{fraction}": ("gradlite", {"rank": 1 / fraction, "feedback": "feedback"}) for fraction in (16, 8)},
        **{f"gradlite-n/{fraction}-off": ("gradlite", {"rank": 1 / fraction, "feedback": "off"}) for fraction in (16, 8)},
        "gradlite-n/8-off-refresh-1": ("gradlite", {"rank": 1 / 8, "feedback": "off", "refresh_interval": 1}),
        "gradlite-n/8-off-fp32-moments": ("gradlite", {"rank": 1 / 8, "feedback": "off", "moments": "fp32"}),
        **{
            f"gradlite-n/8-{hold}": ("gradlite", {"rank": 1 / 8, "feedback": "off", "hold": hold})
            for hold in ("exact", "int8", "recompute", "recompute-int8")
        },
    }
    grid: dict[str, Run] = {}
    for seed in (0, 1, 2):
        for lr in (6e-5, 1e-4, 1.5e-4, 4e-4):
            for name, (method, options) in methods.items():
                grid[f"{name}-{lr:g}-s{seed}"] = (method, options, lr, seed, "float32")
                grid[f"{name}-{lr:g}-s{seed}-bf16"] = (method, options, lr, seed, "bfloat16")
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds gsm8k/train.jsonl and gsm8k/test.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="comma-separated run names; all of seed 0 without it, float32")
    arguments = parser.parse_args()
    _, tokenizer = load_model_and_tokenizer("smollm2", "bfloat16")
    files = {name: (arguments.data_dir / "gsm8k" / f"{name}.jsonl").read_text() for name in ("train", "test")}
    rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items()}
    train_rows = encode(rows["train"][:1200], tokenizer)
    test_rows = encode(rows["test"][:HELD_OUT], tokenizer)
    held_out = [stack(test_rows[i : i + 8]) for i in range(0, len(test_rows), 8)]
    done = set()
    if arguments.out.exists():
        done = {json.loads(line)["run"] for line in arguments.out.read_text().splitlines()}
    grid = runs()
    first_seed = [name for name in grid if name.endswith("-s0") and "-off" not in name]
    chosen = [name for name in arguments.only.split(",") if name] or first_seed
    for name in chosen:
        method, options, lr, seed, weights = grid[name]
        if name in done:
            continue
        record = {
            "run": name,
            "method": method,
            "options": options,
            "lr": lr,
            "seed": seed,
            "weights": weights,
            **train(method, options, lr, seed, weights, train_rows, held_out),
            **describe(),
        }
        append(arguments.out, record)
        print(f"{record['run']}: {record['start_held_out_loss']:.4f} → {record['held_out_loss']:.4f}, {record['seconds']} s")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
