"""tiny_trajectory.safetensors: losses of 20 AdamW steps, without and with min-SNR weighting and noise offset."""

import torch

import files
import synthetic
import tiny
import training

STEPS = 20


def timesteps():
    """Two timesteps for each step, from the formula's words."""
    drawn = synthetic.words("input.trajectory.timesteps", 2 * STEPS) % 1000
    return torch.tensor(drawn.astype("int64")).reshape(STEPS, 2)


def train(max_grad_norm, min_snr_gamma=None, noise_offset=0.0):
    """Losses, gradient norms before clipping, and the final parameters."""
    unet, texts, parameters = training.model(training.attention_targets, zero_up=True)
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    latents, losses, norms = training.latents(), [], []
    for step, drawn in enumerate(timesteps()):
        noise = tiny.given(f"input.trajectory.{step}.noise", training.BATCH)
        if noise_offset:
            noise = noise + noise_offset * tiny.given(f"input.trajectory.{step}.offset", (2, 4, 1, 1))
        loss = training.loss(unet, texts, latents, noise, drawn, min_snr_gamma)
        optimiser.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm).double())
        optimiser.step()
        losses.append(loss.detach().double())
    return torch.stack(losses), torch.stack(norms), parameters


def main():
    made, names = {"timesteps": timesteps(), "input_ids": tiny.training_rows()}, None
    # The usual limit of 1 never acts here; the second variant's does at most steps.
    variants = {
        "plain": dict(max_grad_norm=1.0),
        "weighted": dict(max_grad_norm=0.05, min_snr_gamma=5.0, noise_offset=0.05),
    }
    for variant, options in variants.items():
        losses, norms, parameters = train(**options)
        print(f"  {variant}: losses {losses[0]:.6f} to {losses[-1]:.6f}, gradient norms {norms.min():.3f} to {norms.max():.3f}")
        made[f"{variant}.losses"] = losses
        made[f"{variant}.gradient_norms"] = norms
        made[f"{variant}.final_norms"] = torch.stack([p.detach().norm() for p in parameters.values()])
        names = list(parameters)
    files.write(f"{tiny.FILES}_trajectory.safetensors", made, metadata={"names": "\n".join(names)})


if __name__ == "__main__":
    main()
