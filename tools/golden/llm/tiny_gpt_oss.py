"""A tiny gpt-oss with bfloat16 weights, and the logits that transformers gives for them in float32.

usage: tiny_gpt_oss.py OUT_DIR
"""

import sys

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

ROPE = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}


def main(out):
    torch.set_num_threads(1)
    torch.manual_seed(11)
    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=6, num_local_experts=3, num_experts_per_tok=2,
        max_position_embeddings=64, vocab_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters=ROPE, tie_word_embeddings=False)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                values = 1 + 0.1 * torch.randn(weight.shape)
            elif "bias" in name or "sinks" in name:
                values = 0.5 * torch.randn(weight.shape)
            elif "embed" in name:
                values = 0.6 * torch.randn(weight.shape)
            else:
                values = torch.randn(weight.shape) / weight.shape[-2 if weight.ndim == 3 else -1] ** 0.5
            weight.copy_(values.to(torch.bfloat16))
        ids = torch.randint(3, 48, (2, 24))
        logits = model(ids).logits
    model.to(torch.bfloat16).save_pretrained(f"{out}/gpt_oss/model")
    save_file({"ids": ids.int(), "logits": logits.contiguous()}, f"{out}/gpt_oss/expected.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
