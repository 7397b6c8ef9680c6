"""tiny_samplers.safetensors: ten guided steps of DDIM and Euler with a tiny U-Net."""

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

import files
import tiny
from tiny import given

STEPS, GUIDANCE = 10, 7.5
# steps_offset and set_alpha_to_one as in Stable Diffusion 1.5's and 2.1's own scheduler_config.json.
OFFSETS = dict(set_alpha_to_one=False, steps_offset=1)


def sample(unet, scheduler, rescale):
    """Final latents, and those after the first step."""
    width = (2, 77, tiny.CONTEXT)
    context = torch.cat([given("input.sampler.uncond", width), given("input.sampler.cond", width)])
    latents, first = given("input.sampler.noise", (2, 4, 8, 8)) * scheduler.init_noise_sigma, None
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        without, with_prompt = unet(model_input, timestep, context).sample.chunk(2)
        answer = without + GUIDANCE * (with_prompt - without)
        if rescale:
            answer = rescale_noise_cfg(answer, with_prompt, guidance_rescale=rescale)
        latents = scheduler.step(answer, timestep, latents).prev_sample
        first = latents if first is None else first
    return latents, first


def schedulers():
    """Name, scheduler and how much of the guidance is rescaled."""
    ddim = dict(tiny.SCHEDULE, clip_sample=False, **OFFSETS)
    yield "ddim", DDIMScheduler(**ddim, timestep_spacing="leading"), 0.0
    # What EulerDiscreteScheduler.from_config takes for both: their files name no spacing, so Euler's own default, linspace,
    # holds. "leading" is the variant that later configs ask for.
    for name, spacing in (("euler", "linspace"), ("euler_leading", "leading")):
        yield name, EulerDiscreteScheduler(**tiny.SCHEDULE, steps_offset=1, timestep_spacing=spacing), 0.0
    if tiny.SCHEDULE["prediction_type"] == "v_prediction":
        zero = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
        yield "ddim_zero_snr", DDIMScheduler(**ddim, **zero), 0.7
        yield "euler_zero_snr", EulerDiscreteScheduler(**tiny.SCHEDULE, steps_offset=1, **zero), 0.7


def main():
    made, unet = {}, tiny.unet()
    for name, scheduler, rescale in schedulers():
        scheduler.set_timesteps(STEPS)
        made[f"{name}.timesteps"] = scheduler.timesteps
        if isinstance(scheduler, DDIMScheduler):
            previous = scheduler.timesteps - 1000 // STEPS
            made[f"{name}.alphas"] = scheduler.alphas_cumprod[scheduler.timesteps]
            made[f"{name}.alphas_after"] = torch.stack([
                scheduler.alphas_cumprod[t] if t >= 0 else scheduler.final_alpha_cumprod for t in previous
            ])
        else:
            made[f"{name}.sigmas"] = scheduler.sigmas
            made[f"{name}.initial_scale"] = torch.as_tensor(scheduler.init_noise_sigma, dtype=torch.float32).reshape(1)
        with torch.no_grad():
            final, made[f"{name}.first"] = sample(unet, scheduler, rescale)
        made[f"{name}.final"] = final
        print(f"  {name}: std {final.std():.4f}, largest {final.abs().max():.4f}")
    files.write(f"{tiny.FILES}_samplers.safetensors", made)


if __name__ == "__main__":
    main()
