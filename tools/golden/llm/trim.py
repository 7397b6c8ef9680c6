"""Picks what the tests of language models need out of the tiny models and their expected numbers.

usage: trim.py SOURCE TARGET

SOURCE has a folder a family (`llama3`, `gemma2` …), `gguf` and `tied`, as `tiny_llm2.py`, `tiny_gguf.py` and
`tiny_tied.py` make them.
Numbers are copied as they are, whole ones in 32 bits; the adapters at the start, whose numbers bfloat16 holds exactly, are
stored in it.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

KEPT = ["ids", "labels", "nll_per_token", "long.ids", "generation.prompt", "generation.new"]
STATES = ["logits_rows", "hidden_first_layer", "hidden_last"]
WITH_STATES = ["llama3", "gemma2", "phi3", "qwen3_moe", "olmo2", "gemma4"]
INFO = ["loss", "packing", "generation", "losses", "tokens_per_record", "training"]
GRADIENTS = ["llama3", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "smollm3", "phi3", "olmo2", "granite", "gemma4"]
TIED = ["embed_lora", "head_lora"]
GGUF = ["llama3.mixed.gguf", "qwen3.q8_0.gguf"]



def family(source, target):
    (target / "model").mkdir(parents=True, exist_ok=True)
    for file in sorted((source / "model").iterdir()):
        if file.name.startswith("model") or file.name.startswith("config"):
            shutil.copyfile(file, target / "model" / file.name)
    found = load_file(source / "expected.safetensors")
    expected = {name: found[name] for name in KEPT + (STATES if source.name in WITH_STATES else [])}
    expected["long.logits_last2"] = found["long.logits_last8"][:, -2:].contiguous()
    expected = {name: own.int() if own.dtype == torch.int64 else own for name, own in expected.items()}
    save_file(expected, target / "expected.safetensors")
    info = json.loads((source / "expected.json").read_text())
    (target / "expected.json").write_text(json.dumps({key: info[key] for key in INFO}, ensure_ascii=False) + "\n")
    if source.name in GRADIENTS:
        start = load_file(source / "lora_init.safetensors")
        half = {name: values.to(torch.bfloat16) for name, values in start.items()}
        assert all(torch.equal(half[name].float(), values) for name, values in start.items())
        save_file(half, target / "lora_init.safetensors")
        shutil.copyfile(source / "lora_grads_step1.safetensors", target / "lora_grads_step1.safetensors")


def tied(source, target):
    """An adapter on one end of a tied model: its factors, and their gradients behind `grad.`."""
    info = json.loads((source / "expected.json").read_text())
    for case in TIED:
        found = load_file(source / case / "adapter_model.safetensors")
        kept = {name: own.to(torch.bfloat16) for name, own in found.items() if "base_layer" not in name}
        assert all(torch.equal(own.float(), found[name]) for name, own in kept.items())
        gradients = load_file(source / case / "grads.safetensors")
        kept |= {"grad." + name.replace(".default", ""): own for name, own in gradients.items()}
        short = {name.replace("base_model.model.", ""): own for name, own in kept.items()}
        target.mkdir(exist_ok=True)
        save_file(short, target / f"{case}.safetensors", {"loss": repr(info[case]["loss"])})


def main(source, target):
    source, target = Path(source), Path(target)
    for folder in sorted(source.iterdir()):
        if (folder / "expected.safetensors").exists() and (folder / "model").exists():
            family(folder, target / folder.name)
    tied(source / "tied", target / "tied")
    (target / "gguf").mkdir(parents=True, exist_ok=True)
    for name in GGUF:
        shutil.copyfile(source / "gguf" / name, target / "gguf" / name)
    found = load_file(source / "gguf" / "expected.safetensors")
    wanted = {name for own in GGUF for name in (own.split(".")[0] + ".ids", own[: -len("gguf")] + "logits_last8")}
    save_file({name: found[name].int() if name.endswith("ids") else found[name] for name in wanted},
              target / "gguf" / "expected.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
