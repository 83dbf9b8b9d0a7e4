"""The model and the work of the GPU comparison: random weights on the device, batches in Dolly's lengths, and the FLOP floor.

Nothing is downloaded. Rows hold examples of random tokens one after the other, as packing lays them out; an example's number of
question and of answer tokens is drawn from Dolly's quantiles (dolly_lengths.json), and the loss looks at the answers.
"""

import json
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """A Llama model and its batches. ``rank``: of every low-rank method."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    batch_size: int
    seq_len: int
    rank: int

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len

    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of one block's linear layers."""
        kv = self.hidden // self.heads * self.kv_heads
        attention = [(self.hidden, self.hidden), (self.hidden, kv), (self.hidden, kv), (self.hidden, self.hidden)]
        return [*attention, (self.hidden, self.mlp), (self.hidden, self.mlp), (self.mlp, self.hidden)]


SHAPES = {
    "8b": Shape(4096, 32, 32, 8, 14336, 128256, batch_size=2, seq_len=2048, rank=128),  # Llama 3.1, untied
    "tiny": Shape(64, 2, 4, 2, 128, 512, batch_size=2, seq_len=96, rank=16),
}


def build_model(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> PreTrainedModel:
    """The model in training mode, its random weights made on the device in their final dtype."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(8192, shape.seq_len),
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.train()


def batches(shape: Shape, count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """``input_ids`` and ``labels`` (batch × length, on the CPU), the same for the same seed."""
    table = json.loads((Path(__file__).parent / "dolly_lengths.json").read_text())
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(shape.vocabulary, (shape.batch_size, shape.seq_len), generator=generator)
        is_answer = torch.tensor([_answer_mask(table, shape.seq_len, draw) for _ in range(shape.batch_size)])
        made.append({"input_ids": ids, "labels": torch.where(is_answer, ids, IGNORED)})
    return made


def _answer_mask(table: dict[str, list[int]], length: int, draw: random.Random) -> list[bool]:
    mask: list[bool] = []
    while len(mask) < length:
        mask += [False] * _length(table["question_tokens"], draw) + [True] * _length(table["answer_tokens"], draw)
    # A row without a label would have no loss: its last token is one.
    return [*mask[: length - 1], True]


def _length(quantiles: list[int], draw: random.Random) -> int:
    """A number from the distribution with these evenly spaced quantiles; the longest fortieth, up to thousands, is left out."""
    low, high = draw.choice(list(pairwise(quantiles[:-1])))
    return round(draw.uniform(low, high))


def floor_flops(shape: Shape, method: str, hold: str | None, *, is_checkpointed: bool, num_labelled: int) -> float:
    """Floating-point operations that one step of a method needs at least: its matrix products, each counted once.

    In units of the forward products: exact training 3, with checkpointing 4 for what lies inside blocks; GradLite 2 + r/n + r/m
    for the linear layers, and one more with ``recompute``, but for a block's last layer: nothing kept comes after it, so its
    replay stops before. Attention (causal: half the square) is trained exactly by every method. The head works on labelled
    tokens only, and is no part of a block. Optimizers' own arithmetic, norms, softmax and GaLore's decompositions are left out.
    """
    replays = 1 if is_checkpointed or (hold or "").startswith("recompute") else 0

    def linear(inputs: int, outputs: int, tokens: int, extra: int) -> float:
        units = 3.0
        if method == "gradlite":
            units = 2.0 + min(1.0, shape.rank / inputs) + min(1.0, shape.rank / outputs)
        return (units + extra) * 2.0 * tokens * inputs * outputs

    *others, last = shape.linears()
    block = sum(linear(*size, shape.tokens, replays) for size in others) + linear(*last, shape.tokens, 0)
    blocks = block * shape.layers
    attention = (3 + replays) * 2.0 * shape.tokens * shape.seq_len * shape.hidden * shape.layers
    return blocks + attention + linear(shape.hidden, shape.vocabulary, num_labelled, 0)
