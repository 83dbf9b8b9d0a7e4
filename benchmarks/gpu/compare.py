"""Memory and speed of the methods on a bare CUDA machine: an 8-billion Llama-3.1 shape, random weights, 2 × 2,048 tokens.

    PYTHONPATH=src python benchmarks/gpu/compare.py --out DIR [--shape 8b|tiny] [--methods NAME,…] [--minutes 9]

Needs torch and transformers and downloads nothing; a method whose package is missing is recorded as such. Each method runs in a
process of its own and leaves DIR/NAME.json, a record as `gradlite report` reads it. What is recorded is not run again, so a
command that was stopped, or that ran out of its minutes, is just repeated. DIR/table.md holds the figures of all records.

Peak memory is the allocator's highest mark in the measured steps (on a CPU: live tensors' in the step before). Speed is the
median of the measured steps with the slowest and fastest; the first steps, which compile kernels and make optimizer states,
are left out. The share of the FLOP floor is the time that a method's matrix products would take at the machine's measured rate,
over the time it took.

GaLore decomposes every projected gradient by SVD in its first step and every 200 after; at this size that takes longer than the
whole rest. Its projections are made by QR of random matrices instead; one decomposition of each shape is timed apart, and
its share of a step is added as `svd_seconds_a_step`.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
import traceback
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bare

bare.import_gradlite()

import torch  # noqa: E402 - gradlite comes first where pydantic is missing
from shapes import IGNORED, SHAPES, Shape, batches, build_model, floor_flops  # noqa: E402

from gradlite import methods  # noqa: E402
from gradlite.errors import GradLiteError  # noqa: E402
from gradlite.hold.compiled import is_compiling_enabled  # noqa: E402
from gradlite.measure.live_memory import AllocationWatch, StepMarks, weight_bytes  # noqa: E402
from gradlite.measure.throughput import rates  # noqa: E402
from gradlite.measure.versions import versions  # noqa: E402
from gradlite.methods.method import Method  # noqa: E402
from gradlite.methods.packages import require_part  # noqa: E402
from gradlite.train.files import write_json, write_text  # noqa: E402
from gradlite.train.out_of_memory import is_out_of_memory  # noqa: E402

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "gradlite-exact": ("gradlite", {"hold": "exact"}),
    "gradlite-int8": ("gradlite", {"hold": "int8"}),
    "gradlite-recompute": ("gradlite", {"hold": "recompute"}),
    "adamw": ("adamw", {}),
    "adamw-checkpointed": ("adamw-checkpointed", {}),
    "adamw8bit-in-backward": ("adamw8bit", {"in_backward": True, "checkpointing": True}),
    "lomo-checkpointed": ("lomo", {"checkpointing": True}),
    "galore": ("galore", {}),
}
WARMUP_STEPS = 4
MEASURED_STEPS = 10
LR = 1e-5
CLIP = 1.0
START_SECONDS = 60.0
"""A method is not started with less time left: importing and building the model alone take that long."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where records are, and go")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--methods", default=",".join(RUNS), help=f"of {', '.join(RUNS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop; repeat the command to go on")
    parser.add_argument("--worker", choices=RUNS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        write_json(arguments.out / f"{arguments.worker}.json", run(arguments.worker, arguments.shape))
        return 0
    if arguments.shape != "tiny" and not torch.cuda.is_available():
        parser.error(f"torch sees no CUDA device, and on a CPU --shape {arguments.shape} takes hours; try --shape tiny")
    chosen = arguments.methods.split(",")
    unknown = [name for name in chosen if name not in RUNS]
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; choose of {', '.join(RUNS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    is_done = run_all(chosen, arguments.shape, arguments.out, 60.0 * arguments.minutes)
    table = table_of(arguments.out, SHAPES[arguments.shape])
    write_text(arguments.out / "table.md", table)
    print(table)
    if not is_done:
        print("Not all methods are done: repeat the command to go on.")
    return 0


def run_all(chosen: list[str], shape: str, out: Path, seconds: float) -> bool:
    """Runs what has no record yet, one process a method; whether all have one now."""
    began = time.monotonic()
    is_first = True
    for name in chosen:
        path = out / f"{name}.json"
        if path.exists():
            _check_same_work(path, shape)
            continue
        left = seconds - (time.monotonic() - began)
        if left < START_SECONDS and not is_first:
            return False
        print(f"{name} …", flush=True)
        command = [sys.executable, __file__, "--out", str(out), "--shape", shape, "--worker", name]
        try:
            ended = subprocess.run(command, timeout=left, check=False)
            reason = f"the process ended with {ended.returncode}"
        except subprocess.TimeoutExpired:
            if not is_first:  # it had only what others left: the next command gives it all
                return False
            reason = f"not done within {seconds / 60:.0f} minutes"
        if not path.exists():
            write_json(path, _record(name, shape, {}, "failed", reason))
        is_first = False
    return True


def _check_same_work(path: Path, shape: str) -> None:
    """Ends with a sentence where a record is of another shape or machine: beside it the others' would mean nothing."""
    record, own = json.loads(path.read_text()), _record("adamw", shape, {}, "ok", None)
    theirs, ours = ((one["experiment"], one["machine"]["device"]) for one in (record, own))
    if theirs != ours:
        raise SystemExit(f"{path} is a record of {' on '.join(theirs)}, and this is {' on '.join(ours)}: give another --out.")


def run(name: str, shape_name: str) -> dict[str, Any]:
    """One method's record; what goes wrong is in it."""
    shape, (kind, options) = SHAPES[shape_name], RUNS[name]
    options = dict(options) | ({"rank": shape.rank} if kind in ("gradlite", "galore") else {})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        rate = matmul_rate(device)
        model = build_model(shape, device)
        weights = sum(weight_bytes(model).values())
        watch = AllocationWatch(device) if device.type == "cpu" else None  # from here on: it must see the states being made
        with watch or nullcontext():
            method = methods.build(kind, model, lr=LR, **options)
            added = _leave_svd_out(model, method, shape) if kind == "galore" else {}
            warm = Steps(method, shape, device)
            warm.run(WARMUP_STEPS, watch)
        figures = measure(warm, weights, watch)
        options["max_grad_norm"] = CLIP if method.claims.clipping else None
        options["compiled"] = is_compiling_enabled()  # false: GradLite's kernels ran in eager mode, slower
    except GradLiteError as error:
        return _record(name, shape_name, options, "failed", str(error))
    except Exception as error:  # noqa: BLE001 - whatever a method stumbles over is its row's reason
        traceback.print_exc()
        status = "out_of_memory" if is_out_of_memory(error) else "failed"
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return _record(name, shape_name, options, status, f"{type(error).__name__}: {first_line}")
    record = _record(name, shape_name, options | added, "ok", None) | figures
    record["machine"]["matmul_flops_per_second"] = rate
    return record


class Steps:
    """The steps of one method, one after the other; raises GradLiteError where one of them trains nothing.

    As gradlite.compare.loop, whose records need pydantic, which a bare machine does not have.
    """

    def __init__(self, method: Method, shape: Shape, device: torch.device) -> None:
        self.method, self.shape, self.device = method, shape, device
        self._work = iter(batches(shape, WARMUP_STEPS + MEASURED_STEPS))
        self._began = time.perf_counter()
        self.losses: list[float] = []
        self.ends: list[float] = []

    def run(self, count: int, watch: AllocationWatch | None = None) -> list[float]:
        """Makes ``count`` steps and returns the seconds of each. ``watch``: of the tensors' memory, which takes time."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            with nullcontext() if watch is None else watch.step(self.method.model, self.method.optimizer) as marks:
                loss = self._step(next(self._work), marks)
            seconds.append(time.perf_counter() - start)
            self.losses.append(loss)
            self.ends.append(time.perf_counter() - self._began)
            if not math.isfinite(loss):
                raise GradLiteError(f"the loss is {loss} at step {len(self.losses)}")
            if self.method.skipped_steps:
                raise GradLiteError(f"step {len(self.losses)} was skipped, since its gradient was not finite")
        return seconds

    def _step(self, batch: dict[str, torch.Tensor], marks: StepMarks | None) -> float:
        method = self.method
        inputs = {key: part.to(self.device) for key, part in batch.items()}
        loss = method.model(**inputs, use_cache=False).loss
        if marks is not None:
            marks.forward_ended()
        method.backward(loss)
        if marks is not None:
            marks.backward_ended()
        if method.claims.clipping:
            method.clip(CLIP)
        method.step()
        method.zero_grad()
        return float(loss.detach())  # waits for the device


def measure(steps: Steps, weights: int, watch: AllocationWatch | None) -> dict[str, Any]:
    """Runs the measured steps of a method that is warm; the parts of a record that they give."""
    device, shape = steps.device, steps.shape
    first_peak = 0
    if device.type == "cuda":
        first_peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = steps.run(MEASURED_STEPS)
    peak = torch.cuda.max_memory_allocated(device) if watch is None else watch.peaks[-1].total
    is_higher = first_peak - weights > 1.1 * (peak - weights)
    note = f"the first steps peaked at {(first_peak - weights) / 1e9:.2f} GB above the weights" if is_higher else None
    count = len(seconds)
    speed, samples = rates([shape.tokens] * count, seconds), rates([shape.batch_size] * count, seconds)
    assert speed is not None
    assert samples is not None
    return {
        "curve": {"step": list(range(1, len(steps.losses) + 1)), "train_loss": steps.losses, "seconds": steps.ends},
        "tokens_per_second": vars(speed),
        "samples_per_second": vars(samples),
        "step_seconds": seconds,
        "memory": {
            "peak_bytes": peak,
            "peak_above_weights_bytes": peak - weights,
            "by_category_bytes": None if watch is None else asdict(watch.peaks[-1]),
            "note": note,
        },
    }


def matmul_rate(device: torch.device) -> float:
    """Floating-point operations a second of large bfloat16 products, twenty in a row: the best of five on a warm device."""
    size, warm_seconds = (8192, 1.0) if device.type == "cuda" else (256, 0.01)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    row = 20

    def products() -> None:
        for _ in range(row):
            a @ b

    began = time.perf_counter()
    while time.perf_counter() - began < warm_seconds:
        _timed(products, device)
    return 2.0 * row * size**3 / min(_timed(products, device) for _ in range(5))


def _timed(work: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _leave_svd_out(model: torch.nn.Module, method: Method, shape: Shape) -> dict[str, Any]:
    """Gives GaLore's projectors random orthonormal matrices in the shapes that its SVD would give; times one SVD a shape."""

    def orthonormal(_: Any, weights: torch.Tensor, rank: int, type: str) -> torch.Tensor:
        length = weights.shape[1] if type == "right" else weights.shape[0]
        q = torch.linalg.qr(torch.randn(length, min(rank, *weights.shape), device=weights.device)).Q.to(weights.dtype)
        return q.T.contiguous() if type == "right" else q

    device = next(model.parameters()).device
    sizes = Counter(tuple(sorted(size)) for size in shape.linears())
    total = 0.0
    torch.linalg.svd(torch.randn(64, 64, device=device))  # loads the library
    for (low, high), count in sizes.items():
        matrix = torch.randn(high, low, device=device)
        total += (
            count
            * shape.layers
            * min(_timed(lambda matrix=matrix: torch.linalg.svd(matrix, full_matrices=False), device) for _ in range(2))
        )
        del matrix
    if device.type == "cuda":
        torch.cuda.empty_cache()
    projectors = require_part("galore_torch", "galore_projector", "galore", "galore-torch")
    projectors.GaLoreProjector.get_orthogonal_matrix = orthonormal
    gap = next(group["update_proj_gap"] for group in method.optimizer.param_groups if "update_proj_gap" in group)
    return {"projections": "QR of random matrices instead of SVD", "svd_seconds_a_step": total / gap}


def _record(name: str, shape_name: str, options: dict[str, Any], status: str, reason: str | None) -> dict[str, Any]:
    shape = SHAPES[shape_name]
    is_cuda = torch.cuda.is_available()
    return {
        "record_version": 1,
        "experiment": f"gpu-{shape_name}",
        "run": name,
        "method": RUNS[name][0],
        "options": options,
        "model": f"Llama 3.1 shape, {shape_name}, random weights",
        "dataset": "random tokens in Dolly's lengths",
        "dtype": "bfloat16",
        "lr": LR,
        "seed": 0,
        "batch_size": shape.batch_size,
        "seq_len": shape.seq_len,
        "steps": WARMUP_STEPS + MEASURED_STEPS,
        "schedule": "constant",
        "warmup_steps": 0,
        "status": status,
        "reason": reason,
        "versions": versions(),
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "cuda": is_cuda,
            "device": torch.cuda.get_device_name() if is_cuda else "CPU",
            "device_bytes": torch.cuda.get_device_properties(0).total_memory if is_cuda else None,
            "cuda_version": torch.version.cuda,
        },
        "command": f"PYTHONPATH=src python benchmarks/gpu/compare.py --out DIR --shape {shape_name} --methods {name}",
        "date": time.strftime("%Y-%m-%d"),
    }


def table_of(out: Path, shape: Shape) -> str:
    """All records of ``out`` as a Markdown table."""
    head = ["run", "peak above weights, GB", "peak, GB", "tokens/s, median (min to max)", "share of the FLOP floor", "remark"]
    lines = [head, ["---"] * len(head)]
    for name in RUNS:
        path = out / f"{name}.json"
        if path.exists():
            lines.append(_row(json.loads(path.read_text()), shape))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _row(record: dict[str, Any], shape: Shape) -> list[str]:
    if record["status"] != "ok":
        return [record["run"], "", "", "", "", f"{record['status'].replace('_', ' ')}: {record['reason']}"]
    speed, memory = record["tokens_per_second"], record["memory"]
    remark = memory["note"] or ""
    if record["method"] == "gradlite" and not record["options"]["compiled"]:
        remark = f"kernels in eager mode: compiling is off or failed. {remark}".rstrip()
    if "svd_seconds_a_step" in record["options"]:
        extra = record["options"]["svd_seconds_a_step"]
        amortised = shape.tokens / (shape.tokens / speed["median"] + extra)
        remark = f"without SVD; with its {extra:.2f} s a step {amortised:,.0f} tokens/s. {remark}".rstrip()
    rate = f"{speed['median']:,.0f} ({speed['min']:,.0f} to {speed['max']:,.0f})"
    share = f"{floor_seconds(record, shape) * speed['median'] / shape.tokens:.2f}"
    gigabytes = [f"{memory[key] / 1e9:.4g}" for key in ("peak_above_weights_bytes", "peak_bytes")]
    return [record["run"], *gigabytes, rate, share, remark]


def floor_seconds(record: dict[str, Any], shape: Shape) -> float:
    """The time of a step's matrix products at the machine's rate, with the measured batches' mean number of labels."""
    work = batches(shape, WARMUP_STEPS + MEASURED_STEPS)[WARMUP_STEPS:]
    num_labelled = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in work) // len(work)
    options = record["options"]
    is_checkpointed = bool(options.get("checkpointing")) or record["method"] == "adamw-checkpointed"
    flops = floor_flops(
        shape, record["method"], options.get("hold"), is_checkpointed=is_checkpointed, num_labelled=num_labelled
    )
    return flops / float(record["machine"]["matmul_flops_per_second"])


if __name__ == "__main__":
    sys.exit(main())
