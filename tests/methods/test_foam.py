"""FOAM against its paper's equations, written with the matrices A and E themselves."""

import pytest
import torch
from torch import Tensor

from gradlite.errors import GradLiteError
from gradlite.methods import build
from gradlite.methods.foam import Foam, fold, unfold


def mean_matrix(width: int, level: int) -> Tensor:
    """``A`` (width × blocks): each column averages one block of ``2^level`` rows; a short last block averages its own."""
    block = 2**level
    matrix = torch.zeros(width, -(-width // block), dtype=torch.float64)
    for row in range(width):
        matrix[row, row // block] = 1.0
    return matrix / matrix.sum(0)


@pytest.mark.parametrize(("width", "level"), [(16, 0), (16, 2), (16, 4), (13, 2), (6, 8)])
def test_foam_follows_the_equations(width: int, level: int) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, width, dtype=torch.float64))
    expected, beta1, beta2, eps, lr, scale, decay = weight.detach().clone(), 0.8, 0.95, 1e-6, 0.1, 0.25, 0.01
    optimizer = Foam([{"params": [weight], "level": level, "scale": scale}], lr, (beta1, beta2), eps, decay)
    means = mean_matrix(width, level)
    repeat = (means.T > 0).double()
    exp_avg = exp_avg_sq = torch.zeros(5, means.shape[1], dtype=torch.float64)
    for step in range(1, 5):
        gradient = torch.randn(5, width, dtype=torch.float64)
        weight.grad = gradient.clone()
        optimizer.step()
        folded = gradient @ means
        exp_avg = beta1 * exp_avg + (1 - beta1) * folded
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * folded**2
        residual = gradient - folded @ repeat
        direction = (exp_avg @ repeat + residual) / ((exp_avg_sq @ repeat + residual**2).sqrt() + eps)
        correction = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        expected = (1 - lr * decay) * expected - lr * scale * correction * direction
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)
    assert optimizer.state[weight]["exp_avg"].shape == (5, means.shape[1])


def test_folding_is_the_mean_of_blocks_and_back() -> None:
    row = torch.tensor([[1.0, 3.0, 5.0, 7.0, 6.0]])
    assert fold(row, 1).tolist() == [[2.0, 6.0, 6.0]]
    assert unfold(fold(row, 1), 5, 1).tolist() == [[2.0, 2.0, 6.0, 6.0, 6.0]]
    assert fold(torch.ones(2, 576), 8).tolist() == [[1.0, 1.0, 1.0]] * 2
    assert fold(torch.ones(2, 100), 8).tolist() == [[1.0]] * 2


class Narrow(torch.nn.Module):
    """Layers of 8 and 12 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.Linear(8, 12)
        self.attn = torch.nn.Linear(12, 8)


def test_a_level_whose_blocks_no_layer_could_fill_is_refused() -> None:
    build("foam", Narrow(), lr=1e-3, level=3)
    for level in (4, 99):
        with pytest.raises(GradLiteError, match=rf"level is {level}, .* has 12 columns; give a level of at most 3\.$"):
            build("foam", Narrow(), lr=1e-3, level=level)


def test_level_zero_has_no_residual_and_is_adamw_scaled() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = Foam([{"params": [weight], "level": 0, "scale": 0.5}], 0.1, (0.9, 0.999), 1e-8, 0.0)
    weight.grad = torch.full((3, 4), 2.0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3, 4), 0.95))
