"""Attention against PyTorch's own math in float64, and what it holds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gradlite.hold.codec import EXACT, INT8, Codec
from gradlite.ops import attention as module
from gradlite.ops import blocked_attention
from gradlite.ops.attention import attention, attention_bytes
from gradlite.ops.linear import linear_bytes, subspace_linear

BATCH, LENGTH = 2, 9
SEEN = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
WINDOW = SEEN & ~SEEN.tril(-4)
PADDED = SEEN & (torch.arange(LENGTH) < torch.tensor([LENGTH, 5])[:, None])[:, None, None, :]
MASKS: dict[str, tuple[Tensor | None, bool]] = {
    "causal": (None, True),
    "none": (None, False),
    "window": (WINDOW[None, None], False),
    "padded": (PADDED, False),
    "added": (torch.randn(BATCH, 1, LENGTH, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), False),
    "added, of every head": (torch.zeros(1, 4, LENGTH, LENGTH, dtype=torch.float64).masked_fill(~SEEN, -1e30), False),
}


def leaf(heads: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of a projection, B×S×(heads·width)."""
    return torch.randn(BATCH, LENGTH, heads * width, dtype=dtype).requires_grad_()


def heads_of(rows: Tensor, heads: int) -> Tensor:
    """B×heads×S×width, a view."""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def naive(mask: Tensor | None, is_causal: bool, scale: float) -> Callable[..., Tensor]:
    """Softmax of masked logits, in plain operations."""

    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], dim=1) for one in (k, v))
        logits = q @ k.transpose(-1, -2) * scale
        if is_causal:
            logits = logits.masked_fill(~SEEN, float("-inf"))
        elif mask is not None:
            logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
        return (logits.softmax(-1) @ v).transpose(1, 2)

    return compute


def on_rows(function: Callable[..., Tensor], num_heads: int, num_kv_heads: int) -> Callable[..., Tensor]:
    """A function of heads as one of a projection's rows."""
    return lambda q, k, v: function(heads_of(q, num_heads), heads_of(k, num_kv_heads), heads_of(v, num_kv_heads))


@pytest.fixture(params=["flash", "replayed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of going backward."""
    if request.param == "replayed":
        monkeypatch.setattr(module, "_flash_takes", lambda *_: False)
    return str(request.param)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("num_kv_heads", "width"), [(4, 16), (2, 64), (1, 80)])
def test_values_and_gradients(name: str, num_kv_heads: int, width: int, way: str, same: Any, holder: Any) -> None:
    mask, is_causal = MASKS[name]
    scale = 1.3 * width**-0.5
    same(
        on_rows(lambda q, k, v: attention(q, k, v, mask, is_causal, scale, holder()), 4, num_kv_heads),
        on_rows(naive(mask, is_causal, scale), 4, num_kv_heads),
        [leaf(4, width), leaf(num_kv_heads, width), leaf(num_kv_heads, width)],
    )


def test_heads_that_are_no_views_and_another_number_of_keys(way: str, same: Any, holder: Any) -> None:
    q, k, v = (torch.randn(BATCH, 2, length, 16, dtype=torch.float64, requires_grad=True) for length in (5, 7, 7))
    same(lambda q, k, v: attention(q, k, v, None, False, 0.25, holder()), naive(None, False, 0.25), [q, k, v])


def test_values_of_another_width_are_replayed(same: Any, holder: Any) -> None:
    inputs = [leaf(4, 16), leaf(2, 16), leaf(2, 24)]
    same(
        on_rows(lambda q, k, v: attention(q, k, v, None, True, 0.25, holder()), 4, 2),
        on_rows(naive(None, True, 0.25), 4, 2),
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_with_more_keys_or_more_queries(dtype: torch.dtype, holder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a causal mask, too, which starts at the upper left as in PyTorch."""
    monkeypatch.setattr(blocked_attention, "BLOCK", 2)
    for lengths in ((5, 9), (9, 5)):
        seen = torch.ones(*lengths, dtype=torch.bool).tril()
        q, k, v = (torch.randn(BATCH, 4 if one == 0 else 2, lengths[one], 16).to(dtype).requires_grad_() for one in (0, 1, 1))
        outputs = [attention(q, k, v, None, True, 0.25, holder()), naive(seen, False, 0.25)(q, k, v)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0.02, atol=0.02)
        exact = [one.detach().double().requires_grad_() for one in (q, k, v)]
        truth = torch.autograd.grad(naive(seen, False, 0.25)(*exact).square().sum(), exact)
        for found, wanted in zip(torch.autograd.grad(outputs[0].float().square().sum(), [q, k, v]), truth, strict=True):
            assert torch.cosine_similarity(found.double().flatten(), wanted.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_that_see_no_key_in_low_precision(dtype: torch.dtype, holder: Any) -> None:
    mask = (SEEN & (torch.arange(LENGTH) >= 3))[None, None]
    inputs = [leaf(heads, 16, dtype) for heads in (4, 2, 2)]
    out = on_rows(lambda q, k, v: attention(q, k, v, mask, False, 0.25, holder()), 4, 2)(*inputs)
    assert (out[:, :3] == 0).all()
    for gradient in torch.autograd.grad(out.float().sin().sum(), inputs):
        assert torch.isfinite(gradient).all()
        assert (gradient[:, :3] == 0).all()


def test_queries_that_see_no_key(way: str, holder: Any) -> None:
    """Rows of left padding: finite, and without influence on the others."""
    mask = (SEEN & (torch.arange(LENGTH) >= 3))[None, None]
    q, k, v = leaf(4, 16), leaf(2, 16), leaf(2, 16)
    whole = on_rows(lambda q, k, v: attention(q, k, v, mask, False, 0.25, holder()), 4, 2)(q, k, v)
    seeing, wanted = whole[:, 3:], on_rows(naive(mask, False, 0.25), 4, 2)(q, k, v)[:, 3:]
    assert (whole[:, :3] == 0).all()  # as in PyTorch
    torch.testing.assert_close(seeing, wanted, rtol=0, atol=1e-10)
    gradients = torch.autograd.grad(whole.sin().sum(), [q, k, v])
    keys, values = (heads_of(one, 2).repeat_interleave(2, 1) for one in (k, v))
    reference = F.scaled_dot_product_attention(heads_of(q, 4), keys, values, attn_mask=mask, scale=0.25)
    for found, exact in zip(gradients, torch.autograd.grad(reference.sin().sum(), [q, k, v]), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)


def test_int8(way: str, close: Any, holder: Any) -> None:
    close(
        on_rows(lambda q, k, v: attention(q, k, v, None, True, 0.125, holder(INT8)), 4, 2),
        on_rows(naive(None, True, 0.125), 4, 2),
        [leaf(4, 64), leaf(2, 64), leaf(2, 64)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "none", "window", "padded", "added, of every head"])
@pytest.mark.parametrize("block", [4, 256])
def test_low_precision_is_as_good_as_the_plain_code(
    dtype: torch.dtype, name: str, block: int, way: str, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine queries are three blocks of four, or one."""
    monkeypatch.setattr(blocked_attention, "BLOCK", block)
    mask, is_causal = MASKS[name]
    mask = mask.to(dtype) if mask is not None and mask.dtype == torch.float64 else mask
    low = [leaf(heads, 16, dtype) for heads in (4, 2, 2)]
    exact = [one.detach().double().requires_grad_() for one in low]

    def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
        out = on_rows(function, 4, 2)(*inputs)
        assert out.dtype == inputs[0].dtype
        return torch.cat([one.double().flatten() for one in (out, *torch.autograd.grad(out.float().sin().sum(), inputs))])

    truth = results(naive(mask, is_causal, 0.25), exact)
    plain = results(naive(mask, is_causal, 0.25), low)
    found = results(lambda q, k, v: attention(q, k, v, mask, is_causal, 0.25, holder()), low)
    assert (found - truth).norm() <= 1.3 * (plain - truth).norm() + torch.finfo(dtype).eps * truth.norm()


# ---- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "none", "padded"])
def test_bytes(dtype: torch.dtype, name: str, codec: Codec, held_bytes: Any, holder: Any) -> None:
    """The mask belongs to the model, which all layers share."""
    mask, is_causal = MASKS[name]
    one, tokens = holder(codec), BATCH * LENGTH
    q, k, v = leaf(4, 16, dtype), leaf(2, 16, dtype), leaf(2, 16, dtype)
    matrix, coordinates = torch.randn(32, 64, dtype=dtype), torch.zeros(32, 8, dtype=dtype, requires_grad=True)
    shape = heads_of(q, 4), heads_of(k, 2), heads_of(v, 2)

    def work() -> Tensor:
        out = attention(*shape, mask, is_causal, 0.25, one)
        return subspace_linear(out.flatten(2), matrix, None, coordinates, lambda f: f.left_t_matmul(f.right_TN), one)

    held = held_bytes(work, [matrix, coordinates, mask])  # the output projection's input is the result, held once
    is_flash = codec is EXACT and dtype == torch.float32  # short formats go in blocks, codes through PyTorch's autograd
    assert held == attention_bytes(codec, tokens, 4, 2, 16, q.element_size(), is_flash) + linear_bytes(
        codec, tokens, 64, q.element_size()
    )


def test_under_no_grad_nothing_is_held(holder: Any, held_bytes: Any) -> None:
    one = holder(INT8)
    with torch.no_grad():
        q, k, v = (heads_of(leaf(4, 16), 4) for _ in range(3))
        assert held_bytes(lambda: attention(q, k, v, None, True, 0.25, one)) == 0
    assert one.noise.reads == 0


def test_blocks_of_many_lengths_are_traced_once(holder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the queries nor the keys of a block are constants of the compiled code; two graphs a kernel at most (s = U)."""
    from torch._dynamo.utils import counters

    from gradlite.hold.compiled import _State, kernel

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend="eager", **options))
    monkeypatch.setattr(_State, "usable", True)
    kernel.cache_clear()
    counters.clear()
    for length in (150, 160, 170, 180, 300, 310):
        q, k, v = (torch.randn(1, length, 4, 16).bfloat16().transpose(1, 2).requires_grad_() for _ in range(3))
        attention(q, k, v, None, True, 0.25, holder(EXACT)).sum().backward()
    kernel.cache_clear()
    assert 2 <= counters["stats"]["unique_graphs"] <= 4
    assert _State.usable


def test_heads_without_a_unit_stride_and_masks_of_three_dimensions(same: Any, holder: Any) -> None:
    """PyTorch's attention turns to other kernels by itself; the flash kernels that are called here would read past the rows."""
    q, k, v = (torch.randn(2, 4, 8, 9, dtype=torch.float64).transpose(2, 3).requires_grad_() for _ in range(3))
    for places in ((0,), (1,), (2,), (0, 1, 2)):
        given = [one if place in places else one.detach().contiguous().requires_grad_() for place, one in enumerate((q, k, v))]
        same(
            lambda q, k, v: attention(q, k, v, None, True, 0.3, holder()),
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(1, 2),
            given,
        )
    mask = torch.rand(4, 9, 9) > 0.3
    mask[..., 0] = True
    same(
        lambda q, k, v: attention(q, k, v, mask, False, 0.3, holder()),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, scale=0.3).transpose(1, 2),
        [one.detach().contiguous().requires_grad_() for one in (q, k, v)],
    )
