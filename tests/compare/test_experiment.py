"""Experiment files: defaults, overrides, and mistakes in one sentence."""

from pathlib import Path

import pytest

from gradlite.compare.experiment import PRESETS, all_tables, choose_experiments, load_experiment, restrict
from gradlite.errors import GradLiteError
from gradlite.methods import names


def test_every_shipped_experiment_can_be_run() -> None:
    for preset in PRESETS:
        for experiment in choose_experiments(preset, None, None, {}):
            labels = {entry.label for entry in experiment.methods}
            assert {entry.method for entry in experiment.methods} <= set(names())
            assert set(experiment.baselines) <= labels
            sizes = {len(experiment.rates_of(entry)) for entry in experiment.methods}
            assert sizes == ({1} if experiment.kind == "memory" else {3})  # every method tries as many rates


def test_every_method_has_a_sweep_of_its_own() -> None:
    assert set(load_experiment("paper-small-quality").rates) == set(names())


def test_a_file_overrides_the_default_and_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("steps: 7\nseq_len: 32\nrates: {lora: [1e-3]}\nmethods: [{label: LoRA, method: lora}]\nseeds: [4]\n")
    experiment = load_experiment(file, {"steps": 9})
    assert (experiment.name, experiment.steps, experiment.seq_len, experiment.seeds) == ("mine", 9, 32, [4])
    assert experiment.batch_size == 4  # the default's
    assert experiment.rates_of(experiment.methods[0]) == [1e-3]
    assert experiment.rates["adamw"] == [2.5e-5, 6e-5, 1.5e-4]  # other methods keep theirs
    swept = load_experiment(file, {"learning_rates": [0.1, 0.2]})
    assert swept.rates_of(swept.methods[0]) == [0.1, 0.2]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("step: 3", "unknown key 'step' in .*; did you mean 'steps'?"),
        ("steps: 0", r"^mine\.yaml: steps is 0, but it should be greater than or equal to 1\.$"),
        ("methods: []", r"methods is \[\], but it should have at least 1 item\.$"),
        ("methods: [{label: A, method: x}]", "unknown method 'x'; known are adamw,"),
        ("methods: [{label: A, method: galroe}]", r"unknown method 'galroe'; did you mean 'galore'\?$"),
        (
            "methods: [{label: A, method: adamw, option: {}}]",
            "methods, row 'A': option is no known key; did you mean 'options'",
        ),
        ("methods: [{method: adamw}]", r"methods, row 1: label is missing\.$"),
        ("methods: [adamw]", r"methods, row 1 is 'adamw', but it should be a mapping\.$"),
        ("name: a/b\nmethods: [{label: A, method: adamw}]", "name: 'a/b' cannot be a part of file names"),
        ("methods: [{label: A b, method: adamw}, {label: a-B, method: lora}]", "two methods have the label 'A b'"),
        ("held_out_rows: 600\nmethods: [{label: A, method: adamw}]", "held_out_rows is 600, more than"),
        ("baselines: [B]\nmethods: [{label: A, method: adamw}]", "baselines names 'B', but no method has that label"),
        ("seeds: [0, 1, 0]\nmethods: [{label: A, method: adamw}]", "mine.yaml: seeds: 0 is named twice"),
        ("learning_rates: [1.0e-3, 1.0e-3]\nmethods: [{label: A, method: adamw}]", "learning_rates: 0.001 is named twice"),
        ("methods: [{label: A, method: adamw, learning_rates: [1.0e-3, 2.0e-3, 0.001]}]", "0.001 is named twice"),
        ("rates: {lora: [1.0e-3, 1.0e-3]}\nmethods: [{label: A, method: adamw}]", "rates: lora: 0.001 is named twice"),
        ('methods: [{label: "A, B", method: adamw}]', "'A, B' has a comma, and --methods could not name it"),
        (
            "rates: {galroe: [1.0e-3]}\nmethods: [{label: A, method: adamw}]",
            r"unknown method 'galroe'; did you mean 'galore'\?$",
        ),
        ("rates: [1e-3]", "rates must be a mapping"),
        ("held_out_rows: 0\nmethods: [{label: A, method: adamw}]", "several learning rates need held_out_rows"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(GradLiteError, match=sentence) as told:
        load_experiment(file)
    assert "\n" not in str(told.value)


def test_a_rows_own_rates_come_before_the_files_and_the_flag_before_both(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "learning_rates: [1.0e-3]\nmethods: [{label: A, method: adamw, learning_rates: [2.0e-3]}, {label: B, method: lora}]"
    )
    own = load_experiment(file)
    assert [own.rates_of(entry) for entry in own.methods] == [[2e-3], [1e-3]]
    flagged = load_experiment(file, {"learning_rates": [3e-3]})
    assert [flagged.rates_of(entry) for entry in flagged.methods] == [[3e-3], [3e-3]]


def test_a_row_that_is_added_by_name_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("held_out_rows: 0\nmethods: [{label: Adamw8bit, method: adamw, learning_rates: [1.0e-3]}]")
    with pytest.raises(GradLiteError, match=r"--methods with the experiment 'mine': several learning rates need held_out_rows"):
        restrict([load_experiment(file)], ["lora"])
    single = load_experiment(file, {"learning_rates": [1e-3]})
    assert [entry.label for entry in restrict([single], ["lora"])[0].methods] == ["lora"]
    with pytest.raises(GradLiteError, match=r"two methods have the label 'Adamw8bit'"):
        restrict([single], ["adamw", "adamw8bit"])


def test_what_is_there_is_shown_whatever_the_rates() -> None:
    """Two are no rates for a table of memory, whose rows stay there all the same."""
    shown = all_tables("paper-small", {"learning_rates": [1e-4, 3e-4], "steps": 7})
    assert [(one.kind, one.steps) for one in shown] == [("memory", 7), ("quality", 7), ("ablation", 7)]


def test_a_choice_of_methods() -> None:
    memory, quality = choose_experiments("paper-small", [1, 2], ["adamw", "foam"], {})
    assert [entry.label for entry in memory.methods] == ["AdamW", "foam"]
    assert [entry.label for entry in quality.methods] == ["AdamW", "foam"]
    (ablation,) = choose_experiments("paper-small", [3], ["full (r = 8)"], {})
    assert [entry.options["rank"] for entry in ablation.methods] == [8]
    with pytest.raises(GradLiteError, match="no chosen table has any of the methods foam"):
        choose_experiments("paper-small", [3], ["foam"], {})
    with pytest.raises(GradLiteError, match="has no table 4"):
        choose_experiments("paper-small", [4], None, {})
    with pytest.raises(GradLiteError, match="there is no preset 'paper'"):
        choose_experiments("paper", None, None, {})
