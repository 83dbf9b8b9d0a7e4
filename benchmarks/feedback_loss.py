"""What the factored and the int4 error memory lose a step, against the exact one fed with the same samples.

    python benchmarks/feedback_loss.py --data-dir DIR --out benchmarks/results/feedback_loss.jsonl

SmolLM2-135M on GSM8K (4 × 176 tokens), rank n/16, blocks 3, 15 and 28. The exact memory drives training; factored and int4
memories receive the same samples and releases. After every addition the part that a memory failed to keep is measured:
``‖(e + φR̂) − e'‖ / ‖e + φR̂‖``, its mean over steps and layers.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import gsm8k
import torch
from record import append, describe
from torch import Tensor

import gradlite
from gradlite.optim.subspace_adamw import error_memory
from gradlite.subspace.feedback import FullMemory, MemoryState
from gradlite.subspace.residual import ResidualSample
from gradlite.train.models import load_model_and_tokenizer

STEPS = 8


class ShadowedMemory(FullMemory):
    """The exact memory, with the short formats beside it."""

    def __init__(self, generator: torch.Generator) -> None:
        self.formats = {
            "factored": error_memory("factored", lambda: generator),
            "int4": error_memory("int4", lambda: generator),
        }
        self.shadows: dict[int, dict[str, MemoryState]] = {}
        self.lost: dict[str, list[float]] = defaultdict(list)

    def init(self, rows: int, width: int, rank: int, like: Tensor) -> MemoryState:
        state = super().init(rows, width, rank, like)
        self.shadows[id(state["error"])] = {name: memory.init(rows, width, rank, like) for name, memory in self.formats.items()}
        return state

    def add(self, state: MemoryState, sample: ResidualSample, scale: Tensor) -> None:
        added = (sample.left_KM.float() * scale).T @ sample.right_KN.float()
        for name, shadow in self.shadows[id(state["error"])].items():
            wanted = self.formats[name].dense(shadow).float() + added
            self.formats[name].add(shadow, sample, scale)
            lost = wanted - self.formats[name].dense(shadow).float()
            self.lost[name].append(float(lost.norm() / wanted.norm()))
        super().add(state, sample, scale)

    def release(self, state: MemoryState, basis_NR: Tensor) -> Tensor:
        for name, shadow in self.shadows[id(state["error"])].items():
            self.formats[name].release(shadow, basis_NR)
        return super().release(state, basis_NR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load_model_and_tokenizer("smollm2", "bfloat16")
    rows = [json.loads(line) for line in (arguments.data_dir / "gsm8k" / "train.jsonl").read_text().splitlines()[:200]]
    encoded = gsm8k.encode(rows, tokenizer)
    blocks = [f"model.layers.{block}.*" for block in (3, 15, 28)]
    optimizer = gradlite.GradLite(model, lr=1e-4, feedback="feedback", feedback_memory="fp32", include=blocks)
    memory = ShadowedMemory(torch.Generator().manual_seed(0))
    optimizer._subspace_step = replace(optimizer._subspace_step, memory=memory)
    for step in range(STEPS):
        total, count = gsm8k.loss_sum(model, gsm8k.stack(encoded[4 * step : 4 * step + 4]))
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if not memory.lost:
        raise SystemExit("no sample reached the memory: the optimizer keeps it elsewhere now.")
    for name, lost in memory.lost.items():
        figures = {
            "memory": name,
            "steps": STEPS,
            "additions": len(lost),
            "mean_lost_share": round(sum(lost) / len(lost), 4),
        }
        figures["max_lost_share"] = round(max(lost), 4)
        append(arguments.out, {**figures, **describe()})
        print(figures)


if __name__ == "__main__":
    main()
