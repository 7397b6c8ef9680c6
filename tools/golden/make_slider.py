"""tiny_slider.safetensors: the loss of a concept slider (Gandikota et al., 2023) and its gradients, on latents that were denoised
part of the way with the slider on; after the paper's formula, through diffusers and PEFT."""

import torch
from diffusers import DDIMScheduler
from peft.tuners.lora import LoraLayer

import files
import tiny
import training
from tiny import given

SHAPE, STATES = (1, 4, 16, 16), (1, 77, tiny.CONTEXT)
# Of the whole way in so many steps; guidance on it.
STEPS, GUIDANCE = 10, 3.0
# Of each item: where the way ends, the adapter's strength on it, how many times the base's difference, how much it counts.
ITEMS = [(455, 1.0, 4.0, 1.0), (120, -1.0, 2.0, 2.0)]


def at_strength(unet, strength):
    for module in unet.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] = training.ALPHA / training.RANK * strength


def states(item, prompt):
    return given(f"input.slider.{item}.{prompt}", STATES)


@torch.no_grad()
def denoised(unet, item, end, strength):
    """Latents at a timestep, along DDIM's way from noise; its last step ends there instead of at its own next."""
    at_strength(unet, strength)
    scheduler = DDIMScheduler(**tiny.SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(STEPS)
    latents = given(f"input.slider.{item}.noise", SHAPE)
    context = torch.cat([states(item, "empty"), states(item, "target")])
    way = [timestep for timestep in scheduler.timesteps if timestep > end]
    for timestep in way:
        without, with_prompt = unet(torch.cat([latents] * 2), timestep, context).sample.chunk(2)
        answer = without + GUIDANCE * (with_prompt - without)
        if timestep != way[-1]:
            latents = scheduler.step(answer, timestep, latents).prev_sample
            continue
        here, there = (scheduler.alphas_cumprod[t].to(tiny.DTYPE) for t in (timestep, end))
        clean = (latents - (1 - here).sqrt() * answer) / here.sqrt()
        latents = there.sqrt() * clean + (1 - there).sqrt() * answer
    return latents


def loss(unet, latents):
    """The mean over both strengths of each item's mean square, by how much items count."""
    timesteps = torch.tensor([end for end, *_ in ITEMS])
    asked = lambda prompt: torch.cat([states(item, prompt) for item in range(len(ITEMS))])
    answer = lambda prompt: unet(latents, timesteps, asked(prompt)).sample
    with torch.no_grad():
        at_strength(unet, 0.0)
        times = torch.tensor([times for _, _, times, _ in ITEMS]).view(-1, 1, 1, 1)
        change = times * (answer("positive") - answer("negative"))
        plain = answer("target")
    weights = torch.tensor([weight for *_, weight in ITEMS])
    total = 0.0
    for strength in (1.0, -1.0):
        at_strength(unet, strength)
        each = (answer("target") - (plain + strength * change)).square().mean(dim=(1, 2, 3))
        total = total + (weights * each).mean() / 2
    return total


def main():
    unet = tiny.unet()
    ends = (".attn2.to_v", ".attn2.to_out.0")
    targets = sorted(name for name, _ in unet.named_modules() if name.endswith(ends))
    parameters = training.inject(unet, "unet", targets, zero_up=False)
    latents = torch.cat([denoised(unet, item, end, strength) for item, (end, strength, *_) in enumerate(ITEMS)])
    total = loss(unet, latents)
    total.backward()
    made = {name: parameter.grad for name, parameter in parameters.items()}
    norms = torch.stack([gradient.norm() for gradient in made.values()])
    print(f"  loss {total.item():.8f}; {len(targets)} modules, gradient norms {norms.min():.2e} to {norms.max():.2e}")
    files.write(f"{tiny.FILES}_slider.safetensors", made | {"noised": latents, "loss": total.detach().double()})


if __name__ == "__main__":
    main()
