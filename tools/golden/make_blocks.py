"""crates/lora-torch/tests/golden/blocks.safetensors: weights in the blocks of GGUF files, and what gguf makes of them.

For each type `TYPE.bytes`, rows of blocks of random bytes with small finite scales, and `TYPE.values` in f32. The same bytes
come out each time with the pinned packages (requirements.txt).
"""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file

FILE = Path(__file__).resolve().parents[2] / "crates" / "lora-torch" / "tests" / "golden" / "blocks.safetensors"
# Type, and places of its f16 scales.
SCALES = {
    Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q8_0: (0,),
    Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,),
}  # fmt: skip
ROWS, BLOCKS = 3, 2


def main():
    draw = np.random.default_rng(3)
    tensors = {}
    for kind, places in SCALES.items():
        size = gguf.GGML_QUANT_SIZES[kind][1]
        data = draw.integers(0, 256, size=(ROWS, BLOCKS, size), dtype=np.uint8)
        for place in places:
            scales = draw.normal(scale=0.05, size=(ROWS, BLOCKS)).astype("<f2")
            data[:, :, place : place + 2] = scales.view(np.uint8).reshape(ROWS, BLOCKS, 2)
        # One that is no normal number of f16.
        data[0, 0, places[0] : places[0] + 2] = np.array([3e-7], dtype="<f2").view(np.uint8)
        rows = data.reshape(ROWS, BLOCKS * size)
        tensors[f"{kind.name}.bytes"] = rows
        tensors[f"{kind.name}.values"] = np.ascontiguousarray(gguf.quants.dequantize(rows, kind), dtype=np.float32)
    save_file(tensors, FILE)
    print(FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
