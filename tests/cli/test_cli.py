"""The command line: flags are the config's keys, --help is whole and light, a mistake is one sentence, exit code 2."""

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from gradlite.cli.app import main
from gradlite.errors import GradLiteError
from gradlite.train.config import TrainConfig
from gradlite.train.fields import flag_of


@dataclass
class Run:
    """What one call of the command line left behind."""

    code: int
    out: str
    err: str
    configs: list[TrainConfig]


CommandLine = Callable[..., Run]


@pytest.fixture
def gradlite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Call the command line with a training run that only records its config (or raises or sends what it is told to)."""

    def call(*arguments: str, raises: BaseException | None = None, sends: signal.Signals | None = None) -> Run:
        configs: list[TrainConfig] = []

        def run(config: TrainConfig) -> None:
            configs.append(config)
            if sends is not None:
                signal.raise_signal(sends)
            if raises is not None:
                raise raises

        monkeypatch.setitem(sys.modules, "gradlite.train.run", SimpleNamespace(run=run))
        monkeypatch.setattr(sys, "argv", ["gradlite", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code or 0
        assert isinstance(code, int)
        return Run(code=code, out=captured.out, err=captured.err, configs=configs)

    return call


def as_flags(settings: dict[str, object]) -> list[str]:
    """The command line that says the same as this mapping of keys."""
    flags: list[str] = []
    for key, value in settings.items():
        if isinstance(value, bool):
            flags.append(flag_of(key) if value else f"--no-{flag_of(key)[2:]}")
        elif isinstance(value, list) and key != "betas":
            flags += [part for item in value for part in (flag_of(key), str(item))]
        else:
            flags += [flag_of(key), ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return flags


EVERYTHING: dict[str, object] = {key: value for key, value in TrainConfig().settings().items() if value is not None} | {
    "dataset_config": "main",
    "eval_dataset": "e.jsonl",
    "packing": True,
    "rank": "1/8",
    "feedback": "off",
    "betas": [0.8, 0.9],
    "include": ["a", "b"],
    "exclude": ["c"],
    "hold": "recompute",
    "stochastic_rounding": False,
    "method_options": "none",
    "lora_rank": "none",
    "max_grad_norm": 0.5,
    "max_steps": 3,
    "warmup": 2,
    "eval_every": 5,
    "save_every": 6,
    "resume": True,
    "name": "mine",
    "report_to": ["wandb", "trackio"],
    "output_dir": "out",
    "seed": 9,
}


def test_every_key_as_a_flag_equals_every_key_in_a_file(gradlite: CommandLine, tmp_path: Path) -> None:
    assert EVERYTHING.keys() == TrainConfig.model_fields.keys()
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(EVERYTHING))
    [by_flags] = gradlite("train", *as_flags(EVERYTHING)).configs
    [by_file] = gradlite("train", "--config", str(path)).configs
    assert by_flags == by_file == TrainConfig.from_sources(None, EVERYTHING)
    assert by_flags.model_fields_set == TrainConfig.model_fields.keys()


def test_without_flags_everything_is_the_default(gradlite: CommandLine) -> None:
    result = gradlite("train")
    assert (result.code, result.configs) == (0, [TrainConfig()])
    assert result.configs[0].model_fields_set == set()


def test_a_flag_wins_over_the_file(gradlite: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("packing: true\nlr: 1\nseed: 3\n")
    [config] = gradlite("train", "--config", str(path), "--no-packing", "--lr", "2e-4").configs
    assert (config.packing, config.lr, config.seed) == (False, 2e-4, 3)


def test_help_lists_every_key_with_its_default(gradlite: CommandLine) -> None:
    result = gradlite("train", "--help")
    assert result.code == 0
    for key, default in TrainConfig().settings().items():
        line = next(line for line in result.out.splitlines() if f"{flag_of(key)} " in line)
        words = {True: "on", False: "off"}[default] if isinstance(default, bool) else default
        if isinstance(default, list):
            words = ",".join(map(str, default))
        assert (f"default: {words})" in line) == (default not in (None, [])), key


@pytest.mark.parametrize("arguments", [["train", "--help"], ["--version"], []])
def test_help_and_version_load_no_torch(arguments: list[str]) -> None:
    program = (
        f"import sys; sys.argv = ['gradlite', *{arguments!r}]\n"
        "from gradlite.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "assert not {'torch', 'transformers', 'datasets', 'trl', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_version(gradlite: CommandLine) -> None:
    assert gradlite("--version").out == "gradlite 0.1.0\n"


def test_no_verb_shows_the_verbs(gradlite: CommandLine) -> None:
    result = gradlite()
    assert result.code == 0
    assert "train" in result.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--batchsize", "3"], "unknown flag --batchsize; did you mean --batch-size?"),
        (["train", "--learning-rate=3"], "unknown flag --learning-rate; did you mean --lr?"),
        (["train", "--zzz"], "unknown flag --zzz; `gradlite train --help` lists the known flags."),
        (["train", "gpt2"], "unexpected argument 'gpt2'; settings are given as flags such as --model gpt2."),
        (["train", "--lr", "0"], "--lr is '0', but it must be a number above 0."),
        (["train", "--config", "none.yaml"], "the config file none.yaml cannot be read: No such file or directory."),
        (["train", "--resume", "--overwrite"], "resume and overwrite exclude each other: give one of them."),
        (["train", "--lr"], "Option '--lr' requires an argument."),
        (["train", "--rank", "9" * 401 + "/3"], "--rank is "),
        (["train", "--hold", "{'*': int8, '*': exact}"], "--hold is "),
        (["train", "--output-dir", "~nosuchuser/runs"], "--output-dir is '~nosuchuser/runs', but it must be "),
        (["tain"], "No such command 'tain'. Did you mean 'train'?"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    gradlite: CommandLine, arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = gradlite(*arguments)
    assert (result.code, result.out, result.configs) == (2, "", [])
    assert result.err.startswith(f"error: {sentence}")
    assert result.err.count("\n") == 1


def test_an_error_of_the_run_is_told_the_same_way(gradlite: CommandLine) -> None:
    result = gradlite("train", raises=GradLiteError("there is no model at [x]."))
    assert (result.code, result.err) == (2, "error: there is no model at [x].\n")


def test_a_path_that_cannot_be_used_is_named(gradlite: CommandLine) -> None:
    result = gradlite("train", raises=PermissionError(13, "Permission denied", "/closed/data.jsonl"))
    assert result.code == 2
    assert (
        result.err == "error: '/closed/data.jsonl' cannot be used: Permission denied; give another path, or the rights to it.\n"
    )


def test_a_full_disk_is_told_where_no_file_is_named(gradlite: CommandLine) -> None:
    result = gradlite("train", raises=OSError(28, "No space left on device"))
    assert result.code == 2
    assert result.err == (
        "error: a file could not be written: No space left on device; make room on the disk, or write to another.\n"
    )


def test_an_interrupted_run_says_how_to_go_on(gradlite: CommandLine) -> None:
    result = gradlite("train", raises=KeyboardInterrupt())
    assert result.code == 130
    assert "same command with --resume goes on" in result.err
    assert "Traceback" not in result.err
    assert "with --resume in place of --overwrite goes on" in gradlite("train", "--overwrite", raises=KeyboardInterrupt()).err


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_asked_to_end_says_how_to_go_on(gradlite: CommandLine, ending: signal.Signals) -> None:
    before = signal.signal(ending, signal.SIG_DFL)
    try:
        result = gradlite("train", sends=ending)
        assert (result.code, signal.getsignal(ending)) == (130, signal.SIG_DFL)
        assert "--resume" in result.err
        signal.signal(ending, signal.SIG_IGN)  # as nohup does
        assert gradlite("train", sends=ending).code == 0
    finally:
        signal.signal(ending, before)


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_config: TrainConfig) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setitem(sys.modules, "gradlite.train.run", SimpleNamespace(run=run))
    monkeypatch.setattr(sys, "argv", ["gradlite", "train"])
    with pytest.raises(RuntimeError, match="a bug"):
        main()


def test_python_dash_m_is_the_command() -> None:
    output = subprocess.run([sys.executable, "-m", "gradlite", "--version"], capture_output=True, check=True, text=True)
    assert output.stdout == "gradlite 0.1.0\n"


def test_importing_gradlite_is_light() -> None:
    program = "import sys, gradlite; assert not {'transformers', 'datasets', 'trl', 'typer'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)
