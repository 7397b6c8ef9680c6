"""crates/lora-io/tests/golden/gguf/names.json: llama.cpp's names of the layers that adapters go on, by architecture.

From the tables of the gguf package, 0.19.0 or later (those of requirements.txt lack architectures). A layer that an
architecture has no name for is left out.
"""

import json
from pathlib import Path

import gguf
from gguf.constants import MODEL_ARCH_NAMES

FILE = Path(__file__).resolve().parents[2] / "crates" / "lora-io" / "tests" / "golden" / "gguf" / "names.json"
# transformers' `model_type`, llama.cpp's architecture, and what differs from the usual seven layers.
PLAIN = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"]
GATED = ["mlp.gate_proj", "mlp.up_proj"]
FAMILIES = {
    "llama": ("llama", GATED),
    "mistral": ("llama", GATED),
    "ministral": ("llama", GATED),
    "ministral3": ("mistral3", GATED),
    "qwen2": ("qwen2", GATED),
    "qwen3": ("qwen3", GATED),
    "qwen3_moe": ("qwen3moe", ["mlp.gate"]),
    "smollm3": ("smollm3", GATED),
    "gemma": ("gemma", GATED),
    "gemma2": ("gemma2", GATED),
    "gemma3_text": ("gemma3", GATED),
    "gemma4_text": ("gemma4", [*GATED, "per_layer_input_gate", "per_layer_projection"]),
    "phi3": ("phi3", ["self_attn.qkv_proj", "mlp.gate_up_proj"]),
    "olmo2": ("olmo2", GATED),
    "olmo3": ("olmo2", GATED),
    "granite": ("granite", GATED),
    "glm": ("chatglm", ["mlp.gate_up_proj"]),
    "glm4": ("glm4", ["mlp.gate_up_proj"]),
    "seed_oss": ("seed_oss", GATED),
    "gpt_oss": ("gpt-oss", []),
}


def main():
    by_name = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}
    expected = {}
    for kind, (name, more) in FAMILIES.items():
        names = gguf.get_tensor_name_map(by_name[name], 12)
        layers = [f"model.layers.11.{layer}" for layer in [*PLAIN, *more]] + ["model.embed_tokens", "lm_head"]
        found = {layer: names.get_name(layer) for layer in layers}
        expected[kind] = {"architecture": name, "names": {layer: own for layer, own in found.items() if own}}
    FILE.write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
