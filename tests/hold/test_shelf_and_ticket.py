"""A tensor is found again while it is the same tensor, and what is made again lives from its first use to its last."""

import gc
import pickle
import weakref

import torch
from torch import Tensor

from gradlite.hold.codec import EXACT, INT4, INT8
from gradlite.hold.holder import Holder
from gradlite.hold.noise import Noise
from gradlite.hold.shelf import Shelf
from gradlite.hold.ticket import Held, Ticket


def held() -> Held:
    return Held(Ticket(lambda *leaves: leaves[0]), (torch.zeros(1),))


def shelf_with(x: Tensor) -> tuple[Shelf, Held]:
    shelf, one = Shelf(), held()
    shelf.offer(x, one)
    return shelf, one


# ---- shelf ----------------------------------------------------------------------------------------------------------


def test_a_reshaped_view_is_the_same_tensor() -> None:
    x = torch.randn(2, 3, 4)
    shelf, one = shelf_with(x)
    for same in (x, x.view(6, 4), x.flatten(), x.detach(), x[:]):
        assert shelf.find(same) is one
    for other in (x[1:], x[..., :2], x.transpose(0, 1), x.clone(), x.view(torch.int32)):
        assert shelf.find(other) is None


def test_what_was_offered_transposed_is_not_found_straight() -> None:
    x = torch.randn(4, 4)
    shelf, _ = shelf_with(x.T)
    assert shelf.find(x) is None


def test_a_transposed_square_is_another_tensor() -> None:
    x = torch.randn(4, 4)
    shelf, _ = shelf_with(x)
    assert shelf.find(x.T) is None


def test_a_tensor_changed_in_place_is_another_tensor() -> None:
    x = torch.randn(6)
    shelf, one = shelf_with(x)
    assert shelf.find(x) is one
    x.add_(1)
    assert shelf.find(x) is None


def test_storage_of_a_dead_tensor_is_forgotten() -> None:
    memory = bytearray(64)
    x = torch.frombuffer(memory, dtype=torch.float32)
    shelf, _ = shelf_with(x)
    address = x.data_ptr()
    del x
    y = torch.frombuffer(memory, dtype=torch.float32)
    assert y.data_ptr() == address
    assert shelf.find(y) is None


def test_leaves_of_dead_tensors_and_of_old_ones_are_let_go() -> None:
    shelf, leaves = Shelf(), []
    alive = [torch.randn(3) for _ in range(40)]
    for x in alive:
        one = held()
        leaves.append(weakref.ref(one.leaves[0]))
        shelf.offer(x, one)
    del one
    gc.collect()
    assert sum(leaf() is not None for leaf in leaves) < 20
    assert shelf.find(alive[0]) is None
    assert shelf.find(alive[-1]) is not None
    del alive, x
    shelf.offer(torch.randn(3), held())
    gc.collect()
    assert all(leaf() is None for leaf in leaves)


def test_a_cleared_shelf_and_a_copied_one_are_empty() -> None:
    x = torch.randn(3)
    shelf, one = shelf_with(x)
    leaf = weakref.ref(one.leaves[0])
    del one
    assert pickle.loads(pickle.dumps(shelf)).find(x) is None
    shelf.clear()
    assert shelf.find(x) is None
    assert leaf() is None


# ---- ticket ---------------------------------------------------------------------------------------------------------


def test_the_value_is_made_once_and_freed_at_the_last_use() -> None:
    made: list[weakref.ref[Tensor]] = []

    def rebuild(leaf: Tensor) -> Tensor:
        value = leaf * 2
        made.append(weakref.ref(value))
        return value

    ticket, leaves = Ticket(rebuild), [torch.ones(3)]
    for _ in range(3):
        ticket.issue()
    values = [ticket.get(leaves) for _ in range(2)]
    assert values[0] is values[1]
    values.clear()
    assert made[0]() is not None  # a third operator will come
    last = ticket.get(leaves)
    assert len(made) == 1
    assert torch.equal(last, torch.full((3,), 2.0))
    del last
    assert made[0]() is None


def test_a_second_backward_pass_over_a_retained_graph_gets_the_same_value() -> None:
    ticket, leaves = Ticket(lambda leaf: leaf * 2), [torch.ones(3)]
    for _ in range(2):
        ticket.issue()
    for _ in range(5):
        assert torch.equal(ticket.get(leaves), torch.full((3,), 2.0))
    assert ticket._value is None


# ---- holder ---------------------------------------------------------------------------------------------------------


def test_one_tensor_is_held_once() -> None:
    for codec in (EXACT, INT8, INT4):
        holder = Holder(codec, Noise(0), Shelf())
        x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
        first, second = holder.hold(x), holder.hold(x.view(10, 32))
        assert first is second
        assert first.leaves is not holder.hold(x + 1).leaves
        value = first.ticket.get(first.leaves)
        assert value.shape == (10, 32)
        assert value.dtype == torch.bfloat16
        assert first.ticket.get(first.leaves) is value
        if codec is EXACT:
            assert torch.equal(value, x.view(10, 32))


def test_odd_widths_take_eight_bits_instead_of_four() -> None:
    holder = Holder(INT4, Noise(0), Shelf())
    assert holder.codec_for(17) is INT8
    assert pickle.loads(pickle.dumps(holder)).codec_for(17) is INT8
    x = torch.randn(3, 17)
    one = holder.hold(x)
    assert torch.allclose(one.ticket.get(one.leaves), x, rtol=0, atol=0.05)


def test_what_waits_in_another_format() -> None:
    """Under autocast a linear's input waits in low precision; asked for again in full, it is another tensor."""
    holder = Holder(EXACT, Noise(0), Shelf())
    x = torch.randn(4, 32)
    low, again = holder.hold(x, torch.bfloat16), holder.hold(x, torch.bfloat16)
    assert low.leaves[0].dtype == torch.bfloat16
    assert again is low
    assert holder.hold(x).leaves[0].dtype == torch.float32


def test_what_was_offered_under_other_hooks_is_not_found() -> None:
    """A checkpointed part that runs again finds nothing of what was outside, so it must not have found it the first time."""
    shelf, x = Shelf(), torch.randn(3, 4)
    outside = Held(Ticket(lambda leaf: leaf), (x,))
    shelf.offer(x, outside)
    with torch.autograd.graph.saved_tensors_hooks(lambda leaf: leaf, lambda leaf: leaf):
        assert shelf.find(x) is None
        inside = Held(Ticket(lambda leaf: leaf), (x,))
        shelf.offer(x, inside)
        assert shelf.find(x) is inside
    assert shelf.find(x) is outside
