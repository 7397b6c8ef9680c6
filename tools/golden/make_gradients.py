"""tiny_lora_grads.safetensors: the loss and its gradient for every LoRA tensor, all target modules adapted."""

import torch

import files
import tiny
import training

# Convolutions are the same in both kinds of model.
CONVOLUTIONS = tiny.MODEL == "sd1"


def main():
    unet, text, parameters = training.model(lambda u, t: training.default_targets(u, t, CONVOLUTIONS), zero_up=False)
    timesteps = torch.tensor([100, 700])
    noise = tiny.given("input.train.noise", training.BATCH)
    loss = training.loss(unet, text, training.latents(), noise, timesteps)
    loss.backward()
    made = {name: parameter.grad for name, parameter in parameters.items()}
    norms = torch.stack([gradient.norm() for gradient in made.values()])
    components = [name.split(".")[1] for name in made]
    print(f"  loss {loss.item():.8f}; modules: U-Net {components.count('unet') // 2}, "
          f"text encoder {components.count('text_encoder') // 2}; gradient norms {norms.min():.2e} to {norms.max():.2e}")
    made["loss"] = loss.detach().double()
    made["input_ids"] = tiny.training_rows()
    made["timesteps"] = timesteps
    files.write(f"{tiny.FILES}_lora_grads.safetensors", made)


if __name__ == "__main__":
    main()
