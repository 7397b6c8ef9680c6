"""Time and memory of PEFT training steps on a network of Stable Diffusion 1.5's, XL's, Z-Image's, FLUX.1's or Stable Diffusion
3.5 medium's size, the same work as `tools/programs/src/bin/training_step.rs`, with the same arguments:

    python peft_step.py [model=sd1|sdxl|z_image|flux|sd3] [layers=N] [pixels=256] [rank=8] [steps=5] [batch=1] [dtype=fp32|bf16|fp16] [checkpointing=0|1]

Random weights, LoRA on q, k, v, out of all attentions, AdamW; in half precision as diffusers' own training script does it:
base in half precision, LoRA in fp32, autocast, loss scaling for fp16. Versions as in ../golden/requirements.txt. The last
line is JSON, for `side_by_side.py`.
"""

import collections
import json
import resource
import statistics
import time

import torch
from peft import LoraConfig, inject_adapter_in_model

from steps import DEVICE as device
from steps import DTYPES, TRANSFORMERS, arguments, frozen_transformer, frozen_unet

given = arguments({"model": "sd1", "layers": "0", "pixels": "256", "rank": "8", "steps": "5", "batch": "1", "dtype": "fp32", "checkpointing": "0"})
pixels, rank, steps, batch, checkpointing = (
    int(given[name]) for name in ("pixels", "rank", "steps", "batch", "checkpointing")
)
dtype = DTYPES[given["dtype"]]
flow = given["model"] in TRANSFORMERS
network = frozen_transformer(dtype, given["model"], int(given["layers"])) if flow else frozen_unet(dtype, given["model"])
targets = ["to_q", "to_k", "to_v", "to_out.0"]
if given["model"] in ("flux", "sd3"):
    targets += ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), network)
trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
for parameter in trained:
    parameter.data = parameter.data.float()
optimiser = torch.optim.AdamW(trained, lr=1e-4)
scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
side = pixels // 8
latents = torch.randn(batch, 16 if flow else 4, side, side, device=device)
added = None
if given["model"] in ("flux", "sd3"):
    # Rows that captions are filled up to.
    rows, joint, pooled = 512 if given["model"] == "flux" else 77 + 256, network.config.joint_attention_dim, network.config.pooled_projection_dim
    context = torch.randn(batch, rows, joint, device=device, dtype=dtype)
    pooled = torch.randn(batch, pooled, device=device, dtype=dtype)
elif flow:
    # A caption of 128 tokens for each picture.
    context = list(torch.randn(batch, 128, network.config.cap_feat_dim, device=device, dtype=dtype))
else:
    context = torch.randn(batch, 77, network.config.cross_attention_dim, device=device, dtype=dtype)
if given["model"] == "sdxl":
    sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * batch, device=device, dtype=dtype)
    added = {"text_embeds": torch.randn(batch, 1280, device=device, dtype=dtype), "time_ids": sizes}
timesteps = torch.full((batch,), 500, device=device)
network.train()
if checkpointing:
    network.enable_gradient_checkpointing()


def velocity(noised):
    """Noise less data at the middle noise level."""
    level = torch.full((batch,), 0.5, device=device)
    if given["model"] == "z_image":
        answer = network(list(noised.unsqueeze(2)), level, context, return_dict=False)[0]
        # It answers data less noise.
        return -torch.stack(list(answer)).squeeze(2)
    if given["model"] == "sd3":
        return network(noised, context, pooled, level * 1000, return_dict=False)[0]
    # Squares of 2 x 2 are its tokens.
    tokens = noised.view(batch, 16, side // 2, 2, side // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 64)
    places = torch.zeros(side // 2, side // 2, 3, device=device)
    places[..., 1] += torch.arange(side // 2, device=device)[:, None]
    places[..., 2] += torch.arange(side // 2, device=device)
    text = torch.zeros(context.shape[1], 3, device=device)
    answer = network(tokens, context, pooled, level, places.view(-1, 3), text, level, return_dict=False)[0]
    return answer.view(batch, side // 2, side // 2, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(batch, 16, side, side)


def forward(noise):
    if flow:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            answer = velocity(((latents + noise) / 2).to(dtype))
        return torch.nn.functional.mse_loss(answer.float(), noise - latents)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        answer = network((latents + noise).to(dtype), timesteps, context, added_cond_kwargs=added).sample
    return torch.nn.functional.mse_loss(answer.float(), noise)


def step():
    loss = forward(torch.randn_like(latents))
    scaler.scale(loss).backward()
    scaler.unscale_(optimiser)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad()


if device == "cuda":
    # Random weights were made in fp32.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
times = []
for _ in range(steps):
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
peak = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

# What a forward pass keeps for the backward pass, beside the weights, and how much of it after each block.
kept, weights = {}, {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
after_block = {}
if flow:
    lists = [name for name in ("layers", "transformer_blocks", "single_transformer_blocks") if hasattr(network, name)]
    blocks = {f"{name}.{index}": layer for name in lists for index, layer in enumerate(getattr(network, name))}
else:
    blocks = {f"{way}_blocks.{level}": network.get_submodule(f"{way}_blocks.{level}") for way in ("down", "up") for level in range(len(network.down_blocks))}
    blocks["mid_block"] = network.mid_block
for name, block in blocks.items():
    block.register_forward_hook(lambda *_, name=name: after_block.update({name: sum(kept.values())}))


def seen(tensor):
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in weights:
        kept[storage.data_ptr()] = storage.nbytes()
    return tensor


with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
    answer = forward(torch.randn_like(latents))
del answer
kept_mib, kept_by_block, last = sum(kept.values()) >> 20, {}, 0
for name, bytes_after in after_block.items():
    kept_by_block[name], last = bytes_after - last, bytes_after


IDLE = tuple(
    f"aten::{start}"
    for start in "_unsafe_view as_strided_ detach_ dropout empty new_empty pin_memory _pin_memory resize set_ squeeze_ t_ "
    "transpose_ unsqueeze_".split()
)


def works(name):
    """Whether an operation computes or moves anything, as `cpp/profile.cpp` of lora-torch has it."""
    if not name.startswith("aten::") or name.startswith(IDLE):
        return False
    returns = torch._C._jit_get_schemas_for_operator(name)[0].returns
    if not returns:
        return True
    alias = returns[0].alias_info
    return (alias is None or alias.is_write) and isinstance(returns[0].type, (torch._C.TensorType, torch._C.ListType))


def count(event, found):
    """Whether an event or one within it works; those that do so themselves are counted."""
    within = [count(child, found) for child in event.cpu_children]
    own = works(event.name)
    if own and not any(within):
        found[event.name] += 1
    return own or any(within)


with torch.autograd.profiler.profile() as profile:
    scaler.scale(forward(torch.randn_like(latents))).backward()
operations = collections.Counter()
for event in profile.function_events:
    if event.cpu_parent is None:
        count(event, operations)
print(f"PEFT on {device}: {' '.join(f'{t:.3f}' for t in times)} s a step")
print(
    json.dumps(
        {
            "seconds": statistics.median(times[1:]) if steps > 1 else None,
            "peak_mib": peak >> 20,
            "kept_mib": kept_mib,
            "kept_by_block": kept_by_block,
            "operations": operations.total(),
        }
    )
)
