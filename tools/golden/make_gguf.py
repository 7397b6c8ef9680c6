"""crates/lora-io/tests/golden/gguf: files of llama.cpp's format and what the reference reads out of them.

- types.gguf, types.safetensors: one tensor per element type and its values by gguf's own dequantisation. Plain types and
  the 32-element ones are quantised from normal values by gguf; of the 256-element ones, which it cannot make, the blocks
  are random bytes with small finite scales.
- quantised.safetensors: numbers and the bytes that gguf quantises them to. Some blocks are all zero, all the same, tiny or
  large, or have the number of the largest magnitude twice with either sign.
- llama.gguf, llama.safetensors: a model of two layers and its weights under Hugging Face's names as transformers loads
  them (names, order of the rows of query and key projections).

The same bytes come out each time with the pinned packages (requirements.txt).
"""

import argparse
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

FOLDER = Path(__file__).resolve().parents[2] / "crates" / "lora-io" / "tests" / "golden" / "gguf"
MADE = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]
# Type, bytes of a block, places of its f16 scales.
RANDOM = [(Kind.Q4_K, 144, (0, 2)), (Kind.Q5_K, 176, (0, 2)), (Kind.Q6_K, 210, (208,))]


def types(draw):
    writer = gguf.GGUFWriter(FOLDER / "types.gguf", "llama")
    writer.add_string("general.name", "types")
    writer.add_array("some.texts", ["a", "ü", ""])
    expected = {}
    for kind in MADE:
        data = gguf.quants.quantize(draw.normal(size=(3, 64)).astype(np.float32), kind)
        add(writer, expected, kind, data)
    for kind, size, scales in RANDOM:
        data = draw.integers(0, 256, size=(3, 2, size), dtype=np.uint8)
        for place in scales:
            values = draw.uniform(0.001, 0.1, size=(3, 2)).astype("<f2")
            data[:, :, place : place + 2] = values.view(np.uint8).reshape(3, 2, 2)
        add(writer, expected, kind, data.reshape(3, 2 * size))
    finish(writer)
    save_file(expected, FOLDER / "types.safetensors")


def add(writer, expected, kind, data):
    writer.add_tensor(kind.name, data, raw_dtype=kind)
    expected[kind.name] = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(data, kind), dtype=np.float32))


def quantised(draw):
    values = draw.normal(size=(24, 64)).astype(np.float32)
    values[0], values[1], values[2, :32] = 0, 0.7, -1.5
    values[3] *= 1e-6
    values[4] *= 1e3
    values[5] = np.abs(values[5])
    values[6, ::2], values[6, 1::2] = 2, -2
    values[7] = np.round(values[7] * 4) / 4
    expected = {"values": torch.from_numpy(values)}
    for kind in MADE[3:]:
        expected[kind.name] = torch.from_numpy(np.ascontiguousarray(gguf.quants.quantize(values, kind)))
    save_file(expected, FOLDER / "quantised.safetensors")


def llama(draw):
    width, inner, words, heads, kv_heads = 32, 64, 40, 4, 2
    writer = gguf.GGUFWriter(FOLDER / "llama.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(words)
    shapes = {"token_embd": (words, width), "output_norm": (width,), "output": (words, width)}
    for layer in range(2):
        kv = width // heads * kv_heads
        for part, shape in {
            "attn_q": (width, width), "attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, width),
            "ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner),
            "attn_norm": (width,), "ffn_norm": (width,),
        }.items():  # fmt: skip
            shapes[f"blk.{layer}.{part}"] = shape
    kinds = [Kind.Q8_0, Kind.F16, Kind.Q5_0, Kind.BF16]
    for index, (name, shape) in enumerate(shapes.items()):
        kind = Kind.F32 if len(shape) == 1 else kinds[index % len(kinds)]
        values = draw.normal(size=shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    finish(writer)
    from transformers import AutoConfig, AutoModelForCausalLM

    read = load_gguf_checkpoint(str(FOLDER / "llama.gguf"), return_tensors=False)
    config = AutoConfig.for_model(**read["config"])
    with torch.device("meta"):
        dummy = AutoModelForCausalLM.from_config(config)
    read = load_gguf_checkpoint(str(FOLDER / "llama.gguf"), return_tensors=True, model_to_load=dummy)
    tensors = {name: torch.as_tensor(np.array(value)).float().contiguous() for name, value in read["tensors"].items()}
    save_file(tensors, FOLDER / "llama.safetensors")


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    types(np.random.default_rng(1))
    quantised(np.random.default_rng(3))
    llama(np.random.default_rng(2))
    print(sum(path.stat().st_size for path in FOLDER.iterdir()), "bytes")


if __name__ == "__main__":
    main()
