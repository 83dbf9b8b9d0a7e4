"""The whole page: self-contained, safe, accessible, and with a row for everything that was run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradlite.compare.record import Energy, Record
from gradlite.errors import GradLiteError
from gradlite.report.page import write_report
from gradlite.report.read import Records, TrainedRun, read
from gradlite.report.training import sections

Make = Callable[..., Record]


def test_a_page_of_records(pages: dict[str, str], page: Any) -> None:
    seen = page(pages["records"])
    assert "Lowest held-out loss: ADAMW with 1.0001" in seen.text
    assert "failed: diverged at step 7" in seen.text
    for title in ("Peak memory", "Training loss against steps", "Held-out loss against seconds", "Memory, quality and speed"):
        assert title in seen.text
    assert "The gradient's energy inside the basis" in seen.text
    assert seen.text.count("gradlite compare --steps 30") >= len(seen.named("figure"))  # beneath each figure
    assert seen.text.count("2026-01-02") >= len(seen.named("figure"))
    assert len(pages["records"]) < 1_500_000


@pytest.mark.parametrize("kind", ["records", "run"])
def test_a_page_needs_nothing_from_outside(kind: str, pages: dict[str, str], page: Any) -> None:
    seen = page(pages[kind])
    assert not {tag for tag, _ in seen.tags} & {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    for tag, attributes in seen.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action"):
                assert (value or "").startswith(("#", "data:image/png;base64,")), (tag, value)
    assert not re.search(r"@import|url\((?!#)", pages[kind])


@pytest.mark.parametrize("kind", ["records", "run"])
def test_a_page_can_be_read_by_a_machine(kind: str, pages: dict[str, str], page: Any) -> None:
    seen = page(pages[kind])
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(attributes.get("scope") in ("col", "row") for attributes in seen.named("th"))
    drawn = [attributes for attributes in seen.named("svg") if attributes.get("class") != "sample"]
    assert len(drawn) == len(seen.named("figure")) >= 6
    assert all(attributes.get("role") == "img" and len(attributes.get("aria-label") or "") > 20 for attributes in drawn)
    assert seen.named("html") == [{"lang": "en"}]


NASTY = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def test_texts_of_records_stay_texts(record: Make, write_records: Any, page: Any, tmp_path: Path) -> None:
    hostile = {
        "experiment": NASTY, "run": NASTY, "model": NASTY, "dataset": NASTY, "command": NASTY, "date": NASTY,
        "versions": {NASTY: NASTY}, "machine": {NASTY: NASTY},
    }  # fmt: skip
    energy = Energy(steps=[10, 20], layers=[NASTY, "b"], inside=[[0.9, None], [0.8, 0.7]])
    records = [
        record(NASTY, NASTY, energy=energy, **hostile),
        record(NASTY + "2", **{**hostile, "run": "b"}, status="failed", reason=NASTY, held_out=[]),
    ]
    seen = page(write_report([write_records(*records)], tmp_path / "page.html")[0].read_text())
    assert not {"script", "img"} & {tag for tag, _ in seen.tags}
    assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)
    assert NASTY in seen.text


def test_texts_of_a_run_stay_texts(run_folder: Any, page: Any, tmp_path: Path) -> None:
    folder = run_folder(status=NASTY, versions={NASTY: NASTY}, state_bytes={NASTY: 1}, machine={"gpu": "\ud800\x01"})
    (folder / "config.yaml").write_text(f"model: '{NASTY}'\n'{NASTY}': ['{NASTY}']\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "energy": {"<script>alert(1)</script>": 0.5}}\n')
    seen = page(write_report([folder], tmp_path / "page.html")[0].read_text(encoding="utf-8"))
    assert not {"script", "img"} & {tag for tag, _ in seen.tags}
    assert NASTY in seen.text


def test_a_page_of_a_run(pages: dict[str, str], page: Any) -> None:
    seen = page(pages["run"])
    for title in (
        "Loss against steps", "Loss against seconds", "Learning rate", "Throughput", "Gradient norm", "Peak memory",
        "Mean over the layers", "By layer and step",
    ):  # fmt: skip
        assert title in seen.text
    assert len(seen.named("figure")) == 8
    assert "gradlite train --config config.yaml" in seen.text


def test_a_run_without_energy_and_seconds(run_folder: Any, page: Any) -> None:
    folder = run_folder(metrics=[{"step": 1, "loss": None}, {"step": 2, "loss": 1.5, "learning_rate": 0.0}])
    seen = page(write_report([folder])[0].read_text())
    assert len(seen.named("figure")) == 2
    assert "tells no seconds" in seen.text


def test_a_run_that_only_began_is_drawn_against_its_seconds(run_folder: Any) -> None:
    run = read([run_folder(metrics=[{"step": 0, "eval_loss": 2.0, "seconds": 0.0}], status="running")])
    assert isinstance(run, TrainedRun)
    losses = next(section for section in sections(run) if section.title == "Loss")
    assert [picture.title for picture in losses.pictures] == ["Loss against steps", "Loss against seconds"]
    assert not losses.sentences


def test_settings_are_told_in_words(run_folder: Any) -> None:
    folder = run_folder(metrics=[])
    (folder / "config.yaml").write_text("a: true\nb: false\nc: null\nd: [1, x]\ne: []\nf: 0.1\n")
    run = read([folder])
    assert isinstance(run, TrainedRun)
    assert [row[1] for row in sections(run)[0].folded[0].rows] == ["on", "off", "–", "1, x", "–", "0.1"]


def test_an_empty_run_has_a_page(run_folder: Any, page: Any) -> None:
    folder = run_folder(metrics=[], status="running")
    (folder / "metrics.jsonl").unlink()
    (folder / "config.yaml").unlink()
    path, _ = write_report([folder])
    assert path == folder / "report.html"
    assert page(path.read_text()).named("figure") == []


def test_only_failures_have_a_page_too(record: Make, write_records: Any, page: Any) -> None:
    lost = record(status="out_of_memory", reason=None, memory=None, tokens_per_second=None, held_out=[], curve={})
    seen = page(write_report([write_records(lost)])[0].read_text())
    assert seen.named("figure") == []
    assert "out of memory" in seen.text


def test_the_presets_make_the_papers_tables_in_their_order(record: Make, write_records: Any, page: Any) -> None:
    names = ("paper-small-ablation", "paper-small-memory", "mine", "paper-small-quality")
    bare: dict[str, Any] = {"curve": {}, "held_out": [], "memory": None}  # nothing to draw
    records = [record("full (r = 8)" if "ablation" in name else "GaLore", "galore", experiment=name, **bare) for name in names]
    text = page(write_report([write_records(*records)])[0].read_text()).text
    places = [text.index(words) for words in ("Table 1:", "Table 2:", "Table 3:", "mine: memory and throughput")]
    assert places == sorted(places)


def test_a_page_that_cannot_be_written(record: Make, write_records: Any, tmp_path: Path) -> None:
    folder = write_records(record())
    for output in (tmp_path / "no" / "page.html", tmp_path, folder / "000.json", Path("/dev/null")):
        with pytest.raises(GradLiteError, match="--output"):
            write_report([folder], output)
    assert Path("/dev/null").is_char_device()
    again = read([folder])
    assert isinstance(again, Records)
    assert len(again.records) == 1
