"""MeSP against MeBP: peak memory above the weights and step time of LoRA training, on Qwen2.5's shapes with random weights.

    python benchmarks/mesp.py --out benchmarks/results/mesp.jsonl [--shape 0.5b,1.5b,3b] [--length 256,512,1024]
        [--only METHOD,…] [--base int4] [--rounds 3]      (--rounds 0: memory only)

Batch 1, bfloat16, rank 8 on the seven projections with adapters in bfloat16, tied head. Every method is a process of its own
and one JSON line a shape and length; those of one shape and length are there at the same time and take turns, step by step.
Peaks are sums of live tensors, from the profiler's allocation events; block inputs in mapped files are not among the methods,
since those events count such files as memory. ``peak``: forward and backward of a whole step. ``body_peak``: the same without
the vocabulary head (its gradient is given). ``head_peak``: the head and its loss alone, from given hidden states. ``waiting``:
what the body holds between forward and backward. ``base``: the frozen weights. The ladder: eager; checkpointed (MeBP) with
Hugging Face's own loss and with the tiled one; structured storing h; structured (MeSP), and with every second block's input.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from live_tensors import peak_and_growth
from record import append, describe
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from turns import answer_turns, take_turns

from gradlite.attaching.structured_lora import structured_lora
from gradlite.methods.mebp import replay_blocks

SHAPES: dict[str, tuple[int, int, int, int, int]] = {  # layers, width, heads, key-value heads, MLP: Qwen2.5's configurations
    "0.5b": (24, 896, 14, 2, 4864),
    "1.5b": (28, 1536, 12, 2, 8960),
    "3b": (36, 2048, 16, 2, 11008),
}
VOCABULARY = 151_936
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = ("eager", "mebp", "mebp-tiled", "mesp-storing-h", "mesp", "mesp-every-second")


def build(method: str, shape: str, base: str) -> Any:
    """The model with its adapter, in training mode; the same weights for every method."""
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    layers, width, heads, kv_heads, hidden = SHAPES[shape]
    config = AutoConfig.for_model(
        "qwen2", hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=32_768,
        rms_norm_eps=1e-6, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with warnings.catch_warnings():  # PEFT asks transformers under a name that is on its way out
        warnings.simplefilter("ignore", FutureWarning)
        settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS)
        adapted = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    adapted.train()
    if method.startswith("mesp"):
        inputs = "every second" if method.endswith("every-second") else "every block"
        structured_lora(adapted, base=base, store_h=method.endswith("storing-h"), inputs=inputs)  # type: ignore[arg-type]
    elif method.startswith("mebp"):
        replay_blocks(adapted, "memory", "tiled" if "tiled" in method else "own")
    return adapted


def worker(method: str, shape: str, length: int, base: str) -> dict[str, Any]:
    """One cell's figures; makes a timed step for every line on the standard input."""
    model = build(method, shape, base)
    inner = model.get_base_model()
    ids = torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    width = SHAPES[shape][1]
    upstream = torch.randn(1, length, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    losses: list[float] = []

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad()
        losses.append(float(loss.detach()))

    def head() -> None:
        head_loss(inner, upstream.detach().requires_grad_(), ids).backward()

    step()  # compiles kernels
    peak, _ = peak_and_growth(step)
    head_peak, _ = peak_and_growth(head)
    ends: list[GradientEdge] = []  # not the last hidden states themselves: in a whole step the head lets go of them
    forward_peak, waiting = peak_and_growth(
        lambda: ends.append(get_gradient_edge(inner.model(input_ids=ids).last_hidden_state))
    )
    backward_peak, _ = peak_and_growth(lambda: torch.autograd.backward(ends, [upstream]))
    model.zero_grad()
    seconds = answer_turns(step)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "method": method,
        "shape": shape,
        "length": length,
        "base": base,
        "loss": round(losses[-1], 6),
        "step_seconds": seconds,
        "peak_bytes": peak,
        "body_peak_bytes": max(forward_peak, waiting + backward_peak),
        "head_peak_bytes": head_peak,
        "waiting_bytes": waiting,
        "adapter_gradient_bytes": sum(parameter.nbytes for parameter in trained),
        "base_bytes": base_bytes(model),
    }


def base_bytes(model: nn.Module) -> int:
    """Of everything that is not trained; codes and scales of four-bit weights are buffers."""
    tensors = [one for one in (*model.parameters(), *model.buffers()) if not one.requires_grad]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def head_loss(inner: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    """The model's own loss where that is not replaced, the tiled one otherwise."""
    from gradlite.attaching import tiles_its_loss
    from gradlite.attaching.causal_lm import causal_lm_loss

    if tiles_its_loss(inner):
        return causal_lm_loss(inner, hidden, ids)
    loss: Tensor = inner.loss_function(logits=inner.lm_head(hidden), labels=ids, vocab_size=VOCABULARY)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default=",".join(SHAPES))
    parser.add_argument("--length", default="256,512,1024")
    parser.add_argument("--only", default=",".join(METHODS))
    parser.add_argument("--base", default="as it is", choices=("as it is", "int4"), help="frozen weights of MeSP's blocks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    methods = arguments.only.split(",")
    wrong = next((method for method in methods if method not in METHODS), None)
    if wrong is not None:
        parser.error(f"--only names {wrong!r}; known are {', '.join(METHODS)}")
    if arguments.base == "int4" and not all(method.startswith("mesp") for method in methods):
        parser.error("--base int4 is for MeSP's methods; name them with --only")
    if arguments.worker:
        print(json.dumps(worker(arguments.only, arguments.shape, int(arguments.length), arguments.base)))
        return
    for shape in arguments.shape.split(","):
        for length in arguments.length.split(","):
            cell = ["--shape", shape, "--length", length, "--base", arguments.base]
            shared = [sys.executable, __file__, "--worker", "--out", "-", *cell, "--only"]
            for record in take_turns({method: [*shared, method] for method in methods}, arguments.rounds):
                append(arguments.out, {**record, **describe()})
                print(record, flush=True)


if __name__ == "__main__":
    main()
