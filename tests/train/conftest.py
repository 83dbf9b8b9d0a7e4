"""A tiny random chat model with a byte-level tokenizer, and small data files: enough to train in a second."""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gradlite.train.config import TrainConfig
from gradlite.train.run import run

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Write = Callable[[str, Iterable[Mapping[str, Any]]], Path]
Train = Callable[..., "Outcome"]


class Outcome:
    """What a run left and what it showed."""

    def __init__(self, path: Path, shown: str) -> None:
        self.path = path
        self.shown = shown

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl without those parts that are measurements of time and memory."""
        measured = {"tokens_per_second", "peak_memory_bytes", "seconds"}
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in measured} for line in lines]

    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "run.json").read_text()))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the two tokens that the chat template needs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, far slower where the processors are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, 64 wide, with tied embeddings."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_jsonl(name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write_jsonl


@pytest.fixture
def sums(write: Write) -> Path:
    """Forty questions with answers of different lengths."""
    rows = [{"prompt": f"{n} and {n}?", "completion": f"{2 * n}, " + "yes " * (n % 3 + 1)} for n in range(40)]
    return write("sums.jsonl", rows)


@pytest.fixture
def train(tmp_path: Path, model_dir: Path, sums: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run a training with the given settings and return what it left; by default six steps on `sums`."""
    monkeypatch.setattr("gradlite.evaluate.answers.MAX_NEW_TOKENS", 4)

    def train_with(**settings: Any) -> Outcome:
        defaults = {
            "model": str(model_dir),
            "dataset": str(sums),
            "output_dir": str(tmp_path / "runs"),
            "name": "run",
            "dtype": "float32",
            "seq_len": 96,
            "max_steps": 6,
            "eval_examples": 6,
            "lr": 1e-3,
        }
        screen = io.StringIO()
        config = TrainConfig.from_sources(None, {**defaults, **settings})
        path = run(config, Console(file=screen, width=240))
        return Outcome(path, screen.getvalue())

    return train_with


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets beside the project, where there are any."""
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("there is no ../shared/data beside the project")
    return folder
