"""What several tests share: one thread, a language model of a few thousand parameters, the bytes that wait for backward."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

torch.set_num_threads(1)


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
