"""A GGUF adapter in llama.cpp itself: what it does to the logits there and in PEFT.

Takes a LLaMA-type model in GGUF. PEFT trains nothing here: a random LoRA on all seven layers of each block is attached to
the model as transformers loads it, saved, converted by `lora convert --to gguf --base MODEL`, and given to llama.cpp. The
change of the last token's logits must point the same way in both: cosine above 0.98, length within 5%. (llama.cpp rounds
activations to 8 bits where weights are quantised, so the two are not equal.)
"""

import argparse
import subprocess
from pathlib import Path

import numpy as np
import torch
from llama_cpp import Llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = [1, 504, 3575, 282, 4649, 314, 253, 1343, 418, 1029]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lora", type=Path, help="the command")
    parser.add_argument("model", type=Path, help="a LLaMA-type model in GGUF")
    parser.add_argument("folder", type=Path, help="for the files made here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    folder, name = str(arguments.model.parent), arguments.model.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        before = model(tokens).logits[0, -1].numpy()
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS))
        for key, value in adapted.named_parameters():
            if "lora_B" in key:
                value.normal_(0, 0.15)
        theirs = adapted(tokens).logits[0, -1].numpy() - before
    adapted.save_pretrained(arguments.folder / "peft")
    out = arguments.folder / "adapter.gguf"
    command = [arguments.lora, "convert", arguments.folder / "peft", "--to", "gguf", "--base", arguments.model]
    subprocess.run([*command, "--out", out], check=True)

    def logits(**options):
        llama = Llama(str(arguments.model), n_ctx=64, logits_all=True, verbose=False, **options)
        llama.eval(TOKENS)
        return np.array(llama.scores[len(TOKENS) - 1])

    ours = logits(lora_path=str(out)) - logits()
    cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
    length = np.linalg.norm(ours) / np.linalg.norm(theirs)
    print(f"change of the logits: cosine {cosine:.4f}, length {length:.4f} of PEFT's")
    assert cosine > 0.98 and abs(length - 1) < 0.05


if __name__ == "__main__":
    main()
