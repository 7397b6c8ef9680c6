"""tiny_samplers.safetensors: ten guided steps of each sampler with a tiny U-Net, and twenty of Euler with two LoRAs on it."""

import itertools

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

import files
import synthetic
import tiny
import training
from tiny import given

STEPS, GUIDANCE = 10, 7.5
# steps_offset and set_alpha_to_one as in Stable Diffusion 1.5's and 2.1's own scheduler_config.json.
OFFSETS = dict(set_alpha_to_one=False, steps_offset=1)


def sample(unet, scheduler, rescale):
    """Final latents, and those after the first step."""
    fresh = (given(f"input.sampler.fresh.{step}", (2, 4, 8, 8)) for step in itertools.count())
    scheduling_euler_ancestral_discrete.randn_tensor = lambda *_, **__: next(fresh)
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
    yield "euler_a", EulerAncestralDiscreteScheduler(**tiny.SCHEDULE, steps_offset=1), 0.0
    yield "dpmpp_2m", DPMSolverMultistepScheduler(**tiny.SCHEDULE, steps_offset=1), 0.0
    if tiny.SCHEDULE["prediction_type"] == "v_prediction":
        zero = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
        yield "ddim_zero_snr", DDIMScheduler(**ddim, **zero), 0.7
        yield "euler_zero_snr", EulerDiscreteScheduler(**tiny.SCHEDULE, steps_offset=1, **zero), 0.7
        yield "euler_a_zero_snr", EulerAncestralDiscreteScheduler(**tiny.SCHEDULE, steps_offset=1, **zero), 0.7
        yield "dpmpp_2m_zero_snr", DPMSolverMultistepScheduler(**tiny.SCHEDULE, steps_offset=1, **zero), 0.7


# Two LoRAs, by the beginning of their tensors' names, and how strongly they are applied.
ADAPTERS = {"lora": 0.8, "other": 0.5}


def adapted():
    """The U-Net with two LoRAs on its attention, as a pipeline that loaded both has them."""
    unet = tiny.unet()
    targets = training.attention_targets(unet, {})["unet"]
    config = LoraConfig(r=training.RANK, lora_alpha=training.ALPHA, target_modules=targets)
    for name in ADAPTERS:
        unet.add_adapter(config, adapter_name=name)
    unet.set_adapters(list(ADAPTERS), weights=list(ADAPTERS.values()))
    with torch.no_grad():
        for path, module in unet.named_modules():
            if not isinstance(module, LoraLayer):
                continue
            for name in ADAPTERS:
                down, up = module.lora_A[name].weight, module.lora_B[name].weight
                down.copy_(torch.from_numpy(synthetic.weight(f"{name}.unet.{path}.down", tuple(down.shape))))
                up.copy_(torch.from_numpy(synthetic.lora_up(f"{name}.unet.{path}.up", tuple(up.shape))))
    return unet


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
    scheduler = EulerDiscreteScheduler(**tiny.SCHEDULE, steps_offset=1)
    scheduler.set_timesteps(2 * STEPS)
    with torch.no_grad():
        made["two_loras.final"], _ = sample(adapted(), scheduler, 0.0)
    files.write(f"{tiny.FILES}_samplers.safetensors", made)


if __name__ == "__main__":
    main()
