"""nf4.safetensors: what bitsandbytes makes of weights in NF4 with double quantisation, and what comes back."""

import os
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

FOLDER = Path(__file__).resolve().parents[2] / "crates" / "lora-torch" / "tests" / "golden"
os.environ.setdefault("GOLDEN_FOLDER", str(FOLDER))

import files


def weights():
    """Name and weight. Many blocks, so that there are several of the second level; ends of blocks; odd counts; outliers."""
    torch.manual_seed(7)
    yield "linear", torch.randn(96, 200) * 0.05  # 300 blocks: two of the second level
    yield "convolution", torch.randn(20, 12, 3, 3) * torch.rand(20, 1, 1, 1)  # 33.75 blocks
    yield "odd", torch.randn(7, 11)  # the last byte has one number
    outliers = torch.randn(64, 64) * 0.02
    outliers[3, 5], outliers[40, 2] = 4.0, -9.0
    outliers[10] = 0  # a block of zeros
    yield "outliers", outliers
    yield "half", (torch.randn(32, 64) * 0.1).half()
    yield "bfloat16", (torch.randn(32, 64) * 0.1).bfloat16()


def main():
    torch.set_num_threads(1)
    made = {}
    for name, weight in weights():
        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        assert state.nested and state.state2.blocksize == 256
        made |= {
            f"{name}.weight": weight,
            f"{name}.packed": packed.reshape(-1),
            f"{name}.absmax": state.absmax,
            f"{name}.nested": state.state2.absmax,
            f"{name}.offset": state.offset,
            f"{name}.back": dequantize_4bit(packed, state),
        }
    files.write("nf4.safetensors", made)


if __name__ == "__main__":
    main()
