"""Time and memory of PEFT training steps on a U-Net of Stable Diffusion 1.5's size: the peer of `benches/training.rs`.

    python peft_step.py [PIXELS] [RANK] [STEPS] [CHECKPOINTING 0|1]

Random weights, float32, batch 1, LoRA on q, k, v, out of all attentions, AdamW. Versions as in ../golden/requirements.txt.
"""

import resource
import sys
import time

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model

pixels, rank, steps, checkpointing = (int(value) for value in sys.argv[1:] + ["256", "8", "5", "0"][len(sys.argv) - 1 :])
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).to(device).requires_grad_(False)
inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), unet)
trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
optimiser = torch.optim.AdamW(trained, lr=1e-4)
side = pixels // 8
latents, context = torch.randn(1, 4, side, side, device=device), torch.randn(1, 77, 768, device=device)
unet.train()
if checkpointing:
    unet.enable_gradient_checkpointing()
times = []
for _ in range(steps):
    start = time.perf_counter()
    noise = torch.randn_like(latents)
    loss = torch.nn.functional.mse_loss(unet(latents + noise, torch.tensor([500], device=device), context).sample, noise)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimiser.step()
    optimiser.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - start)

# What a forward pass keeps for the backward pass, beside the weights.
kept, weights = {}, {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}


def seen(tensor):
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in weights:
        kept[storage.data_ptr()] = storage.nbytes()
    return tensor


with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
    answer = unet(latents, torch.tensor([500], device=device), context).sample
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
seconds = ", ".join(f"{t:.2f}" for t in times)
print(f"PEFT {pixels} px rank {rank} on {device}: {seconds} s a step; kept for the backward pass {sum(kept.values()) >> 20} MiB, peak RSS {peak:.0f} MiB")
