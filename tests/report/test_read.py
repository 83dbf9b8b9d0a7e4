"""What may be given to the report, and the one sentence for everything else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradlite.compare.record import Record
from gradlite.errors import GradLiteError
from gradlite.report.read import Records, TrainedRun, read

Make = Callable[..., Record]


def test_files_directories_and_lines_give_the_same_records(record: Make, write_records: Any, tmp_path: Path) -> None:
    records = [record(seed=seed) for seed in range(3)]
    folder = write_records(*records)
    lines = tmp_path / "all.jsonl"
    lines.write_text("\n".join(one.model_dump_json() for one in records) + "\n\n")
    comparison = tmp_path / "comparison"  # as `gradlite compare` leaves it
    comparison.mkdir()
    folder.rename(comparison / "records")
    several = sorted((comparison / "records").iterdir())
    for paths in ([comparison], [comparison / "records"], [lines], several):
        found = read(paths)
        assert isinstance(found, Records)
        assert found.records == records


def test_other_files_of_a_directory_are_left_out_and_named(record: Make, write_records: Any) -> None:
    folder = write_records(record())
    (folder / "theorem.json").write_text('{"experiment": "theorem", "record_version": 1, "points": []}')
    (folder / "old.jsonl").write_text('{"loss": 1}\n{"loss": 2}\n')
    found = read([folder])
    assert isinstance(found, Records)
    assert len(found.records) == 1
    assert found.left_out == ["old.jsonl", "theorem.json"]


def test_a_run_is_known_by_its_directory(run_folder: Any) -> None:
    folder = run_folder()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')  # killed while writing
    run = read([folder])
    assert isinstance(run, TrainedRun)
    assert run.name == "my-run"
    assert run.series("eval_loss") == ([0.0, 30.0], [2.0, 1.0])
    assert run.series("eval_loss", "seconds") == ([0.0, 61.0], [2.0, 1.0])
    assert len(run.series("loss")[0]) == 30


def bad_record(**changes: Any) -> str:
    return json.dumps({"record_version": 1, **changes})


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "{", "not JSON"),
        ("a.json", '{"record_version": 1, "lr": NaN}', "not JSON"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.json", "[]", "no record"),
        ("a.json", '{"loss": 1}', "no record"),
        ("a.json", bad_record(), "experiment"),
        ("a.jsonl", '{"loss": 1}', "a.jsonl, line 1"),
        ("a.json", b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_it(name: str, text: str | bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(GradLiteError, match=said) as raised:
        read([file])
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("facts", [{"versions": "x"}, {"machine": ["x"]}, {"machine": {"memory_bytes": "x"}}])
def test_facts_of_another_kind_are_named(run_folder: Any, facts: dict[str, Any]) -> None:
    with pytest.raises(GradLiteError, match=rf"{next(iter(facts))} in .*run\.json"):
        read([run_folder(**facts)])


def test_a_records_machine_of_another_kind_is_named(record: Make, write_records: Any) -> None:
    folder = write_records(record(machine={"memory_bytes": "8 GB"}))
    with pytest.raises(GradLiteError, match=r"machine in .*000\.json is no mapping"):
        read([folder])


def test_numbers_that_are_not_finite_are_left_out_of_a_series(run_folder: Any) -> None:
    folder = run_folder()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:1], '{"step": 1, "grad_norm": 1e999}', *lines[2:]]) + "\n")
    run = read([folder])
    assert isinstance(run, TrainedRun)
    assert run.series("grad_norm")[0] == list(range(2, 31))


@pytest.mark.parametrize("line", [{"step": 1, "energy": {"a": "x"}}, {"energy": {"a": 0.5}}])
def test_an_energy_of_another_kind_is_named(run_folder: Any, line: dict[str, Any]) -> None:
    with pytest.raises(GradLiteError, match=r"energy in .*metrics\.jsonl"):
        read([run_folder(metrics=[line])])


def test_paths_that_hold_nothing(run_folder: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(GradLiteError, match="holds no records"):
        read([empty])
    with pytest.raises(GradLiteError, match="there is no"):
        read([tmp_path / "nowhere"])
    run = run_folder()
    with pytest.raises(GradLiteError, match="give it alone"):
        read([run, empty])
    (run / "metrics.jsonl").write_text("1\n")
    with pytest.raises(GradLiteError, match="not the directory of a GradLite run"):
        read([run])
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(GradLiteError, match=r"config\.yaml"):
        read([run])
