"""What GaLore's, Fira's and APOLLO's packages have in common: AdamW whose state holds a projector object for each weight.

The packages' optimizers are used as they are. Their ``state_dict`` holds those objects, which ``torch.load(weights_only=True)``
refuses and which torch's ``load_state_dict`` would not restore; here the projectors are saved as plain values beside it.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from gradlite.methods.method import Method, linear_weights, without

ProjectionSide = Literal["std", "reverse_std", "right", "left"]
"""Which side of a gradient is projected: ``std`` the shorter one, ``reverse_std`` the longer one."""

Scale = Annotated[float, Field(gt=0)]


def projected_groups(
    model: nn.Module, target_modules: list[str], weight_decay: float, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """The param groups of all three packages: everything else first, then the projected weights with their settings.

    As in the authors' scripts, ``weight_decay`` is for all parameters alike.
    """
    projected = linear_weights(model, target_modules)
    others = without(model, projected)
    groups = [{"params": others}, {"params": projected, **settings}]
    return [{**group, "weight_decay": weight_decay} for group in groups if group["params"]]


class ProjectedAdamW(Method):
    """An optimizer with ``state[weight]["projector"]``, an instance of ``projector`` whose attributes are plain values."""

    def __init__(
        self, name: str, model: nn.Module, optimizer: Optimizer, projector: Callable[[int], Any], *, checkpointing: bool
    ) -> None:
        super().__init__(name, model, optimizer, checkpointing=checkpointing)
        self._projector = projector

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        kept, projectors = {}, {}
        for index, state in saved["optimizer"]["state"].items():
            kept[index] = {key: value for key, value in state.items() if key != "projector"}
            if "projector" in state:
                projectors[index] = dict(vars(state["projector"]))
        return {**saved, "optimizer": {**saved["optimizer"], "state": kept}, "projectors": projectors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        weights = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, attributes in state["projectors"].items():
            projector, device = self._projector(attributes["rank"]), weights[index].device
            for key, value in attributes.items():
                setattr(projector, key, value.to(device) if isinstance(value, Tensor) else value)
            self.optimizer.state[weights[index]]["projector"] = projector
