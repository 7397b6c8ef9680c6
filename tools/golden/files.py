"""Writing golden files."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path(
    os.environ.get("GOLDEN_FOLDER", Path(__file__).resolve().parents[2] / "crates" / "lora-models" / "tests" / "golden")
)
# A small vocabulary of T5's kind (`make_t5_tokens.py`).
T5 = Path(__file__).resolve().parents[2] / "crates" / "lora-data" / "tests" / "golden" / "t5"


def kept(name, tensor):
    wide = name.endswith(("loss", "losses", "gradient_norms"))
    return tensor.float() if tensor.dtype == torch.float64 and not wide else tensor


def write(name, tensors, metadata=None):
    """One safetensors file beside the tests; same values give the same bytes. Losses and gradient norms keep float64,
    everything else is float32 or int64. `metadata`: at most one entry, since the writer's order of several is arbitrary."""
    tensors = {key: kept(key, value.detach()).contiguous() for key, value in sorted(tensors.items())}
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata)
    path.chmod(0o644)
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size} bytes")
