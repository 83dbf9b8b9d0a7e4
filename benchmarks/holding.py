"""Ways to hold activations against Hugging Face's own, on SmolLM2-135M: memory, speed and gradients of whole training steps.

    python benchmarks/holding.py --out benchmarks/results/holding.jsonl [--batch 8x256,2x1024] [--only METHOD,…] [--repeats 3]

Every method runs in a process of its own: weights in bfloat16, random token ids, every token labelled, optimizer included. One
JSON line a method and batch: seconds of each repeated step; peak memory above the weights, by the allocator (the sum of live
tensors, from the profiler's allocation events of one step) and by the process (growth of its peak resident set); bytes that
the body holds for backward, a token and block.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import append, describe
from torch import Tensor, nn

import gradlite
from gradlite.train.models import load_model_and_tokenizer

METHODS = (
    "hf-adamw",
    "hf-checkpointed-adamw",
    "hf-checkpointed-adamw8bit-in-backward",
    "gradlite-exact",
    "gradlite-int8",
    "gradlite-recompute",
    "gradlite-recompute-int8",
)
WARMUP = 2


class AdamW8bitInBackward:
    """torchao's 8-bit AdamW, one optimizer a parameter, stepped as soon as its gradient is whole."""

    def __init__(self, model: nn.Module) -> None:
        from torchao.optim import AdamW8bit

        for parameter in model.parameters():
            optimizer = AdamW8bit([parameter], lr=1e-5)
            parameter.register_post_accumulate_grad_hook(_stepper(optimizer))

    def step(self) -> None:
        """Nothing is left to do."""

    def zero_grad(self) -> None:
        """Gradients are gone already."""


def _stepper(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def step(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


def build(method: str) -> tuple[nn.Module, Any]:
    """A model in training mode and its optimizer."""
    model, _ = load_model_and_tokenizer("smollm2", "bfloat16")
    model.train()
    model.config.use_cache = False
    if method.startswith("gradlite-"):
        return model, gradlite.GradLite(model, lr=1e-5, hold=method.removeprefix("gradlite-"))  # type: ignore[arg-type]
    if "checkpointed" in method:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if method.endswith("in-backward"):
        return model, AdamW8bitInBackward(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def peak_and_growth(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of live tensors above the start: at the peak, and when ``work`` (whose result is kept) is over."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak, live


def resident_bytes(key: str) -> int:
    """VmRSS or VmHWM (its peak) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def worker(method: str, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """One method's figures."""
    model, optimizer = build(method)
    gc.collect()
    weights = resident_bytes("VmRSS")
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    state = peak_and_growth(step)[1]  # optimizer state appears in the first step and stays
    for _ in range(WARMUP):
        step()
    Path("/proc/self/clear_refs").write_text("5")
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        seconds.append(round(time.perf_counter() - began, 3))
    resident_peak = resident_bytes("VmHWM") - weights
    peak, _ = peak_and_growth(step)
    step()  # the profiler knows what the last step allocated; this one's tensors replace those
    body = model.model
    _, held = peak_and_growth(lambda: body(input_ids=ids, use_cache=False))
    tokens = batch * length
    return {
        "method": method,
        "batch": f"{batch}x{length}",
        "step_seconds": seconds,
        "tokens_per_second": round(tokens / sorted(seconds)[len(seconds) // 2], 1),
        "state_bytes": state,
        "peak_above_weights_bytes": peak + state,
        "resident_peak_above_weights_bytes": resident_peak,
        "held_bytes_per_token_and_block": round(held / tokens / model.config.num_hidden_layers, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", default="8x256,2x1024")
    parser.add_argument("--only", default=",".join(METHODS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    batches = [tuple(int(number) for number in text.split("x")) for text in arguments.batch.split(",")]
    if arguments.worker:
        (batch, length), method = batches[0], arguments.only
        print(json.dumps(worker(method, batch, length, arguments.repeats)))
        return
    for batch, length in batches:
        for method in arguments.only.split(","):
            command = [sys.executable, __file__, "--worker", "--out", "-", "--batch", f"{batch}x{length}", "--only", method]
            done = subprocess.run(
                [*command, "--repeats", str(arguments.repeats)], stdout=subprocess.PIPE, text=True, check=True
            )
            record = {**json.loads(done.stdout.splitlines()[-1]), **describe()}
            append(arguments.out, record)
            print(
                {key: value for key, value in record.items() if key not in ("versions", "machine", "command", "date")},
                flush=True,
            )


if __name__ == "__main__":
    main()
