"""An adapter on the experts of the tiny gpt-oss (PEFT's `target_parameters`) with q_proj beside it: factors, the loss of all
rows, and gradients behind `grad.`.

usage: gpt_oss_adapter.py OUT_DIR          reads the model that tiny_gpt_oss.py made there
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quant

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def main(out):
    torch.set_num_threads(1)
    folder = f"{out}/gpt_oss"
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32, attn_implementation="eager")
    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj"], target_parameters=PARAMETERS)
    model = get_peft_model(model, config).eval()
    trained = {name: own for name, own in model.named_parameters() if own.requires_grad}
    with torch.no_grad():
        for name, own in trained.items():
            own.copy_(quant.tensor(own.shape, sum((i + 1) * ord(c) for i, c in enumerate(name)), 0.1))
    ids = load_file(f"{folder}/expected.safetensors")["ids"].long()
    logits = model(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    short = {name: name.replace("base_model.model.", "").replace(".default", "") for name in trained}
    kept = {short[name]: own.detach().clone() for name, own in trained.items()}
    kept |= {"grad." + short[name]: own.grad for name, own in trained.items()}
    save_file(kept, f"{folder}/adapter.safetensors", {"loss": repr(loss.item()), "scale": "2.0"})


if __name__ == "__main__":
    main(*sys.argv[1:])
