"""One run in a process of its own: ``python -m gradlite.compare.worker SPEC.json RECORDS_DIR COMMAND``.

It writes the run's record, whatever becomes of the run, and tells each step as a line ``step {…}`` on its standard output.
What it cannot tell itself (the system ended it) its parent does.
"""

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler, set_seed
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gradlite import methods
from gradlite.compare.energy import layer_means
from gradlite.compare.loop import UNTIMED_STEPS, Diverged, Loop, Measured
from gradlite.compare.record import Curve, HeldOut, Record, Spread, Status, write_record
from gradlite.compare.rows import TokenRow, TooShort, prepare
from gradlite.compare.runs import BAD_INPUT, NOTICE, STEP, RunSpec
from gradlite.errors import GradLiteError
from gradlite.evaluate.held_out import HeldOutLoss, held_out_loss
from gradlite.measure.live_memory import weight_bytes
from gradlite.measure.machine import machine
from gradlite.measure.memory import peak_memory_bytes
from gradlite.measure.process_memory import anonymous_bytes
from gradlite.measure.throughput import Rates, rates
from gradlite.measure.versions import versions
from gradlite.methods.method import Method
from gradlite.train.loss import summed_loss
from gradlite.train.matmul_caches import limit_matmul_caches
from gradlite.train.models import load_model_and_tokenizer
from gradlite.train.out_of_memory import is_out_of_memory
from gradlite.train.quiet import quiet_libraries


def work(spec: RunSpec, command: str) -> Record:
    """Do one run and return its record; errors become a record with their reason.

    Raises GradLiteError where model or data cannot be had: no other run could be done either.
    """
    circumstances: dict[str, Any] = {
        "versions": versions(),
        "machine": machine(),
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
    }
    run = _Run(spec)
    try:
        measured = run.do()
    except Diverged as error:
        return spec.record("failed", f"diverged: {error}", **run.so_far(), **circumstances)
    except GradLiteError as error:
        if run.loop is None and not isinstance(error, TooShort):
            raise
        return spec.record("failed", str(error).splitlines()[0], **circumstances)
    except Exception as error:  # noqa: BLE001 - whatever a method stumbles over is its row's reason
        traceback.print_exc()
        first_line = (str(error).strip() or "no message").splitlines()[0]
        status: Status = "out_of_memory" if is_out_of_memory(error) else "failed"
        return spec.record(status, f"{type(error).__name__}: {first_line}", **circumstances)
    return spec.record("ok", **measured, **circumstances)


class _Run:
    """The parts of one run, in order."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.loop: Loop | None = None
        self.options: dict[str, Any] = dict(spec.options)
        self.held_out: list[HeldOut] = []
        self.is_mixed = spec.dtype == "mixed"

    def do(self) -> dict[str, Any]:
        """Train, and return what was measured, as keywords of the record."""
        spec = self.spec
        set_seed(spec.seed)
        self.model, tokenizer = self._load()
        weights = sum(weight_bytes(self.model).values())
        self.collate = _collator(tokenizer)
        rows = prepare(spec, tokenizer)
        for notice in rows.notices:
            sys.stderr.write(f"{NOTICE}{notice}\n")
        # Mapped files are gone again when the peak is read, and would count as anonymous memory.
        maps_files = any("mapped" in str(value) for value in spec.options.values())
        anonymous = anonymous_bytes() if self.device.type == "cpu" and not maps_files else None
        before = self._evaluate(self.model, rows.held_out, step=0, seconds=0.0)
        self.model.train()
        loop = self.loop = Loop(self._build, self.device, spec.max_grad_norm, weights, anonymous, self._precision)
        batches: list[Mapping[str, Tensor]] = [self.collate(list(step)) for step in rows.steps]
        method = loop.run(batches, _tell)
        after = self._evaluate(method.model, rows.held_out, step=spec.steps, seconds=sum(loop.measured.seconds))
        if after is not None and self.held_out[-1].loss is None:
            raise Diverged("the held-out loss is not finite after training")
        skipped = method.skipped_steps
        return {
            **self.so_far(),
            "evaluated_rows": len(rows.held_out) if rows.held_out else None,
            "held_out_tokens": None if before is None else before.num_tokens,
            "reason": f"{skipped} steps were skipped, since their gradient was not finite" if skipped else None,
        }

    def so_far(self) -> dict[str, Any]:
        """What has been measured; of a run that diverged, what came before."""
        options = {"max_grad_norm": self.spec.max_grad_norm, **self.options}
        if self.loop is None:
            return {"options": options}
        seen = self.loop.measured
        ends = [sum(seen.seconds[: number + 1]) for number in range(len(seen.seconds))]
        timed = slice(UNTIMED_STEPS, None)
        losses = [loss if torch.tensor(loss).isfinite() else None for loss in seen.losses]
        return {
            "options": options,
            "curve": Curve(step=list(range(1, len(losses) + 1)), train_loss=losses, seconds=ends),
            "held_out": self.held_out,
            "tokens_per_second": _spread(rates(seen.num_tokens[timed], seen.seconds[timed])),
            "samples_per_second": _spread(rates(seen.num_samples[timed], seen.seconds[timed])),
            "step_seconds": seen.seconds[timed],
            "memory": seen.memory,
            "energy": layer_means(seen.energies),
        }

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model on its device, every weight in memory of its own: a mapped file would count when it is written to."""
        model, tokenizer = load_model_and_tokenizer(self.spec.model, "float32" if self.is_mixed else self.spec.dtype)
        model.config.use_cache = False
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        move: Any = model.to  # typed for another class
        return move(self.device), tokenizer

    def _build(self) -> tuple[Method, LRScheduler]:
        spec = self.spec
        own = {"seed": spec.seed} if spec.method in methods.SEEDED else {}
        method = methods.build(spec.method, self.model, lr=spec.lr, **{**own, **spec.options})
        if not method.claims.clipping:
            self.options["max_grad_norm"] = None
        name = "constant_with_warmup" if spec.schedule == "constant" else spec.schedule
        scheduler: LRScheduler = get_scheduler(name, method.optimizer, spec.warmup_steps, spec.steps)
        return method, scheduler

    def _precision(self) -> AbstractContextManager[object]:
        """What forward passes run in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.is_mixed else contextlib.nullcontext()

    def _evaluate(self, model: Any, rows: Sequence[TokenRow], step: int, seconds: float) -> HeldOutLoss | None:
        if not rows:
            return None
        with self._precision():
            result = held_out_loss(model, rows, self.collate, summed_loss, self.spec.batch_size, self.device)
        finite = result.loss == result.loss and abs(result.loss) != float("inf")
        self.held_out.append(HeldOut(step=step, loss=result.loss if finite else None, seconds=seconds))
        return result


def _collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForLanguageModeling:
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    return DataCollatorForLanguageModeling(pad)


def _spread(found: Rates | None) -> Spread | None:
    return None if found is None else Spread(**asdict(found))


def _tell(seen: Measured) -> None:
    line = {
        "step": len(seen.losses),
        "loss": seen.losses[-1],
        "seconds": seen.seconds[-1],
        "tokens_per_second": seen.num_tokens[-1] / seen.seconds[-1],
        "peak_bytes": peak_memory_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    try:
        sys.stdout.write(STEP + json.dumps(line) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise SystemExit("the comparison that this run belongs to is gone") from None


def main() -> None:
    """The process."""
    spec_file, directory, command = sys.argv[1:]
    with contextlib.suppress(OSError):  # where memory runs out, this process is to be ended, not the one that compares
        Path("/proc/self/oom_score_adj").write_text("1000")
    limit_matmul_caches()
    with quiet_libraries(Console(stderr=True)):
        try:
            record = work(RunSpec.model_validate_json(Path(spec_file).read_text(encoding="utf-8")), command)
        except GradLiteError as error:
            sys.stderr.write(f"{error}\n")
            sys.exit(BAD_INPUT)
    write_record(Path(directory), record)


if __name__ == "__main__":
    main()
