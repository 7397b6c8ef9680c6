"""The same training steps in ours and in diffusers + PEFT, in turn on this machine, as a Markdown table with ratios.

    cargo build --release --bin training_step
    python side_by_side.py TARGET/release/training_step [--model sd1|sdxl|z_image|flux|sd3] [--rounds 2] [--steps 6]

On a GPU the peak is what its allocator gave out, on the CPU the resident memory of the process; "kept" is what a forward pass
leaves for the backward pass, "operations" those of both passes that do work, each a kernel or a few. Each row is a pair of the
same pixels, batch, dtype and checkpointing, then ours alone in the forms that PEFT does not have, against the same peer. A
second table says what each block of the U-Net keeps. On two cores a round takes 25 minutes; SDXL's needs 20 GiB of memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

parser = argparse.ArgumentParser()
parser.add_argument("ours")
parser.add_argument("--model", choices=["sd1", "sdxl", "z_image", "flux", "sd3"], default="sd1")
parser.add_argument("--rounds", type=int, default=2)
parser.add_argument("--steps", type=int, default=6)
options = parser.parse_args()
CUDA = torch.cuda.is_available()
PEER = [sys.executable, str(Path(__file__).with_name("peft_step.py"))]
# What both compute, and what ours does beside that.
if options.model == "sdxl":
    # At the size that people train it at, or on a CPU the largest that ends in minutes.
    size = "pixels=1024 dtype=fp16" if CUDA else "pixels=512"
    forms = ["graphs=1", "graphs=1 storage=nf4", "storage=nf4 offload_base=1"] if CUDA else ["", "storage=nf4"]
    GRID = [(size, forms), (f"{size} checkpointing=1", forms)]
elif options.model in ("z_image", "flux", "sd3"):
    # On a CPU few layers at their size: of Z-Image beside those that read picture and caption apart, of FLUX.1 a double block
    # and two single ones.
    layers = {"z_image": 2, "flux": 1, "sd3": 4}[options.model]
    size = "pixels=1024 dtype=bf16" if CUDA else f"layers={layers} pixels=256"
    forms = ["graphs=1", "graphs=1 storage=nf4", "storage=nf4 offload_base=1"] if CUDA else ["", "storage=nf4"]
    GRID = [(size, forms), (f"{size} checkpointing=1", forms)]
elif CUDA:
    GRID = [
        (
            "pixels=512 dtype=fp16",
            ["graphs=1", "", "graphs=1 feed_forward=1", "graphs=1 storage=int8", "graphs=1 storage=nf4", "storage=nf4 offload_base=1"],
        ),
        ("pixels=512 dtype=fp16 batch=2", ["graphs=1", "graphs=1 storage=nf4"]),
        ("pixels=512 dtype=fp16 checkpointing=1", ["graphs=1", "graphs=1 storage=nf4"]),
        ("pixels=512 dtype=bf16", ["graphs=1"]),
        ("pixels=512 dtype=fp32", ["graphs=1"]),
    ]
else:
    GRID = [
        ("pixels=256", ["", "feed_forward=1", "storage=fp16", "storage=int8", "storage=nf4"]),
        ("pixels=256 checkpointing=1", ["", "storage=nf4"]),
        ("pixels=512", ["", "feed_forward=1", "storage=nf4"]),
        ("pixels=512 checkpointing=1", ["", "storage=nf4"]),
    ]
    # CPUs without instructions for it convert number by number.
    if torch.cpu._is_avx512_bf16_supported():
        GRID += [("pixels=512 dtype=bf16", ["", "storage=nf4"])]


def run(command, arguments):
    """The medians over the rounds."""
    results = []
    for _ in range(options.rounds):
        done = subprocess.run(command + [f"model={options.model}"] + arguments.split() + [f"steps={options.steps}"], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{command} {arguments}: {done.stderr}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {name: statistics.median(result[name] for result in results) for name in results[0] if name != "kept_by_block"}
    return medians | {"kept_by_block": results[0]["kept_by_block"]}


def row(name, own, peer=None):
    ratios = [f"{own[key] / peer[key]:.2f}" if peer else "" for key in ("seconds", "peak_mib")]
    numbers = [f"{own['seconds']:.3f}", *(f"{own[key]:.0f}" for key in ("peak_mib", "kept_mib", "operations"))]
    print("| " + " | ".join([name, *numbers, *ratios]) + " |", flush=True)


device = torch.cuda.get_device_name() if CUDA else "CPU"
print(f"| {device} | s a step | peak MiB | kept MiB | operations | time, of PEFT's | memory, of PEFT's |")
print("|" + "---|" * 7)
blocks = {}
for common, own in GRID:
    peer = run(PEER, common)
    row(f"PEFT, {common}", peer)
    blocks[f"PEFT, {common}"] = peer["kept_by_block"]
    for more in own:
        name, result = f"ours, {common} {more}".strip(), run([options.ours], f"{common} {more}")
        row(name, result, peer)
        if more in ("", "graphs=1"):
            blocks[name] = result["kept_by_block"]

names = list(next(iter(blocks.values())))
if not all(kept.keys() >= set(names) for kept in blocks.values()):
    # Not every network of ours says when a block is done.
    sys.exit()
print(f"\n| kept MiB | {' | '.join(names)} |")
print("|" + "---|" * (len(names) + 1))
for name, kept in blocks.items():
    print(f"| {name} | {' | '.join(f'{kept[block] / 2**20:.1f}' for block in names)} |")
