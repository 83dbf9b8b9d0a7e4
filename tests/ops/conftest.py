"""What the operators' tests share: holders, gradients against naive code."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from gradlite.hold.codec import EXACT, INT4, INT8, Codec
from gradlite.hold.holder import Holder
from gradlite.hold.noise import Noise
from gradlite.hold.shelf import Shelf


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


@pytest.fixture
def holder() -> Callable[..., Holder]:
    """A new holder: ``holder()`` keeps exact tensors, ``holder(INT8)`` codes."""
    return lambda codec=EXACT: Holder(codec, Noise(0), Shelf())


@pytest.fixture(params=[EXACT, INT8, INT4], ids=lambda codec: codec.name)
def codec(request: pytest.FixtureRequest) -> Codec:
    """Every codec in turn."""
    found: Codec = request.param
    return found


def _gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
    value = function(*inputs)
    probe = torch.randn(value.shape, generator=torch.Generator().manual_seed(5)).to(value.dtype)
    wanted = [one for one in inputs if one is not None and one.requires_grad]
    return value.detach(), list(torch.autograd.grad((value * probe).sum(), wanted))


@pytest.fixture
def same() -> Callable[..., None]:
    """``same(operator, naive, inputs)``: equal values and gradients of all inputs that ask for one, to 1e-10."""

    def check(operator: Callable[..., Tensor], naive: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> None:
        value, gradients = _gradients(operator, inputs)
        wanted, wanted_gradients = _gradients(naive, inputs)
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-10)
        for found, exact in zip(gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)

    return check


@pytest.fixture
def close() -> Callable[..., None]:
    """``close(operator, naive, inputs)``: the same value, and gradients of cosine above 0.999 but not the same ones."""

    def check(
        operator: Callable[..., Tensor], naive: Callable[..., Tensor], inputs: Sequence[Tensor | None], least: float = 0.999
    ) -> None:
        value, gradients = _gradients(operator, inputs)
        wanted, wanted_gradients = _gradients(naive, inputs)
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-10)
        found, exact = (torch.cat([g.flatten() for g in each]) for each in (gradients, wanted_gradients))
        assert torch.cosine_similarity(found, exact, dim=0) > least
        assert not torch.allclose(found, exact, rtol=1e-6)

    return check
