"""tiny_schedules.safetensors: what diffusion makes of latents and noise, as published and with zero terminal SNR."""

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

import files
import tiny

TIMESTEPS = [0, 1, 10, 250, 500, 750, 999]
GAMMA = 5.0


def main():
    timesteps, shape = torch.tensor(TIMESTEPS), (len(TIMESTEPS), 4, 4, 4)
    latents, noise = tiny.given("input.schedule.latents", shape), tiny.given("input.schedule.noise", shape)
    made = {"timesteps": timesteps}
    for name, zero in (("published", False), ("zero_snr", True)):
        scheduler = DDPMScheduler(**tiny.SCHEDULE, clip_sample=False, rescale_betas_zero_snr=zero)
        snr = compute_snr(scheduler, timesteps)
        made[f"{name}.alphas"] = scheduler.alphas_cumprod
        made[f"{name}.snr"] = snr
        # As diffusers' training scripts weigh a loss on velocity.
        made[f"{name}.min_snr_weights"] = snr.clamp(max=GAMMA) / (snr + 1.0)
        made[f"{name}.noised"] = scheduler.add_noise(latents, noise, timesteps)
        made[f"{name}.velocity"] = scheduler.get_velocity(latents, noise, timesteps)
    files.write(f"{tiny.FILES}_schedules.safetensors", made)


if __name__ == "__main__":
    main()
