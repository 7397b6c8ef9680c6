"""tiny_samplers.safetensors: ten guided steps of DDIM and Euler with the tiny U-Net."""

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

import files
import tiny
from tiny import given

STEPS, GUIDANCE = 10, 7.5


def sample(unet, scheduler):
    """Final latents, and those after the first step."""
    context = torch.cat([given("input.sampler.uncond", (2, 77, 128)), given("input.sampler.cond", (2, 77, 128))])
    latents, first = given("input.sampler.noise", (2, 4, 8, 8)) * scheduler.init_noise_sigma, None
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        without, with_prompt = unet(model_input, timestep, context).sample.chunk(2)
        answer = without + GUIDANCE * (with_prompt - without)
        latents = scheduler.step(answer, timestep, latents).prev_sample
        first = latents if first is None else first
    return latents, first


def main():
    # steps_offset and set_alpha_to_one as in Stable Diffusion 1.5's own scheduler_config.json.
    ddim = DDIMScheduler(
        **tiny.SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
    )
    ddim.set_timesteps(STEPS)
    made = {}
    unet = tiny.unet()
    with torch.no_grad():
        made["ddim.final"], made["ddim.first"] = sample(unet, ddim)
        made["ddim.timesteps"] = ddim.timesteps
        previous = ddim.timesteps - 1000 // STEPS
        made["ddim.alphas"] = ddim.alphas_cumprod[ddim.timesteps]
        made["ddim.alphas_after"] = torch.stack([
            ddim.alphas_cumprod[t] if t >= 0 else ddim.final_alpha_cumprod for t in previous
        ])
        # What EulerDiscreteScheduler.from_config takes for Stable Diffusion 1.5: its file names no spacing, so Euler's
        # own default, linspace, holds. "leading" is the variant that later configs ask for.
        for spacing in ("linspace", "leading"):
            euler = EulerDiscreteScheduler(**tiny.SCHEDULE, steps_offset=1, timestep_spacing=spacing)
            euler.set_timesteps(STEPS)
            key = "euler" if spacing == "linspace" else "euler_leading"
            made[f"{key}.timesteps"], made[f"{key}.sigmas"] = euler.timesteps, euler.sigmas
            made[f"{key}.initial_scale"] = torch.as_tensor(euler.init_noise_sigma, dtype=torch.float32).reshape(1)
            made[f"{key}.final"], made[f"{key}.first"] = sample(unet, euler)
    for name in ("ddim.final", "euler.final", "euler_leading.final"):
        print(f"  {name}: std {made[name].std():.4f}, largest {made[name].abs().max():.4f}")
    files.write("tiny_samplers.safetensors", made)


if __name__ == "__main__":
    main()
