"""What several tests share: one thread, tiny models, forty rows of data, the bytes that wait for backward."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is tested is the CPU's: a GPU sums in any order
os.environ["TERM"] = "xterm"  # whatever the tests are started from, their screens are plain text
for _variable in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(_variable, None)
os.environ["THP_MEM_ALLOC_ENABLE"] = "0"  # or the first test that calls the command line would change it for the later ones
if shutil.which("c++") is None:
    os.environ.setdefault("GRADLITE_COMPILE", "0")

torch.set_num_threads(1)  # matrices this small are slower on several threads, far slower where the processors are busy

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class TinyModel(nn.Module):
    """One transformer block: q, k, v and gate, up share inputs; biases, norms; the head is tied to the embedding."""

    def __init__(self, vocabulary: int = 40, width: int = 24, hidden: int = 48, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def block(self, h: Tensor) -> Tensor:
        x = self.norm1(h)
        h = h + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True))
        x = self.norm2(h)
        result: Tensor = h + self.down(F.silu(self.gate(x)) * self.up(x))
        return result

    def forward(self, ids: Tensor) -> Tensor:
        """The mean next-token loss of ``ids`` (batch × length)."""
        logits = self.head(self.block(self.embed(ids[:, :-1])))
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@pytest.fixture
def tiny_model() -> Callable[..., TinyModel]:
    """Builds the same small model every time (float64 unless told): ``tiny_model(dtype=…, tied=…)``."""

    def build(dtype: torch.dtype = torch.float64, tied: bool = True) -> TinyModel:
        torch.manual_seed(0)
        model = TinyModel(tied=tied)
        for parameter in model.parameters():  # embeddings of unit size would make the first logits far too sure
            if parameter.shape[0] == 40:
                parameter.data.mul_(0.3)
        return model.to(dtype)

    return build


@pytest.fixture
def batches() -> Callable[..., list[Tensor]]:
    """Random token batches, always the same: ``batches(count, size=4)``."""

    def build(count: int, size: int = 4) -> list[Tensor]:
        generator = torch.Generator().manual_seed(7)
        return list(torch.randint(0, 40, (count, size, 7), generator=generator))

    return build


@pytest.fixture
def held_bytes() -> Callable[..., int]:
    """``held_bytes(work, parameters)``: bytes of the storages that autograd saves during ``work``, parameters left out.

    A storage counts once, however many operators keep it.
    """

    def count(work: Callable[[], Any], parameters: Iterable[Tensor | None] = ()) -> int:
        left_out = {one.untyped_storage().data_ptr() for one in parameters if one is not None}
        saved: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address is seen twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = work()
        assert result is not None
        return sum(one.untyped_storage().nbytes() for address, one in saved.items() if address not in left_out)

    return count


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    """One token a byte, and the two tokens that the chat template needs."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: "PreTrainedTokenizerFast") -> Path:
    """A random chat model: a Llama of two layers, 64 wide, with tied embeddings and a byte-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
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
def sums(tmp_path: Path) -> Path:
    """Forty questions with answers of different lengths."""
    rows = [{"prompt": f"{n} and {n}?", "completion": f"{2 * n}, " + "yes " * (n % 3 + 1)} for n in range(40)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
