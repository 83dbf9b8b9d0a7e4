"""Which runs there are, and which rate the further seeds get."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gradlite.compare.experiment import Experiment, load_experiment
from gradlite.compare.record import HeldOut, Record
from gradlite.compare.runs import RunSpec, best_rate, further_seeds, num_runs, sweep

MakeSpec = Callable[..., RunSpec]


def experiment(**changes: object) -> Experiment:
    methods = [{"label": "A", "method": "adamw"}, {"label": "L (r = 8)", "method": "lora", "options": {"rank": 8}}]
    return load_experiment("paper-small-quality", {"methods": methods, "seeds": [3, 4, 5], "baselines": [], **changes})


def done(spec: RunSpec, loss: float | None) -> Record:
    if loss is None:
        return spec.record("failed", "no luck")
    return spec.record("ok", held_out=[HeldOut(step=0, loss=9.0, seconds=0), HeldOut(step=spec.steps, loss=loss, seconds=1)])


def test_the_first_seed_sweeps_and_the_others_take_the_best_rate() -> None:
    work = experiment()
    specs = sweep(work)
    assert [spec.run for spec in specs[3:5]] == [
        "paper-small-quality-l-r-8-lr0.001-seed3",
        "paper-small-quality-l-r-8-lr0.0025-seed3",
    ]
    assert {spec.seed for spec in specs} == {3}
    records = [done(spec, loss) for spec, loss in zip(specs, [2.0, 1.5, None, 1.0, 1.1, 1.2], strict=True)]
    later = further_seeds(work, records)
    assert [(spec.label, spec.lr, spec.seed) for spec in later] == [
        ("A", 6e-5, 4),
        ("L (r = 8)", 1e-3, 4),
        ("A", 6e-5, 5),
        ("L (r = 8)", 1e-3, 5),
    ]
    assert num_runs(work) == len(specs) + len(later)


def test_a_row_without_a_good_run_gets_no_further_seeds() -> None:
    work = experiment()
    records = [done(spec, None if spec.label == "A" else 1.0) for spec in sweep(work)]
    assert {spec.label for spec in further_seeds(work, records)} == {"L (r = 8)"}


def test_a_single_rate_needs_no_evaluation() -> None:
    work = experiment(learning_rates=[1e-5], held_out_rows=0)
    records = [spec.record("ok") for spec in sweep(work)]
    assert best_rate(records[:1]) == 1e-5
    assert len(further_seeds(work, records)) == 4
    assert best_rate([]) is None


def test_a_record_names_files_and_not_their_places(make_spec: MakeSpec, sums: Path) -> None:
    record = make_spec(label="A").record("failed", f"cannot read {sums}")
    assert (record.dataset, record.model, record.reason) == ("sums.jsonl", "tiny", "cannot read sums.jsonl")
    assert str(sums.parent) not in record.model_dump_json()


def test_a_reason_is_not_rewritten_by_a_name_without_a_place(
    make_spec: MakeSpec, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sums.parent)
    here = str(Path.cwd())
    record = make_spec(model=".").record("failed", f"3.5 GB. See {here}/config.json, {here}-other and ./x.")
    assert record.reason == f"3.5 GB. See {sums.parent.name}/config.json, {here}-other and ./x."
    nearby = make_spec(dataset=f"../{sums.parent.name}/sums.jsonl").record("failed", f"../{sums.parent.name}/sums.jsonl: no.")
    assert nearby.reason == "sums.jsonl: no."


def test_a_record_of_other_work_is_noticed(make_spec: MakeSpec) -> None:
    record = make_spec().record("ok")
    assert make_spec().differs_from(record) is None
    assert make_spec(steps=7).differs_from(record) == "steps"
    assert make_spec(max_grad_norm=0.5).differs_from(record) == "max_grad_norm"
    assert make_spec(held_out_rows=5).differs_from(record) == "held_out_rows"
    assert make_spec(held_out_from_last=11).differs_from(record) == "held_out_from_last"
    assert make_spec(full_rows=True).differs_from(record) == "full_rows"
    assert make_spec(options={"betas": [0.9, 0.99]}).differs_from(record) == "options"


def test_data_of_the_same_name_and_other_content_is_other_work(make_spec: MakeSpec, tmp_path: Path) -> None:
    files = [tmp_path / folder / "rows.jsonl" for folder in ("one", "two", "copy")]
    for file, text in zip(files, ("a\n", "b\n", "a\n"), strict=True):
        file.parent.mkdir()
        file.write_text(text)
    one, two, copy = (make_spec(dataset=str(file)) for file in files)
    record = one.record("ok")
    assert record.dataset == "rows.jsonl"
    assert two.differs_from(record) == "dataset_fingerprint"
    assert copy.differs_from(record) is None
    assert two.differs_from(record.model_copy(update={"dataset_fingerprint": None})) is None  # an older record
    moved = make_spec(dataset="owner/rows").record("ok")
    assert moved.dataset_fingerprint is None
