"""Backward-friendly twins of nn.Linear and nn.Embedding.

A module becomes its twin by a change of class, not by replacement: it stays the same object with the same parameters, names
and hooks, ``isinstance`` holds, and changing the class back undoes it. The twin's class stands *behind* the module's own in
the method resolution order, so that a subclass whose ``forward`` calls ``super().forward`` (a scaled embedding, say) reaches
the subspace operator.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradlite.ops.embedding import subspace_embedding
from gradlite.ops.linear import subspace_linear
from gradlite.subspace.collector import Collector, Coordinates

COORDINATES = "gradlite_coordinates"
RESIDUAL_NORM = "gradlite_residual_norm"


class _TwinState(nn.Module):
    """Keeps the coordinates out of files, and without storage when the module moves."""

    gradlite_collector: Collector

    @contextmanager
    def _coordinates_hidden(self) -> Iterator[None]:
        parameters = dict(self._parameters)
        for name in (COORDINATES, RESIDUAL_NORM):
            self._parameters.pop(name, None)
        try:
            yield
        finally:
            hidden = {name: parameters[name] for name in (COORDINATES, RESIDUAL_NORM) if name in parameters}
            self._parameters.update(hidden)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._coordinates_hidden():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._coordinates_hidden():
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        for parameter in self._parameters.values():
            if isinstance(parameter, Coordinates):
                parameter.drop_storage()
        self.gradlite_collector.move(fn)
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The twin's class is made on demand and has no importable name: copies and pickles make it again from the own class.
        return _blank_twin, (type(self).gradlite_own_class,), self.__dict__  # type: ignore[attr-defined]


class TwinLinear(nn.Linear):
    """``nn.Linear`` whose weight's gradient is absorbed as coordinates."""

    gradlite_collector: Collector
    gradlite_coordinates: Coordinates

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear.forward``. A compiled model calls it as it is: backward keeps state that graphs must not cache."""
        self.gradlite_collector.reads(input)
        return subspace_linear(input, self.weight, self.bias, self.gradlite_coordinates, self.gradlite_collector)


class TwinEmbedding(nn.Embedding):
    """``nn.Embedding`` whose weight's gradient is absorbed as coordinates."""

    gradlite_collector: Collector
    gradlite_coordinates: Coordinates

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Embedding.forward``."""
        self.gradlite_collector.window.open_if_cleared()
        return subspace_embedding(input, self.weight, self.gradlite_coordinates, self.padding_idx, self.gradlite_collector)


_TWIN_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _twin_class(own: type[nn.Module]) -> type[nn.Module]:
    if own not in _TWIN_CLASSES:
        twin: type[nn.Module] = TwinLinear if issubclass(own, nn.Linear) else TwinEmbedding
        bases = (_TwinState, twin) if own in (nn.Linear, nn.Embedding) else (_TwinState, own, twin)
        _TWIN_CLASSES[own] = type(own.__name__, bases, {"gradlite_own_class": own})
    return _TWIN_CLASSES[own]


def _blank_twin(own: type[nn.Module]) -> nn.Module:
    twin = _twin_class(own)
    return twin.__new__(twin)


def is_twin(module: nn.Module) -> bool:
    """Whether the module has been turned into a twin."""
    return isinstance(module, _TwinState)


def can_become_twin(module: nn.Module) -> bool:
    """Linear layers, and embeddings whose gradient is the plain look-up's."""
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.sparse and not module.scale_grad_by_freq
    return isinstance(module, nn.Linear)


def become_twin(module: nn.Module, collector: Collector) -> None:
    """Changes the module's class and registers the coordinates on it."""
    module.__class__ = _twin_class(type(module))
    module.register_parameter(COORDINATES, collector.coordinates)
    module.gradlite_collector = collector  # type: ignore[assignment]


def become_itself(module: nn.Module) -> None:
    """Undoes :func:`become_twin`."""
    for name in (COORDINATES, RESIDUAL_NORM):
        module._parameters.pop(name, None)
    del module.gradlite_collector
    module.__class__ = module.gradlite_own_class  # type: ignore[assignment]
