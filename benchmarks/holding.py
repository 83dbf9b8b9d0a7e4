"""Ways to hold activations against Hugging Face's own, on SmolLM2-135M: memory, speed and gradients of whole training steps.

    python benchmarks/holding.py --out benchmarks/results/holding.jsonl [--batch 8x256,2x1024] [--only METHOD,…] [--rounds 5]

Every method runs in a process of its own: weights in bfloat16, random token ids, every token labelled, optimizer included. The
processes take turns, one step at a time, so that all see the same machine: in a round every method makes one timed step. One
JSON line a method and batch: seconds of its timed steps; peak memory above the weights, by the allocator (the sum of live
tensors, from the profiler's allocation events of one step) and by the process (growth of its peak resident set); bytes that
the body holds for backward, a token and block.
"""

import argparse
import gc
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from live_tensors import peak_and_growth
from record import append, describe
from torch import nn
from turns import answer_turns, take_turns

from gradlite import methods
from gradlite.methods.method import Method
from gradlite.train.models import load_model_and_tokenizer

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf-adamw": ("adamw", {}),
    "hf-checkpointed-adamw": ("adamw-checkpointed", {}),
    "hf-checkpointed-adamw8bit-in-backward": ("adamw8bit", {"in_backward": True, "checkpointing": True}),
    "gradlite-exact": ("gradlite", {"hold": "exact"}),
    "gradlite-projected": ("gradlite", {"hold": "projected"}),
    "gradlite-int8": ("gradlite", {"hold": "int8"}),
    "gradlite-recompute": ("gradlite", {"hold": "recompute"}),
    "gradlite-recompute-int8": ("gradlite", {"hold": "recompute-int8"}),
}
WARMUP = 2


def build(name: str) -> tuple[nn.Module, Method]:
    """A model in training mode and what trains it."""
    model, _ = load_model_and_tokenizer("smollm2", "bfloat16")
    model.train()
    model.config.use_cache = False
    method, options = METHODS[name]
    return model, methods.build(method, model, lr=1e-5, **options)


def resident_bytes(key: str) -> int:
    """VmRSS or VmHWM (its peak) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def worker(name: str, batch: int, length: int) -> None:
    """Makes a step for every line on the standard input; the last line that it prints holds the method's figures."""
    model, method = build(name)
    gc.collect()
    weights = resident_bytes("VmRSS")
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        method.backward(loss)
        method.step()
        method.zero_grad()
        return float(loss.detach())

    state = peak_and_growth(step)[1]  # optimizer state appears in the first step and stays
    for _ in range(WARMUP):
        step()
    Path("/proc/self/clear_refs").write_text("5")
    seconds = answer_turns(step)
    resident_peak = resident_bytes("VmHWM") - weights
    peak, _ = peak_and_growth(step)
    step()  # the profiler knows what the last step allocated; this one's tensors replace those
    body = model.model
    _, held = peak_and_growth(lambda: body(input_ids=ids, use_cache=False))
    tokens = batch * length
    record = {
        "method": name,
        "batch": f"{batch}x{length}",
        "step_seconds": seconds,
        "tokens_per_second": round(tokens / median(seconds), 1),
        "state_bytes": state,
        "peak_above_weights_bytes": peak + state,
        "resident_peak_above_weights_bytes": resident_peak,
        "held_bytes_per_token_and_block": round(held / tokens / model.config.num_hidden_layers, 1),
    }
    print(json.dumps(record), flush=True)


def compare(names: list[str], batch: int, length: int, rounds: int, out: Path) -> None:
    """All methods on one batch, step by step in turn."""
    shared = [sys.executable, __file__, "--worker", "--out", "-", "--batch", f"{batch}x{length}", "--only"]
    for record in take_turns({name: [*shared, name] for name in names}, rounds):
        append(out, {**record, **describe()})
        print(record, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", default="8x256,2x1024")
    parser.add_argument("--only", default=",".join(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    for batch, length in (tuple(map(int, text.split("x"))) for text in arguments.batch.split(",")):
        if arguments.worker:
            worker(arguments.only, batch, length)
        else:
            compare(arguments.only.split(","), batch, length, arguments.rounds, arguments.out)


if __name__ == "__main__":
    main()
