"""Twins for models with PEFT's LoRA: layers that keep their input only, MLPs that run a few tokens at a time.

They stand before PEFT's own classes, whose ``forward`` still runs where something unusual is asked for (several adapters,
merged or switched-off ones): PEFT knows, and autograd differentiates that exactly. PEFT itself is not imported here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradlite.attaching.recognise import GatedLayout, gated_forward
from gradlite.errors import GradLiteError
from gradlite.hold.compiled import kernel
from gradlite.hold.holder import Holder
from gradlite.ops.frozen_weight import DenseWeight, FourBitWeight, FrozenWeight, four_bit_codes, frozen_linear
from gradlite.ops.gated_mlp import gated, gated_value
from gradlite.ops.lora import LoraKind, dora_scale, lora_linear
from gradlite.ops.token_tiles import TokenWise, tiled_over_tokens

_CODES, _SCALES = "gradlite_codes", "gradlite_scales"


class TwinLoraLinear(nn.Module):
    """PEFT's ``lora.Linear`` over a frozen ``nn.Linear``, with one adapter.

    ``gradlite_kind``: the adapter's name, and whether ``h`` waits for backward.
    """

    gradlite_kind: tuple[str, bool]
    gradlite_holder: Holder
    gradlite_needs_value = True

    @torch.compiler.disable
    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """As PEFT's."""
        layer: Any = self
        name, keeps_h = self.gradlite_kind
        is_usual = list(layer.active_adapters) == [name] and not layer.merged and not layer.disable_adapters
        if not is_usual or arguments or any(value is not None for value in keywords.values()):
            return super().forward(x, *arguments, **keywords)
        base, a, b, scale = layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        dropout = layer.lora_dropout[name]
        probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        weight = frozen_weight(base)
        bias_M = base.bias
        if b.bias is not None:
            bias_M = scale * b.bias if bias_M is None else bias_M + scale * b.bias
        scale_M = None
        if name in layer.lora_magnitude_vector:
            scale_M = dora_scale(weight, a.weight, b.weight, layer.lora_magnitude_vector[name].weight, scale)
        return lora_linear(
            x,
            weight,
            bias_M,
            a.weight,
            b.weight,
            LoraKind(scale, probability, keeps_h),
            self.gradlite_holder,
            scale_M=scale_M,
            needs_value=self.gradlite_needs_value,
        )

    @contextmanager
    def without_value(self) -> Iterator[None]:
        """For a replay that only goes on backwards from this layer: its product is not made."""
        self.gradlite_needs_value = False
        try:
            yield
        finally:
            del self.gradlite_needs_value


class TwinTiledMLP(nn.Module):
    """A gated MLP of which a few tokens exist at a time, in the forward pass and in backward."""

    gradlite_kind: GatedLayout
    gradlite_holder: Holder

    @torch.compiler.disable
    def forward(self, *arguments: Tensor, **keywords: Tensor) -> Tensor:
        """As the module's own, which runs where no gradient is asked for."""
        if not torch.is_grad_enabled():
            return super().forward(*arguments, **keywords)
        (x,) = (*arguments, *keywords.values())
        layout, down = self.gradlite_kind, getattr(self, self.gradlite_kind.down)
        is_random = any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in self.modules())

        def value(x_tN: Tensor) -> Tensor:
            with torch.no_grad():
                return gated_forward(self, layout, x_tN, kernel(gated_value, layout.kind))

        def replay(x_tN: Tensor) -> Tensor:
            def product(gate: Tensor, up: Tensor) -> Tensor:
                return gated(gate, up, layout.kind, self.gradlite_holder)

            if not isinstance(down, TwinLoraLinear):
                return gated_forward(self, layout, x_tN, product)
            with down.without_value():
                return gated_forward(self, layout, x_tN, product)

        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return tiled_over_tokens(x, TokenWise(value, replay, parameters, is_random), self.gradlite_holder)


class TwinFourBitLinear(nn.Module):
    """A frozen ``nn.Linear`` whose weight is kept in four bits; it has no ``weight``, but two buffers."""

    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """Asked for by PEFT where it merges the adapter."""
        raise GradLiteError(
            "this layer's weight is in four bits (structured_lora's base='int4'); "
            "call gradlite.undo_structured_lora(peft_model) first, which gives it back, rounded."
        )

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear.forward``."""
        return frozen_linear(x, frozen_weight(self), self.bias)


def frozen_weight(linear: nn.Module) -> FrozenWeight:
    """The weight of a frozen linear layer, however it is kept."""
    if isinstance(linear, TwinFourBitLinear):
        return FourBitWeight(linear.get_buffer(_CODES), linear.get_buffer(_SCALES))
    return DenseWeight(linear.get_parameter("weight"))


def keep_in_four_bits(linear: nn.Linear) -> None:
    """Puts codes in the place of the weight; the caller changes the class."""
    codes_MH, scales_MG = four_bit_codes(linear.weight)
    del linear.weight
    linear.register_buffer(_CODES, codes_MH)
    linear.register_buffer(_SCALES, scales_MG)


def give_weight_back(linear: nn.Module, dtype: torch.dtype) -> None:
    """Undoes :func:`keep_in_four_bits`, as far as it can be undone: the weight stays rounded."""
    weight = frozen_weight(linear)
    assert isinstance(weight, FourBitWeight)
    dense_MN = weight.rows(slice(None), dtype)
    for name in (_CODES, _SCALES):
        delattr(linear, name)
    linear._parameters["weight"] = nn.Parameter(dense_MN, requires_grad=False)  # register_parameter would look at the twin's
