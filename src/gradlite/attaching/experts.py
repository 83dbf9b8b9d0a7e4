"""Which modules of a model are stacked experts that can be trained in coordinates: both of their weights, or neither."""

from collections.abc import MutableMapping

from torch import nn

from gradlite.attaching.coverage import Kind
from gradlite.attaching.recognise import EXPERT_WEIGHTS, experts_kind
from gradlite.ops.activation import ActivationKind

Decision = tuple[Kind, str]
"""What becomes of a parameter, and why."""


def stacked_experts(model: nn.Module) -> dict[int, ActivationKind]:
    """The activation of every module of stacked experts, by the module's id."""
    found = ((id(module), experts_kind(module)) for module in model.modules())
    return {place: kind for place, kind in found if kind is not None}


def keep_pairs(
    model: nn.Module, experts: MutableMapping[int, ActivationKind], decisions: MutableMapping[int, Decision]
) -> None:
    """Takes out the experts of which not both weights are to be projected, and makes a single one plain."""
    for module in model.modules():
        if id(module) not in experts:
            continue
        pair = [id(module._parameters[name]) for name in EXPERT_WEIGHTS]
        projected = [place for place in pair if decisions[place][0] == "projected"]
        if len(projected) < len(pair):
            del experts[id(module)]
        if len(projected) == 1:
            decisions[projected[0]] = ("plain", "stacked experts whose other weight is not projected")
