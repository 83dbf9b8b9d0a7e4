"""Leaves that wait elsewhere: copied once, back in time, gone when nothing needs them. A link that counts stands for CUDA's."""

import pickle

import pytest
import torch
from torch import Tensor

from gradlite.hold.codec import EXACT, INT8
from gradlite.hold.holder import Holder
from gradlite.hold.host import AHEAD, RECENT, SMALLEST_BYTES, Host
from gradlite.hold.noise import Noise
from gradlite.hold.shelf import Shelf
from gradlite.ops.activation import activation
from gradlite.ops.gated_mlp import gated
from gradlite.ops.norm import NormKind, norm

ELEMENTS = SMALLEST_BYTES // 4


class CountingLink:
    """Copies within one memory; a copy that is used before it arrived holds nothing but NaN."""

    def __init__(self) -> None:
        self.num_away = 0
        self.begun: list[float] = []
        self.ended: list[float] = []
        self.under_way: dict[int, Tensor] = {}

    def away(self, x: Tensor) -> Tensor:
        self.num_away += 1
        return x.clone()

    def begin_back(self, x: Tensor) -> Tensor:
        self.begun.append(float(x.flatten()[0]))
        copy = torch.full_like(x, torch.nan) if x.is_floating_point() else torch.zeros_like(x)
        self.under_way[copy.data_ptr()] = x.clone()
        return copy

    def end_back(self, x: Tensor) -> None:
        x.copy_(self.under_way.pop(x.data_ptr()))
        self.ended.append(float(x.flatten()[0]))


def numbered(count: int) -> list[Tensor]:
    return [torch.full((ELEMENTS,), float(number)) for number in range(count)]


def test_a_leaf_comes_back_equal_and_those_before_it_are_sent_for() -> None:
    link = CountingLink()
    host = Host(link)
    leaves = [leaf for x in numbered(6) for leaf in host.put((x,))]
    assert link.num_away == 6
    (last,) = host.fetch(leaves[5:])
    assert torch.equal(last, torch.full((ELEMENTS,), 5.0))
    assert last.data_ptr() != leaves[5].data_ptr()
    assert link.begun == [5.0, *[4.0, 3.0, 2.0][:AHEAD]]
    assert link.ended == [5.0]
    host.fetch(leaves[4:5])
    assert link.begun[-1] == 1.0  # one more on its way, none twice
    assert link.ended == [5.0, 4.0]


def test_who_asks_again_soon_gets_the_same_copy() -> None:
    link = CountingLink()
    host = Host(link)
    leaves = [leaf for x in numbered(RECENT + 2) for leaf in host.put((x,))]
    (first,), (again,) = host.fetch(leaves[-1:]), host.fetch(leaves[-1:])
    assert first is again
    for leaf in reversed(leaves[:-1]):
        host.fetch((leaf,))
    before = len(link.begun)
    assert torch.equal(host.fetch(leaves[-1:])[0], first)  # long ago: a second backward pass, say
    assert link.begun[before] == RECENT + 1  # fetched anew


def test_small_leaves_and_strangers_stay() -> None:
    link = CountingLink()
    host = Host(link)
    small, weight = torch.zeros(ELEMENTS - 1), torch.zeros(ELEMENTS)
    assert host.put((small,))[0] is small
    assert all(found is given for found, given in zip(host.fetch((small, weight)), (small, weight), strict=True))
    assert link.num_away == 0


def test_nothing_is_kept_alive_and_addresses_are_not_confused() -> None:
    link = CountingLink()
    host = Host(link)
    for round_ in range(5):
        leaves = [leaf for x in numbered(4) for leaf in host.put((x + 10 * round_,))]
        for number in reversed(range(4)):
            assert float(host.fetch((leaves[number],))[0][0]) == number + 10 * round_
        del leaves
    host.put(numbered(1))
    assert len(host._order) == len(host._by_key) <= 5
    assert not host._recent


def test_a_view_waits_as_rows() -> None:
    link = CountingLink()
    host = Host(link)
    x = torch.randn(64, 2 * ELEMENTS // 64)[:, ::2]
    assert torch.equal(host.fetch(host.put((x,)))[0], x)


@pytest.mark.parametrize("codec", [EXACT, INT8])
def test_operators_give_the_same_gradients_from_the_host(codec: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradlite.hold.host.SMALLEST_BYTES", 32 * 64)  # but neither scales nor numbers a token
    gradients: list[list[Tensor]] = []
    links = CountingLink()
    for place in (Host(), Host(links)):
        holder = Holder(codec, Noise(0), Shelf(), place)  # type: ignore[arg-type]
        torch.manual_seed(0)
        x = torch.randn(32, 64, requires_grad=True)
        weight = torch.randn(64, requires_grad=True)
        y = norm(x, weight, None, NormKind(1e-6), holder)
        held = holder.hold(y)
        assert torch.allclose(held.ticket.get(held.leaves), y, atol=0.2)
        z = activation(gated(y, y * 2, "silu", holder), "gelu", holder)
        gradients.append(list(torch.autograd.grad(z.square().sum(), (x, weight))))
        assert not place._recent  # backward is over
    assert links.num_away == 4  # the norm's x̂, gate, up, and the activation's input: nothing twice
    for here, there in zip(*gradients, strict=True):
        assert torch.equal(here, there)


def test_a_copied_host_is_empty() -> None:
    host = Host(CountingLink())
    host.put(numbered(2))
    assert pickle.loads(pickle.dumps(host))._order == []
