"""Whether convolutions gain by channels that lie last in memory: forward and backward pass of a U-Net of Stable Diffusion 1.5's
size with frozen random weights, in either order, in turn:

    python channels_last.py [pixels=512] [dtype=fp32|bf16|fp16] [batch=1] [rounds=3]

On a GPU the passes are recorded as a CUDA graph, so that the host's launching does not hide the difference. Versions as in
../golden/requirements.txt. The last line is the ratio of the best times.
"""

import time

import torch

from steps import DEVICE as device
from steps import DTYPES, arguments, frozen_unet

given = arguments({"pixels": "512", "dtype": "fp32", "batch": "1", "rounds": "3"})
pixels, batch, rounds = (int(given[name]) for name in ("pixels", "batch", "rounds"))
dtype = DTYPES[given["dtype"]]
unet = frozen_unet(dtype)
latents = torch.randn(batch, 4, pixels // 8, pixels // 8, device=device, dtype=dtype)
context = torch.randn(batch, 77, 768, device=device, dtype=dtype)
timesteps = torch.full((batch,), 500, device=device)


def passes_in(order):
    """A function that runs both passes; the gradient is that of the latents."""
    unet.to(memory_format=order)
    noised = latents.contiguous(memory_format=order).requires_grad_()

    def passes():
        noised.grad = None
        unet(noised, timesteps, context).sample.float().square().mean().backward()

    if device == "cpu":
        return passes
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            passes()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        passes()
    return graph.replay


def seconds(passes):
    start = time.perf_counter()
    passes()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


best = {}
for _ in range(rounds):
    for name, order in (("channels first", torch.contiguous_format), ("channels last", torch.channels_last)):
        passes = passes_in(order)
        seconds(passes)
        times = [seconds(passes) for _ in range(3 if device == "cpu" else 20)]
        best[name] = min(times + [best.get(name, float("inf"))])
        print(f"{name}: {' '.join(f'{t:.4f}' for t in times)} s", flush=True)
print(f"channels last takes {best['channels last'] / best['channels first']:.2f} times as long on {device}")
