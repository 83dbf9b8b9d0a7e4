"""PEFT's LoRA with exact gradients in little memory: every block is replayed from its input, with the operators of ``ops``.

The body of the model is frozen, so a linear layer's backward pass needs its input only where the adapter does, and every
input is something that a norm, the attention or the MLP holds anyway. Source: MeSP, arXiv 2602.13069.
"""

from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gradlite.attaching.attachment import attachment_of
from gradlite.attaching.attention import FRUGAL
from gradlite.attaching.blocks import Chain, named_blocks
from gradlite.attaching.holding import Hold, HoldPlan
from gradlite.attaching.lora_twins import give_weight_back, keep_in_four_bits
from gradlite.attaching.names import CHAIN
from gradlite.attaching.operators import Operator, Operators, give_back, recognise, take_over
from gradlite.attaching.recognise import is_linear
from gradlite.attaching.twins import become_itself, become_recognised, refuse_twins
from gradlite.errors import GradLiteError
from gradlite.hold.noise import Noise

Model = TypeVar("Model", bound=nn.Module)
Base = Literal["as it is", "int4"]
Inputs = Literal["every block", "every second"]

_ATTRIBUTE = "_gradlite_structured_lora"


class StructuredLora:
    """What :func:`structured_lora` left on a model."""

    def __init__(self, operators: Operators) -> None:
        self.operators = operators
        self.chain = Chain()
        self.layers: list[nn.Module] = []
        self.four_bit: list[tuple[nn.Module, torch.dtype]] = []
        self.marked: list[nn.Module] = []
        self.hooks: list[RemovableHandle] = []


def structured_lora(
    peft_model: Model,
    hold: Hold = "recompute",
    *,
    base: Literal["as it is", "int4"] = "as it is",
    store_h: bool = False,
    inputs: Inputs = "every block",
    seed: int = 0,
) -> Model:
    """Gives a PEFT LoRA model backward passes that keep little, in place; returns it. Gradients equal PEFT's.

    Names, parameters, ``state_dict()`` and what PEFT saves are untouched (but for frozen weights in four bits, which become
    codes); called again, it replaces its earlier work. At any
    time at most one block's intermediates live: a block is replayed from its input, its MLP a few tokens at a time (all at once
    where the adapter drops out, so that the random numbers are PEFT's). The loss comes in tiles of the vocabulary, as from
    :func:`gradlite.attach`: with ``labels`` the result has no logits. Layers with another kind of adapter keep PEFT's own code.

    Args:
        peft_model: ``peft.get_peft_model(model, LoraConfig(…))``: any ranks, alphas, rsLoRA, dropout, ``lora_bias``; DoRA
            without dropout. hold: how tensors wait for backward; see :func:`gradlite.attach`.
        base: ``"int4"`` keeps the frozen linear layers of the blocks in four bits (groups of 64, 0.53 bytes a parameter),
            decoded a few rows at a time in forward and backward. Their weights are rounded by it, for good.
        store_h: ``h = xAᵀ`` waits for backward as well, instead of being computed again.
        inputs: ``"every second"`` replayed block's input is kept and the block before it makes the others anew: half of what is
            by far the largest part of the memory, for half a forward pass of the blocks. seed: of lossy ways of holding.

    Raises:
        GradLiteError: no PEFT model, another tuner, merged or several adapters, trainable base weights, variants of LoRA
            with other formulas.
    """
    plan = HoldPlan(hold)
    _check_options(base, store_h, inputs, plan, seed)
    model, name = _checked(peft_model)
    undo_structured_lora(peft_model)
    refuse_twins(peft_model)
    layers = _lora_layers(model, name)
    operators = Operators(plan, seed)
    _recognise(model, operators)
    if inputs == "every second" and not any(operator.role == "block" for operator in operators.found):
        raise GradLiteError(
            f"inputs='every second' is for blocks that are computed again, and with hold={hold!r} none is; leave one out."
        )
    bases = _bases_for_four_bits(model) if base == "int4" else []
    operators.plan.check_used([each for each, _ in layers], [block for block, _ in named_blocks(model)])
    structured = StructuredLora(operators)
    take_over(operators)
    for operator in operators.found:
        if operator.role == "attention":  # at the peak every other tensor is small
            setattr(operator.module, FRUGAL, True)
        elif operator.role == "block" and inputs == "every second":
            setattr(operator.module, CHAIN, structured.chain)
    for each, layer in layers:
        become_recognised(layer, "lora", (name, store_h), operators.holder(operators.plan.mode_of(each)))
        structured.layers.append(layer)
    if base == "int4":
        _keep_in_four_bits(bases, structured)
        object.__setattr__(model, "save_pretrained", _refuse_to_save)
    for module in {id(one): one for one in (peft_model, model)}.values():  # PEFT calls the inner one's forward, not the module
        structured.hooks.append(module.register_forward_hook(_clear_shelf, always_call=True))
        object.__setattr__(module, _ATTRIBUTE, structured)
        structured.marked.append(module)
    return peft_model


def undo_structured_lora(peft_model: Model) -> Model:
    """Gives the model its own classes back; returns it. Nothing happens if it is not structured.

    Bit-identical, but for weights that were rounded to four bits: those come back in their former dtype, rounded.
    """
    structured: StructuredLora | None = getattr(peft_model, _ATTRIBUTE, None)
    if structured is None:
        return peft_model
    model = _inner(peft_model)
    for handle in structured.hooks:
        handle.remove()
    for linear, dtype in structured.four_bit:
        give_weight_back(linear, dtype)
        become_itself(linear)
    model.__dict__.pop("save_pretrained", None)
    for layer in structured.layers:
        become_itself(layer)
    give_back(structured.operators)
    for module in structured.marked:
        object.__delattr__(module, _ATTRIBUTE)
    return peft_model


def noise_of(peft_model: Model) -> Noise:
    """The numbers that round what a lossy way of holding keeps: their position is what a resumed run needs."""
    structured: StructuredLora = getattr(peft_model, _ATTRIBUTE)
    return structured.operators.noise


def _check_options(base: object, store_h: object, inputs: object, plan: HoldPlan, seed: object) -> None:
    choices = {"base": (base, get_args(Base)), "inputs": (inputs, get_args(Inputs)), "store_h": (store_h, (True, False))}
    for option, (value, known) in choices.items():
        if value not in known:
            raise GradLiteError(f"structured_lora's {option} is {value!r}, but it must be {' or '.join(map(repr, known))}.")
    if plan.names("projected"):
        raise GradLiteError("hold='projected' is for weights that train, and these are frozen; choose another way of holding.")
    if not isinstance(seed, int):
        raise GradLiteError(f"structured_lora's seed is {seed!r}, but it must be a whole number.")


def _refuse_to_save(*_arguments: Any, **_keywords: Any) -> None:
    raise GradLiteError(
        "the model's weights are in four bits (structured_lora's base='int4'); "
        "call gradlite.undo_structured_lora(peft_model) before saving the model itself. The adapter is saved by the PEFT model."
    )


def _clear_shelf(model: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
    structured: StructuredLora | None = getattr(model, _ATTRIBUTE, None)
    if structured is not None:
        structured.operators.clear_shelf()
        structured.chain.clear()


def _inner(peft_model: Any) -> nn.Module:
    """The Hugging Face model inside PEFT's wrappers."""
    model = peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model
    assert isinstance(model, nn.Module)
    return model


def _checked(peft_model: Any) -> tuple[nn.Module, str]:
    """The model inside, and its adapter's name."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise GradLiteError("structured_lora needs PEFT; run `pip install peft`.") from error
    if not isinstance(peft_model, PeftModel):
        raise GradLiteError(
            f"structured_lora takes a PEFT model, not {type(peft_model).__name__}; "
            "make one with peft.get_peft_model(model, peft.LoraConfig(…))."
        )
    model, active = _inner(peft_model), list(peft_model.active_adapters)
    if len(active) != 1:
        raise GradLiteError(f"structured_lora trains one adapter, but {active} are active; call set_adapter with one name.")
    kind = peft_model.peft_config[active[0]].peft_type
    if kind != "LORA":
        raise GradLiteError(
            f"structured_lora knows LoRA, and the adapter {active[0]!r} is {getattr(kind, 'value', kind)}; "
            "train it with PEFT alone (gradlite's methods lora, dora, ia3)."
        )
    if attachment_of(model) is not None:
        raise GradLiteError("the model inside the adapter is attached to GradLite; call gradlite.detach(model) first.")
    switch = "is_activation_checkpointing"  # its name from some release of transformers 5 on
    if getattr(model, switch if hasattr(model, switch) else "is_gradient_checkpointing", False):
        raise GradLiteError(
            "transformers' gradient checkpointing is on, and structured_lora replays the blocks itself; "
            "call gradient_checkpointing_disable() first."
        )
    return model, active[0]


def _lora_layers(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Names and modules of the layers that become twins."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.variants import DoraLinearVariant

    found: list[tuple[str, nn.Module]] = []
    for each, layer in model.named_modules():
        if not isinstance(layer, Linear) or name not in layer.lora_A or not is_linear(layer.get_base_layer()):
            continue  # PEFT's own code and autograd are as exact there
        if layer.merged:
            raise GradLiteError(f"the adapter of {each} is merged into its weight; call unmerge_adapter() first.")
        if layer.get_base_layer().weight.requires_grad:
            raise GradLiteError(
                f"{each}.base_layer.weight is trainable, and structured_lora makes no gradient for it; "
                "freeze it (requires_grad_(False)), or train all weights with gradlite.GradLite."
            )
        variant = layer.lora_variant.get(name)
        if variant is not None and not isinstance(variant, DoraLinearVariant):
            raise GradLiteError(
                f"{each} uses PEFT's {type(variant).__name__}, whose formula structured_lora does not know; "
                "choose plain LoRA, rsLoRA or DoRA, or train it with PEFT alone."
            )
        dropout = layer.lora_dropout[name]
        has_dropout = isinstance(dropout, nn.Dropout) and dropout.p > 0
        if variant is not None and (has_dropout or layer.lora_bias[name]):
            option = "dropout" if has_dropout else "lora_bias"
            raise GradLiteError(
                f"{each} uses DoRA with {option}, which structured_lora has no exact formula for; set lora_dropout=0 and "
                "lora_bias=False, or train it with PEFT alone."
            )
        found.append((each, layer))
    if not found:
        raise GradLiteError(
            f"{type(model).__name__} has no linear layer with the LoRA adapter {name!r} over an unquantised nn.Linear; "
            "choose target_modules such as q_proj, v_proj in LoraConfig."
        )
    return found


def _recognise(model: nn.Module, operators: Operators) -> None:
    """As :func:`recognise`, with dropout off while modules are tried; MLPs inside replayed blocks are to run in tiles."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        recognise(model, operators, {})
    finally:
        for module in training:
            module.training = True
    operators.found = [
        Operator(one.name, "tiled_gated", one.module, one.kind, one.mode)
        if one.role == "gated" and one.mode.boundary is not None
        else one
        for one in operators.found
    ]


def _bases_for_four_bits(model: nn.Module) -> list[nn.Linear]:
    """The frozen linear layers of the blocks, adapters left out. Raises GradLiteError where there is none, or one cannot."""
    wrappers = [module for module in model.modules() if isinstance(getattr(module, "base_layer", None), nn.Module)]
    adapters = {id(part) for wrapper in wrappers for part in wrapper.modules()} - {id(one.base_layer) for one in wrappers}
    found = {}
    for prefix, block in named_blocks(model):
        for name, module in block.named_modules():
            if is_linear(module) and id(module) not in adapters and not module.get_parameter("weight").requires_grad:
                assert isinstance(module, nn.Linear)
                if module.in_features % 2:
                    width = f"its width {module.in_features} is odd"
                    raise GradLiteError(f"{prefix}.{name} cannot be kept in four bits: {width}; leave out base='int4'.")
                found[id(module)] = module
    if not found:
        raise GradLiteError(f"{type(model).__name__} has no frozen linear layer to keep in four bits; leave out base='int4'.")
    return list(found.values())


def _keep_in_four_bits(linears: list[nn.Linear], structured: StructuredLora) -> None:
    holder = structured.operators.holder(structured.operators.plan.mode_of(""))
    for linear in linears:
        structured.four_bit.append((linear, linear.weight.dtype))
        keep_in_four_bits(linear)
        become_recognised(linear, "four_bit", None, holder)
