"""TrainConfig: every key survives the trip through YAML and flags, and everything wrong is told in one sentence."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlite.errors import GradLiteError
from gradlite.train.config import LORA_METHODS, TrainConfig
from gradlite.train.fields import GROUPS, accepts_of, group_of

# One value for each key that differs from its default, as YAML or a flag would hold it.
OTHER_VALUES: dict[str, object] = {
    "model": "path/to/model",
    "dataset": "data.jsonl",
    "dataset_config": "main",
    "eval_dataset": "held-out.jsonl",
    "train_on": "all",
    "seq_len": 128,
    "packing": True,
    "rank": "1/8",
    "feedback": "same_step",
    "feedback_memory": "int4",
    "basis": "random",
    "refresh_interval": 7,
    "moments": "fp32",
    "hold": "int8",
    "betas": "0.8,0.95",
    "eps": "1e-6",
    "include": ["*.q_proj", "*.k_proj"],
    "exclude": ["lm_head"],
    "stochastic_rounding": False,
    "method": "galore",
    "method_options": "{rank: 8, target_modules: [attn]}",
    "lora_rank": 4,
    "lr": "3e-4",
    "batch_size": 2,
    "accumulation": 3,
    "epochs": 2.5,
    "max_steps": 11,
    "schedule": "linear",
    "warmup": 20,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "dtype": "float32",
    "seed": 5,
    "eval_examples": 8,
    "eval_every": 4,
    "save_every": 6,
    "resume": True,
    "output_dir": "elsewhere",
    "name": "mine",
    "overwrite": True,
    "report_to": ["wandb", "tensorboard"],
}


def test_the_table_above_covers_every_key() -> None:
    assert OTHER_VALUES.keys() == TrainConfig.model_fields.keys()


def test_every_key_has_help_a_group_and_words_for_what_it_accepts() -> None:
    for field in TrainConfig.model_fields.values():
        assert field.description
        assert group_of(field) in GROUPS
        assert accepts_of(field)


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_each_key_round_trips_through_yaml(key: str, tmp_path: Path) -> None:
    also = {"method_options": {"method": "galore"}, "lora_rank": {"method": "mesp"}}.get(key, {})
    config = TrainConfig.from_sources(None, {key: OTHER_VALUES[key], **also})
    assert getattr(config, key) != getattr(TrainConfig(), key)
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert TrainConfig.from_sources(path) == config


def test_to_yaml_names_every_key() -> None:
    assert list(yaml.safe_load(TrainConfig().to_yaml())) == list(TrainConfig.model_fields)


@settings(deadline=None)
@given(
    rank=st.integers(1, 10**6) | st.floats(0, 1, exclude_min=True),
    lr=st.floats(1e-300, 1e300),
    betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    include=st.lists(st.text()),
)
def test_any_valid_values_round_trip(rank: float, lr: float, betas: tuple[float, float], include: list[str]) -> None:
    config = TrainConfig(rank=rank, lr=lr, betas=betas, include=include)
    assert TrainConfig.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_flags_override_the_file_and_the_file_overrides_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-3\nseed: 7\n")
    config = TrainConfig.from_sources(path, {"lr": "2e-3"})
    assert (config.lr, config.seed, config.batch_size) == (2e-3, 7, 4)


@pytest.mark.parametrize(
    ("text", "rank"), [("1/16", 1 / 16), ("1/3", 1 / 3), ("64", 64), ("0.25", 0.25), ("1", 1), ("1.0", 1.0)]
)
def test_a_rank_is_a_number_or_a_fraction(text: str, rank: float) -> None:
    read = TrainConfig.from_sources(None, {"rank": text}).rank
    assert read == rank
    assert type(read) is type(rank)


def test_yamls_bare_off_is_the_feedback_mode(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("feedback: off\n")
    assert TrainConfig.from_sources(path).feedback == "off"


def test_one_pattern_may_stand_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text('exclude: "*q_proj*"\n')
    assert TrainConfig.from_sources(path).exclude == ["*q_proj*"]


def test_none_takes_back_what_the_file_sets(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 5\n")
    assert TrainConfig.from_sources(path, {"max_steps": "none"}).max_steps is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("rank", value) for value in ("0", "-1", "1.5", "1/0", "3/2", "nan", "inf", "", "abc", True, None)],
        *[("lr", value) for value in ("0", "-1e-4", "nan", "inf", "fast", True, None)],
        *[("betas", value) for value in ("0.9", "0.9,1", "-0.1,0.9", "0.9,nan", "0.9,0.9,0.9", "a,b", 0.9)],
        *[("warmup", value) for value in ("-1", "1.5", "nan", True)],
        *[(key, value) for key in ("batch_size", "accumulation", "refresh_interval") for value in ("0", "1.5", "x", True)],
        *[(key, "0") for key in ("max_steps", "eval_every", "save_every", "eval_examples", "epochs", "eps")],
        *[(key, "-0.1") for key in ("weight_decay", "max_grad_norm")],
        *[("name", value) for value in ("a/b", "..", "", " ", "a\\b")],
        *[("seed", value) for value in ("-1", "4294967296")],
        ("seq_len", "1"),
        ("model", ""),
        ("model", 5),
        ("feedback", "no"),
        ("dtype", "float16"),
        ("include", 5),
        ("exclude", {"a": 1}),
        ("report_to", ["wandb", "mlflow"]),
        ("packing", "perhaps"),
        ("method", "galroe"),
        ("method_options", "{rank: 8"),
        ("method_options", "rank=8"),
        ("method_options", ["rank"]),
    ],
)
def test_a_bad_value_names_key_value_and_what_is_accepted(key: str, value: object, tmp_path: Path) -> None:
    words = accepts_of(TrainConfig.model_fields[key])
    flag = "--" + key.replace("_", "-")
    with pytest.raises(GradLiteError) as told:
        TrainConfig.from_sources(None, {key: value})
    assert str(told.value) == f"{flag} is {value!r}, but it must be {words}."
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({key: value}))
    with pytest.raises(GradLiteError) as told:
        TrainConfig.from_sources(path)
    assert str(told.value) == f"{key} in {path} is {value!r}, but it must be {words}."


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("batchsize", "batch_size"),
        ("batch-size", "batch_size"),
        ("Rank", "rank"),
        ("learning_rate", "lr"),
        ("steps", "max_steps"),
        ("zzz", None),
    ],
)
def test_an_unknown_key_suggests_the_nearest(key: str, nearest: str | None, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{key}: 1\n")
    hint = f"did you mean {nearest!r}?" if nearest else "`gradlite train --help` lists the known keys."
    with pytest.raises(GradLiteError) as told:
        TrainConfig.from_sources(path)
    assert str(told.value) == f"unknown key {key!r} in {path}; {hint}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"# nothing\n", "it is empty"),
        (b"- 1\n- 2\n", "it is a list"),
        (b"just words\n", "it is a str"),
        (b"lr: [1\n", "not valid YAML: line"),
        (b"lr: 1\nlr: 2\n", "line 2: the key 'lr' stands twice"),
        (b"? [a]\n: 1\n", "not valid YAML: line 1"),
        (b"lr: !!python/object:os.system {}\n", "not valid YAML: line 1"),
        (b"name: 2026-02-30\n", "not valid YAML: day is out of range"),
        (b"name: \xff\xfe\n", "not UTF-8"),
    ],
)
def test_a_broken_file_is_told_in_one_sentence(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(GradLiteError) as told:
        TrainConfig.from_sources(path)
    assert str(path) in str(told.value)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def test_a_missing_file_and_a_directory_are_told(tmp_path: Path) -> None:
    with pytest.raises(GradLiteError, match=r"cannot be read: No such file"):
        TrainConfig.from_sources(tmp_path / "none.yaml")
    with pytest.raises(GradLiteError, match=r"cannot be read: Is a directory"):
        TrainConfig.from_sources(tmp_path)


def test_resume_and_overwrite_exclude_each_other() -> None:
    with pytest.raises(GradLiteError, match="exclude each other"):
        TrainConfig.from_sources(None, {"resume": True, "overwrite": True})


@pytest.mark.parametrize(
    ("model", "dataset", "name"),
    [
        ("smollm2", "python-help", "smollm2-python-help-seed0"),
        ("org/Model-1B", "data/dolly.v2.jsonl", "model-1b-dolly.v2-seed0"),
        ("./models/mine/", "/data/a b", "mine-a-b-seed0"),
        (".", "..", "run-run-seed0"),
    ],
)
def test_the_run_is_named_after_model_data_and_seed(model: str, dataset: str, name: str) -> None:
    assert TrainConfig(model=model, dataset=dataset).run_dir == Path("runs") / name


def test_other_methods_have_directories_of_their_own() -> None:
    assert TrainConfig(method="galore").run_name == "smollm2-python-help-galore-seed0"


@pytest.mark.parametrize(("key", "remedy"), [("rank", "give --rank"), ("checkpointing", "it has none called 'checkpointing'")])
def test_options_of_gradlite_are_keys(key: str, remedy: str) -> None:
    with pytest.raises(GradLiteError, match=remedy):
        TrainConfig.from_sources(None, {"method_options": {key: 1}})


def test_a_given_name_and_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = TrainConfig.from_sources(None, {"name": "mine", "output_dir": "~/runs"})
    assert config.run_dir == tmp_path / "runs" / "mine"


def test_the_optimizers_keywords_are_those_of_its_group() -> None:
    keywords = TrainConfig(include=["*.q_proj"], lr=1e-3).optimizer_keywords()
    assert keywords["include"] == ["*.q_proj"]
    assert keywords["exclude"] is None
    assert keywords["lr"] == 1e-3
    assert not keywords.keys() & {"model", "batch_size", "schedule"}


def test_a_methods_keywords_are_its_options_the_rate_and_the_decay() -> None:
    config = TrainConfig.from_sources(flags={"method": "lora", "method_options": "{rank: 4}", "lr": "1e-3"})
    assert config.method_keywords() == {"lr": 1e-3, "weight_decay": 0.0, "rank": 4}
    assert TrainConfig().method_keywords() == TrainConfig().optimizer_keywords()


@pytest.mark.parametrize("method", LORA_METHODS)
def test_the_adapters_rank_has_a_flag_of_its_own(method: str) -> None:
    config = TrainConfig.from_sources(flags={"method": method, "lora_rank": "4", "method_options": "{alpha: 2}", "seed": "7"})
    seed = {"seed": 7} if method == "mesp" else {}
    assert config.method_keywords() == {"lr": 1e-4, "weight_decay": 0.0, "rank": 4, "alpha": 2, **seed}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"method": "lora", "rank": "8"}, r"--rank is a setting of method 'gradlite', not of 'lora': give --lora-rank\."),
        ({"lora_rank": "8"}, r"a setting of the methods lora, dora, mesp, mebp, not of 'gradlite': give --rank\."),
        ({"method": "lomo", "lora_rank": "8"}, r"not of 'lomo': leave it out\."),
        ({"method": "mesp", "lora_rank": "8", "method_options": "{rank: 4}"}, r"exclude each other"),
        ({"method": "adamw", "betas": "0.8,0.9"}, r"--betas is a setting of method 'gradlite', not of 'adamw'"),
        ({"method": "lora", "method_options": "{lr: 1}"}, r"'lr', which is a key of its own: give --lr\."),
        ({"method_options": "{rank: 8}"}, r"keys of their own: give --rank\."),
    ],
)
def test_settings_of_another_method_are_refused(flags: dict[str, str], sentence: str) -> None:
    with pytest.raises(GradLiteError, match=sentence):
        TrainConfig.from_sources(flags=flags)


def test_hold_by_module_reads_the_same_from_a_flag_and_from_yaml(tmp_path: Path) -> None:
    rules = {"model.layers.[0-15]": "recompute", "*": "int8"}
    file = tmp_path / "run.yaml"
    file.write_text("hold:\n  model.layers.[0-15]: recompute\n  '*': int8\n")
    from_flag = TrainConfig.from_sources(flags={"hold": '{"model.layers.[0-15]": recompute, "*": int8}'})
    assert TrainConfig.from_sources(file).hold == from_flag.hold == rules
    assert list(from_flag.optimizer_keywords()["hold"]) == list(rules)  # the first match decides


@pytest.mark.parametrize("hold", ["int9", "{unfinished", '{"*": int9}', ["int8"]])
def test_a_bad_way_of_holding_is_named(hold: object) -> None:
    with pytest.raises(GradLiteError, match=r"--hold is .*must be 'exact', 'int8'"):
        TrainConfig.from_sources(flags={"hold": hold})
