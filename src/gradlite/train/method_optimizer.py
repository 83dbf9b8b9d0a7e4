"""A method in the place of the optimizer that transformers' Trainer steps, schedules, saves and loads."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from gradlite.methods.method import Method


class MethodOptimizer(Optimizer):
    """The param groups are those of the method's optimizer itself, so that a scheduler moves its learning rates."""

    def __init__(self, method: Method) -> None:
        self.method = method
        super().__init__(method.optimizer.param_groups, method.optimizer.defaults)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of the method; whatever the backward pass left."""
        self.method.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The method's own."""
        self.method.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The method's state."""
        return self.method.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the method's state; torch's loaders replace the param groups, so they are taken over anew."""
        self.method.load_state_dict(state_dict)
        self.param_groups = self.method.optimizer.param_groups
