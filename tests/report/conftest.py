"""Made-up records and runs, and a page taken apart."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gradlite.compare.record import ByCategory, Curve, Energy, HeldOut, Memory, Record, Spread
from gradlite.report.page import write_report

_VOID = {"meta", "link", "br", "img", "input", "hr"}


def make_record(label: str = "AdamW", method: str = "adamw", **changes: Any) -> Record:
    """A finished run of 30 steps; ``loss``, ``peak`` (bytes above weights of 100) and ``speed`` are what it came to."""
    loss, peak, speed = changes.pop("loss", 1.0), changes.pop("peak", 400), changes.pop("speed", 200.0)
    lr, seed = changes.get("lr", 1e-4), changes.get("seed", 0)
    steps = changes.get("steps", 30)
    parts = ByCategory(
        weights=100,
        gradients=peak // 4,
        optimizer_state=peak // 4,
        held_activations=peak // 4,
        temporaries=peak - 3 * (peak // 4),
    )
    values: dict[str, Any] = {
        "experiment": "trial", "run": f"trial-{label}-lr{lr:g}-seed{seed}", "label": label, "method": method, "model": "tiny",
        "dataset": "sums", "dtype": "float32", "lr": lr, "seed": seed, "batch_size": 2, "seq_len": 8, "steps": steps,
        "schedule": "cosine", "warmup_steps": 3, "status": "ok",
        "curve": Curve(
            step=list(range(1, steps + 1)), train_loss=[loss + 1 / step for step in range(1, steps + 1)],
            seconds=[step / speed for step in range(1, steps + 1)],
        ),
        "held_out": [HeldOut(step=0, loss=2.0, seconds=0.0), HeldOut(step=steps, loss=loss, seconds=steps / speed)],
        "held_out_tokens": 77, "tokens_per_second": Spread(median=speed, min=speed - 1, max=speed + 1),
        "memory": Memory(peak_bytes=100 + peak, peak_above_weights_bytes=peak, by_category_bytes=parts),
        "versions": {"gradlite-llm": "0.1.0"}, "machine": {"processor": "x86_64", "memory_bytes": 8_000_000_000, "gpu": None},
        "command": "gradlite compare --steps 30", "date": "2026-01-02",
    }  # fmt: skip
    return Record(**{**values, **changes})


@pytest.fixture
def record() -> Callable[..., Record]:
    return make_record


@pytest.fixture
def write_records(tmp_path: Path) -> Callable[..., Path]:
    def write(*records: Record) -> Path:
        folder = tmp_path / "records"
        folder.mkdir(exist_ok=True)
        for number, one in enumerate(records):
            (folder / f"{number:03}.json").write_text(one.model_dump_json())
        return folder

    return write


def make_run(parent: Path, metrics: list[dict[str, Any]] | None = None, **result: Any) -> Path:
    """A directory as `gradlite train` leaves it, of 30 steps."""
    folder = parent / "my-run"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: tiny\ndataset: sums\nlr: 0.0001\npacking: false\ninclude: []\n")
    done = {
        "made_by": "gradlite", "status": "finished", "steps": 30, "seconds": 61.0, "held_out_tokens": 77,
        "loss_before": 2.0, "loss_after": 1.0, "versions": {"torch": "2.13.0"}, "state_bytes": {"moments": 5000},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({**done, **result}))
    lines = metrics if metrics is not None else [
        {"step": 0, "eval_loss": 2.0, "seconds": 0.0},
        *(
            {
                "step": step, "loss": 2 - step / 30, "grad_norm": 1.0, "learning_rate": 1e-4, "skipped_steps": 0,
                "tokens_per_second": 100.0, "peak_memory_bytes": 10**9, "seconds": 2.0 * step,
            }
            for step in range(1, 31)
        ),
        {"step": 20, "energy": {"model.embed.weight": 0.5, "model.layers.0.q.weight": 0.9, "model.layers.0.k.weight": 0.7}},
        {"step": 30, "energy": {"model.layers.0.q.weight": 1.0, "model.layers.10.q.weight": 0.6, "layers.2.q.weight": 0.8}},
        {"step": 30, "eval_loss": 1.0, "seconds": 61.0},
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    return lambda metrics=None, **result: make_run(tmp_path, metrics, **result)


class Page(HTMLParser):
    """Tags with their attributes, the text outside of styles, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="session")
def page() -> Callable[[str], Page]:
    return Page


def twenty_runs() -> list[Record]:
    """Five methods of four runs, one of which failed, some with energy."""
    records = []
    for number, method in enumerate(("adamw", "lomo", "galore", "lora", "gradlite")):
        for lr, seed in ((1e-4, 0), (3e-4, 0), (1e-4, 1), (1e-4, 2)):
            energy = Energy(steps=[10, 20], layers=["a", "b"], inside=[[0.9, None], [0.8, 0.7]]) if number == 4 else None
            loss = 1 + number / 10 + lr
            records.append(make_record(method.upper(), method, loss=loss, lr=lr, seed=seed, peak=400 + number, energy=energy))
    records[6] = records[6].model_copy(update={"status": "failed", "reason": "diverged at step 7", "held_out": []})
    return records


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages of twenty runs and of one, made once: drawing takes its time."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "records.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in twenty_runs()))
    sources = {"records": folder / "records.jsonl", "run": make_run(folder)}
    return {kind: write_report([source])[0].read_text(encoding="utf-8") for kind, source in sources.items()}
