"""Extraction beside torch.linalg.svd: the same rank from the same two checkpoints, time and error.

Makes a "tuned" copy of a base (single file, fp16) in which some layers of several shapes differ by full-rank updates with
singular values that fall as 1/i, runs `lora extract` on the pair, and takes the exact decomposition of the same differences
with torch. Times are of the whole `lora extract` command, reading both files included, and of the decompositions alone.
"""

import argparse
import subprocess
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lora", type=Path, help="the command")
    parser.add_argument("base", type=Path, help="a single-file checkpoint")
    parser.add_argument("folder", type=Path, help="for the files made here")
    parser.add_argument("--rank", type=int, default=32)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tuned_path, out = arguments.folder / "tuned.safetensors", arguments.folder / "extracted.safetensors"
    tensors = load_file(arguments.base)
    ends = ("attn1.to_q.weight", "attn2.to_k.weight", "ff.net.0.proj.weight", "ff.net.2.weight")
    names = [name for name in tensors if name.startswith("model.diffusion_model") and name.endswith(ends)]
    changed = {}
    for name in names:
        weight = tensors[name].float()
        rows, columns = weight.shape
        side = min(rows, columns)
        left, _ = torch.linalg.qr(torch.randn(rows, side))
        right, _ = torch.linalg.qr(torch.randn(columns, side))
        update = left * (weight.norm() / 20 / torch.arange(1, side + 1)) @ right.T
        changed[name] = tensors[name]
        tensors[name] = (weight + update).half()
    save_file(tensors, tuned_path)
    started = time.perf_counter()
    command = [arguments.lora, "extract", "--base", arguments.base, "--tuned", tuned_path, "--out", out]
    command += ["--rank", str(arguments.rank), "--targets", "attention-mlp", "--dtype", "fp32"]
    subprocess.run(command, check=True)
    ours = time.perf_counter() - started
    theirs, worst, total = 0.0, 0.0, [0.0, 0.0]
    with safe_open(out, "pt") as file:
        found = {key.removesuffix(".lora_up.weight"): key for key in file.keys() if key.endswith(".lora_up.weight")}
        ups = {key: (file.get_tensor(f"{key}.lora_up.weight"), file.get_tensor(f"{key}.lora_down.weight")) for key in found}
    print(f"{len(ups)} modules of {len(changed)} changed layers")
    shapes = {}
    for up, down in ups.values():
        shapes.setdefault((up.shape[0], down.shape[1]), []).append(up @ down)
    for name, before in changed.items():
        difference = tensors[name].float() - before.float()
        started = time.perf_counter()
        left, values, right = torch.linalg.svd(difference, full_matrices=False)
        theirs += time.perf_counter() - started
        exact = values[arguments.rank :].norm().item()
        # Which module it is: the one whose update is nearest.
        own = min((difference - update).norm().item() for update in shapes[tuple(difference.shape)])
        worst = max(worst, own / exact)
        total = [total[0] + own**2, total[1] + exact**2]
    started = time.perf_counter()
    for _ in range(3):
        torch.linalg.svd(torch.randn(1280, 1280), full_matrices=False)
    print(f"torch.linalg.svd of 1280x1280: {(time.perf_counter() - started) / 3:.3f} s")
    print(f"lora extract {ours:.2f} s; torch.linalg.svd {theirs:.2f} s ({theirs / ours:.0f} times as long)")
    print(f"error over the exact one: {(total[0] / total[1]) ** 0.5:.4f} overall, {worst:.4f} at worst")


if __name__ == "__main__":
    main()
