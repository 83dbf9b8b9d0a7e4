"""The cosine of MeZO's estimate with the true gradient, against dimension, beside chance level.

    python benchmarks/mezo_cosine.py --out benchmarks/results/mezo_cosine.jsonl [--rank 1,2,4,8,16,32] [--draws 400]

A random Llama of 2 layers in float32 with LoRA on its seven projections; the rank sets the number d of trained weights. A draw
is one step of ``gradlite.methods.mezo``'s estimate g·z, on the same batch. A direction z that knows nothing of the gradient has
a mean absolute cosine of sqrt(2/(πd)) with it; the estimate's sign is right, and so its mean cosine is that much.
"""

import argparse
import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from record import append, describe

import gradlite
from gradlite.methods.mezo import MeZOMethod, draw

WIDTH, HIDDEN, LAYERS, VOCABULARY = 128, 256, 2, 500
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(rank: int) -> Any:
    """The model with adapters that are no zeros."""
    import peft
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.05, use_cache=False,
    )  # fmt: skip
    with warnings.catch_warnings():  # PEFT asks transformers under a name that is on its way out
        warnings.simplefilter("ignore", FutureWarning)
        settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS)
        model = peft.get_peft_model(AutoModelForCausalLM.from_config(config), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def measure(rank: int, draws: int, epsilon: float) -> dict[str, Any]:
    """Cosines over all draws at one rank."""
    model = build(rank)
    ids = torch.randint(0, VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = torch.cat([parameter.grad.flatten() for parameter in trained])
    dimension = gradient.numel()
    method = gradlite.methods.build("mezo", model, lr=0.0, epsilon=epsilon)
    assert isinstance(method, MeZOMethod)
    cosines, ratios = [], []
    for _ in range(draws):
        method.zero_grad()
        method.backward(model(input_ids=ids, labels=ids).loss)
        projected = float(method.optimizer.projected.grad)  # type: ignore[arg-type]
        z = torch.cat([draw(method.optimizer, parameter).flatten() for parameter in trained])
        cosines.append(float(torch.cosine_similarity(projected * z, gradient, dim=0)))
        ratios.append(projected / float(z @ gradient))
        method.step()  # a learning rate of zero: the weights stay, the next seed comes
    return {
        "rank": rank,
        "dimension": dimension,
        "draws": draws,
        "epsilon": epsilon,
        "cosine_mean": statistics.fmean(cosines),
        "cosine_absolute_mean": statistics.fmean(map(abs, cosines)),
        "cosine_standard_error": statistics.stdev(cosines) / math.sqrt(draws),
        "chance_level": math.sqrt(2.0 / (math.pi * dimension)),
        "projected_over_true_slope_median": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", default="1,2,4,8,16,32")
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--epsilon", type=float, default=1e-3)
    arguments = parser.parse_args()
    for rank in arguments.rank.split(","):
        record = measure(int(rank), arguments.draws, arguments.epsilon)
        append(arguments.out, {**record, **describe()})
        print(record, flush=True)


if __name__ == "__main__":
    main()
