"""tiny_lora_grads.safetensors: the loss and its gradient for every LoRA tensor, all target modules adapted."""

import torch

import files
import tiny
import training

# Convolutions are the same in both kinds of model.
CONVOLUTIONS = tiny.MODEL == "sd1"


def main():
    unet, texts, parameters = training.model(lambda u, t: training.default_targets(u, t, CONVOLUTIONS), zero_up=False)
    timesteps = torch.tensor([100, 700])
    noise = tiny.given("input.train.noise", training.BATCH)
    loss = training.loss(unet, texts, training.latents(), noise, timesteps)
    loss.backward()
    # Stable Diffusion XL reads nothing of its first text encoder's last layer.
    made = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    norms = torch.stack([gradient.norm() for gradient in made.values()])
    components = [name.split(".")[1] for name in made]
    print(f"  loss {loss.item():.8f}; modules: U-Net {components.count('unet') // 2}, "
          f"text encoders {(len(components) - components.count('unet')) // 2}; gradient norms {norms.min():.2e} to {norms.max():.2e}")
    made["loss"] = loss.detach().double()
    made["input_ids"] = tiny.training_rows()
    made["timesteps"] = timesteps
    files.write(f"{tiny.FILES}_lora_grads.safetensors", made)


if __name__ == "__main__":
    main()
