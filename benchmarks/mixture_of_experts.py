"""Saves a small mixture of experts with random weights, to be compared with `gradlite compare`.

    python benchmarks/mixture_of_experts.py qwen-moe-small
    gradlite compare --preset paper-small --tables 1 --model qwen-moe-small --dataset DOLLY --steps 12 --seeds 0 \
        --methods 'AdamW + checkpointing,GradLite (int8),GradLite (recompute)'

118 million parameters in the shape of Qwen2-MoE, 69 million of them in 8 × 16 experts, with SmolLM2's tokenizer. The records
are in benchmarks/results/mixture-of-experts: of stacked experts in coordinates, and of the code before (three steps).
"""

import argparse
from pathlib import Path

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from gradlite.train.models import load_model_and_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    _, tokenizer = load_model_and_tokenizer("smollm2", "float32")
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=352,
        shared_expert_intermediate_size=1408,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    Qwen2MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder} holds the model")


if __name__ == "__main__":
    main()
