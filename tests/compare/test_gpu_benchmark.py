"""The GPU comparison and its check, run on a CPU at their smallest shape."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradlite.compare.record import Record
from gradlite.hold import compiled
from gradlite.hold.codec import INT8, Int8
from gradlite.methods.packages import require_part

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/gpu; nothing is compiled, and a GPU is not used where there is one."""
    monkeypatch.syspath_prepend(str(GPU))
    monkeypatch.setattr(compiled._State, "usable", False)
    monkeypatch.setenv(compiled.ENVIRONMENT_SWITCH, "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delitem(sys.modules, "compare", raising=False)
    return import_module


@pytest.mark.parametrize("name", ["gradlite-int8", "adamw-checkpointed"])
def test_a_run_leaves_a_record(name: str, load: Any, tmp_path: Path) -> None:
    compare = load("compare")
    record = Record.model_validate(compare.run(name, "tiny"))
    assert (record.status, record.run, record.experiment) == ("ok", name, "gpu-tiny")
    assert len(record.step_seconds) == compare.MEASURED_STEPS
    assert record.tokens_per_second is not None
    assert record.tokens_per_second.max == pytest.approx(2 * 96 / min(record.step_seconds))
    assert record.memory is not None
    weight_bytes = record.memory.peak_bytes - record.memory.peak_above_weights_bytes
    model = compare.build_model(compare.SHAPES["tiny"], torch.device("cpu"))
    assert weight_bytes >= sum(2 * parameter.numel() for parameter in model.parameters())
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    assert record.memory.by_category_bytes is not None
    state = record.memory.by_category_bytes.optimizer_state  # made in earlier steps
    assert state >= 4 * num_weights if name == "adamw-checkpointed" else state > 0
    assert record.memory.peak_above_weights_bytes >= state
    assert record.options["compiled"] is False
    assert record.options["max_grad_norm"] == 1.0
    shape = compare.SHAPES["tiny"]
    found = record.model_dump(mode="json")
    step_seconds = shape.tokens / record.tokens_per_second.median
    found["machine"]["matmul_flops_per_second"] *= compare.floor_seconds(found, shape) / (0.25 * step_seconds)
    (tmp_path / f"{name}.json").write_text(json.dumps(found))
    table = compare.table_of(tmp_path, shape)
    assert table.splitlines()[2].split("|")[5].strip() == "0.25"  # with the products four times as fast as the step
    assert f"{record.tokens_per_second.median:,.0f} (" in table
    assert ("kernels in eager mode" in table) == (name == "gradlite-int8")


def test_galore_runs_without_its_decompositions(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("galore_torch") is None:
        pytest.skip("galore-torch is not installed")
    projector = require_part("galore_torch", "galore_projector", "galore", "galore-torch").GaLoreProjector
    monkeypatch.setattr(projector, "get_orthogonal_matrix", projector.get_orthogonal_matrix)  # put back at the end
    compare = load("compare")
    record = compare.run("galore", "tiny")
    assert record["status"] == "ok"
    assert record["options"]["svd_seconds_a_step"] > 0
    assert record["curve"]["train_loss"][-1] == pytest.approx(6.2, abs=0.5)  # ln 512: a learning rate of 1e-5 changes little
    row = compare._row(record, compare.SHAPES["tiny"])
    assert row[-1].startswith("without SVD; with its")


def test_a_missing_package_is_recorded(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = load("compare")
    monkeypatch.setitem(sys.modules, "lomo_optim", None)
    record = Record.model_validate(compare.run("lomo-checkpointed", "tiny"))
    assert record.status == "failed"
    assert record.reason is not None
    assert "pip install lomo-optim" in record.reason


def test_out_of_memory_is_recorded(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = load("compare")

    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")

    monkeypatch.setattr(compare, "measure", exhausted)
    record = Record.model_validate(compare.run("adamw", "tiny"))
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB."
    assert (record.status, record.reason) == ("out_of_memory", reason)


def test_what_is_recorded_is_not_run_again(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compare = load("compare")
    started: list[str] = []

    def start(command: list[str], timeout: float, check: bool) -> Any:
        started.append(command[-1])
        if command[-1] == "adamw":
            raise subprocess.TimeoutExpired(command, timeout)
        if command[-1] == "gradlite-exact":
            (tmp_path / "gradlite-exact.json").write_text(json.dumps(compare._record("gradlite-exact", "tiny", {}, "ok", None)))
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(subprocess, "run", start)
    names = ["gradlite-exact", "galore", "adamw"]
    # AdamW had only what the others left of the time: it is not judged yet.
    assert not compare.run_all(names, "tiny", tmp_path, 540.0)
    assert started == names
    assert not (tmp_path / "adamw.json").exists()
    record = json.loads((tmp_path / "galore.json").read_text())
    assert (record["status"], record["reason"]) == ("failed", "the process ended with 7")
    # The second time it has all of it, and is.
    started.clear()
    assert compare.run_all(names, "tiny", tmp_path, 540.0)
    assert started == ["adamw"]
    assert json.loads((tmp_path / "adamw.json").read_text())["reason"] == "not done within 9 minutes"
    with pytest.raises(SystemExit, match="is a record of gpu-tiny on CPU, and this is gpu-8b on CPU"):
        compare.run_all(names, "8b", tmp_path, 540.0)


def test_a_run_that_trains_nothing_is_no_row(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = load("compare")
    build = compare.build_model

    def broken(*arguments: Any) -> Any:
        model = build(*arguments)
        with torch.no_grad():
            model.lm_head.weight.fill_(torch.nan)
        return model

    monkeypatch.setattr(compare, "build_model", broken)
    record = Record.model_validate(compare.run("gradlite-int8", "tiny"))
    assert (record.status, record.reason) == ("failed", "the loss is nan at step 1")


def test_floor_counts_products(load: Any) -> None:
    shapes = load("shapes")
    shape = replace(shapes.SHAPES["8b"], layers=1)

    def floor(method: str, hold: str | None = None, *, is_checkpointed: bool = False) -> float:
        return float(shapes.floor_flops(shape, method, hold, is_checkpointed=is_checkpointed, num_labelled=0))

    num_weights = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    forward = 2 * 4096 * num_weights  # 4,096 tokens
    attention = 2 * 4096 * 2048 * 4096
    assert floor("adamw") == pytest.approx(3 * (forward + attention))
    last = 2 * 4096 * 4096 * 14336  # is not run again
    assert floor("lomo", is_checkpointed=True) == pytest.approx(4 * (forward + attention) - last)
    low_rank = sum(128 / n + 128 / m for n, m in ((4096, 4096),)) * 4096 * 4096 * 2
    low_rank += (128 / 4096 + 128 / 1024) * 4096 * 1024 * 2 + (128 / 4096 + 128 / 14336) * 4096 * 14336 * 3
    assert floor("gradlite", "int8") == pytest.approx(2 * forward + 2 * 4096 * low_rank + 3 * attention)
    assert floor("gradlite", "recompute") - floor("gradlite", "int8") == pytest.approx(forward + attention - last)


def test_batches_have_dollys_lengths(load: Any) -> None:
    shapes = load("shapes")
    shape = replace(shapes.SHAPES["8b"], batch_size=64)
    (batch,), (again,) = (shapes.batches(shape, 1) for _ in range(2))
    assert torch.equal(batch["labels"], again["labels"])
    assert batch["input_ids"].shape == (64, 2048)
    labelled: Tensor = batch["labels"] != shapes.IGNORED
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    # Dolly's answers are 39 % of its tokens; about 40 % of it without the longest fortieth.
    assert 0.33 < float(labelled.float().mean()) < 0.46


def test_check_passes(load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    check = load("check")
    monkeypatch.setattr(sys, "argv", ["check.py", "--device", "cpu"])
    assert check.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 4 + 2 + 1 + 2 + 2 + 1 + 4 + 1
    assert all(line.startswith("ok ") for line in lines[:-1])


def test_check_goes_on_after_an_error(load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    check = load("check")

    def breaks(_device: torch.device) -> Any:
        raise RuntimeError("no such kernel")

    for name in ("gradients", "int8_kernels", "resume", "training", "optimizer_against_cpu"):
        monkeypatch.setattr(check, name, breaks)
    monkeypatch.delenv(compiled.ENVIRONMENT_SWITCH)
    monkeypatch.setattr(sys, "argv", ["check.py", "--device", "cpu"])
    assert check.main() == 1
    said = capsys.readouterr().out
    assert "FAILED  breaks: RuntimeError: no such kernel" in said
    assert "FAILED  compiling for cpu: it failed" in said
    assert "ok      8-bit moments" in said
    assert "6 checks failed." in said


def test_check_sees_wrong_codes(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check = load("check")
    decode = Int8.decode

    def wrong(self: Int8, leaves: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return decode(self, leaves, dtype).roll(1, 0)  # another token's row

    monkeypatch.setattr(Int8, "decode", wrong)
    passed = {name: has_passed for name, has_passed, _ in check.gradients(torch.device("cpu"))}
    assert {name for name, has_passed in passed.items() if not has_passed} == {
        f"gradient, {dtype}, hold {hold}" for dtype in ("float32", "bfloat16") for hold in ("int8", "recompute-int8")
    }


def test_check_sees_a_kernel_that_rounds_otherwise(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check = load("check")

    def wrong(x_TN: Tensor, noise_TN: Tensor) -> tuple[Tensor, ...]:
        return INT8.encode(x_TN, noise_TN + 1)

    monkeypatch.setattr(check, "_encode", wrong)
    assert not any(has_passed for _, has_passed, _ in check.int8_kernels(torch.device("cpu")))


HIDE = """
import importlib.machinery as machinery
find = machinery.PathFinder.find_spec
hidden = {hidden}
machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.partition(".")[0] in hidden else find(name, path, target)
)
"""


def bare_environment(folder: Path) -> dict[str, str]:
    """Of a machine with torch and transformers and none of the package's other dependencies."""
    hidden = "pydantic pydantic_core trl datasets torchao peft lomo_optim galore_torch gguf accelerate".split()
    (folder / "sitecustomize.py").write_text(HIDE.format(hidden=hidden))
    path = os.pathsep.join([str(folder), str(ROOT / "src"), str(GPU)])
    return {**os.environ, "PYTHONPATH": path, "GRADLITE_COMPILE": "0", "CUDA_VISIBLE_DEVICES": ""}


def test_what_it_needs_is_imported_on_a_bare_machine(tmp_path: Path) -> None:
    code = "import bare; bare.import_gradlite(); import sys, gradlite.methods.attached; assert 'pydantic' not in sys.modules"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=bare_environment(tmp_path), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_runs_on_a_bare_machine(tmp_path: Path) -> None:
    """From the command line."""
    out = tmp_path / "records"
    command = [sys.executable, str(GPU / "compare.py"), "--out", str(out), "--shape", "tiny"]
    command += ["--methods", "gradlite-recompute,adamw8bit-in-backward,lomo-checkpointed"]
    environment = bare_environment(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    status = {file.stem: Record.model_validate_json(file.read_text()).status for file in out.glob("*.json")}
    assert status == {"gradlite-recompute": "ok", "adamw8bit-in-backward": "failed", "lomo-checkpointed": "failed"}
    table = (out / "table.md").read_text()
    assert "pip install torchao" in table
    assert table in done.stdout
