"""GradLite as a method: the optimizer that attaches to the model (:class:`gradlite.GradLite`)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from gradlite.attaching import detach
from gradlite.attaching.rank import layer_rank
from gradlite.methods.gradlite import GradLite, check_choices, check_numbers
from gradlite.methods.method import Method


def gradlite(model: nn.Module, lr: float, **options: Any) -> Method:
    """``options`` are those of :class:`gradlite.GradLite`, which raises GradLiteError for unknown or bad ones."""
    return AttachedMethod(model, GradLite(model, lr=lr, **options))


DECLARED = GradLite.__init__
"""Whose signature says which options :func:`gradlite` takes."""


def check_further(_: str, options: Mapping[str, Any]) -> None:
    """What the types of the options do not say. Raises GradLiteError for a number out of its range, and for a rank that no
    layer could have.
    """
    check_choices(**{key: value for key, value in options.items() if key in ("feedback", "basis")})
    check_numbers(**{key: value for key, value in options.items() if key in _NUMBERS})
    if "rank" in options:
        layer_rank(options["rank"], 1)


_NUMBERS = ("betas", "eps", "weight_decay", "refresh_interval")


class AttachedMethod(Method):
    """GradLite skips and counts steps itself, and holds activations its own way, so it takes no checkpointing."""

    optimizer: GradLite

    def __init__(self, model: nn.Module, optimizer: GradLite) -> None:
        super().__init__("gradlite", model, optimizer)

    def step(self) -> None:
        self.optimizer.step()
        self._count()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        super().zero_grad()

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self._count()

    def finish(self) -> nn.Module:
        return detach(super().finish())

    def state_bytes(self) -> dict[str, int]:
        counted = self.optimizer.state_bytes()
        gradients = counted.pop("gradients")
        del counted["weights"]
        return {"optimizer": sum(counted.values()), "gradients": gradients}

    def energy(self) -> dict[str, float]:
        return self.optimizer.energy()

    def _count(self) -> None:
        self.skipped_steps, self.skipped_in_a_row = self.optimizer.skipped_steps, self.optimizer.skipped_in_a_row
