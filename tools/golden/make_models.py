"""tiny.safetensors: what the text encoder, VAE and U-Net of a tiny model answer."""

import torch
import torch.nn.functional as F

import files
import tiny
from tiny import given


def in_tiles(run, whole, scale_in, scale_out):
    """`run` on two tiles an axis, of 8 by 6 latents; where they overlap the second's share rises from 0 to 1."""
    axes = []
    for begin, end, length in ((3, 5, 8), (2, 4, 6)):
        place = torch.arange(length * scale_out) + 0.5
        share = ((place - begin * scale_out) / ((end - begin) * scale_out)).clamp(0, 1)
        axes.append([(0, end, 1 - share), (begin, length, share)])
    answer = 0
    for top, bottom, down in axes[0]:
        for left, right, across in axes[1]:
            tile = run(whole[..., top * scale_in:bottom * scale_in, left * scale_in:right * scale_in])
            around = [side * scale_out for side in (left, 6 - right, top, 8 - bottom)]
            answer = answer + F.pad(tile, around) * down[:, None] * across
    return answer


def autoencoder():
    """Answers of the autoencoder, which both kinds of model share."""
    made = {}
    vae = tiny.vae()
    posterior = vae.encode(given("input.vae.pixels", (2, 3, 64, 48))).latent_dist
    made["vae.mean"], made["vae.logvar"] = posterior.mean, posterior.logvar
    made["vae.decoded"] = vae.decode(given("input.vae.latents", (2, 4, 8, 6))).sample

    encode, decode = (lambda pixels: vae.quant_conv(vae.encoder(pixels))), (lambda latents: vae.decode(latents).sample)
    moments = in_tiles(encode, given("input.vae.pixels", (2, 3, 64, 48)), 8, 1)
    made["vae.tiled.mean"], made["vae.tiled.logvar"] = moments.chunk(2, 1)
    made["vae.tiled.decoded"] = in_tiles(decode, given("input.vae.latents", (2, 4, 8, 6)), 1, 8)
    return made


def main():
    made = {}
    with torch.no_grad():
        full = [(7919 * (i + 1)) % 49406 for i in range(75)]
        short = [320, 1125, 539, 320, 2368, 525, 320, 2540, 267, 736, 3055]
        for (component, text), pad in zip(tiny.text_encoders().items(), tiny.PADS):
            ids = torch.tensor([tiny.token_row(own, pad) for own in (full, short, [])])
            answer = text(input_ids=ids, output_hidden_states=True)
            norm = next(module for name, module in text.named_modules() if name.endswith("final_layer_norm"))
            made[f"{component}.input_ids"] = ids
            if tiny.MODEL == "sdxl":
                made[f"{component}.penultimate"] = answer.hidden_states[-2]
                if component == "text_encoder_2":
                    made[f"{component}.pooled"] = answer.text_embeds
            else:
                made[f"{component}.clip_skip_1"] = answer.last_hidden_state
                made[f"{component}.clip_skip_2"] = norm(answer.hidden_states[-2])

        if tiny.MODEL == "sd1":
            made |= autoencoder()

        unet = tiny.unet()
        cases = {
            "square": ("input.unet", (2, 4, 8, 8), [10, 999], 77),
            "wide": ("input.unet.wide", (1, 4, 8, 16), [500], 77),
            "long": ("input.unet.long", (1, 4, 8, 8), [250], 227),
        }
        for case, (name, shape, timesteps, states) in cases.items():
            count = shape[0]
            added = dict(
                text_embeds=given(f"{name}.pooled", (count, tiny.TEXT_2["projection_dim"])),
                time_ids=torch.tensor(tiny.SIZES[:count], dtype=tiny.DTYPE),
            )
            context = given(f"{name}.context", (count, states, tiny.CONTEXT))
            made[f"unet.{case}"] = unet(
                given(f"{name}.sample", shape),
                torch.tensor(timesteps),
                context,
                added_cond_kwargs=added if tiny.MODEL == "sdxl" else None,
            ).sample
    for name, tensor in made.items():
        if tensor.is_floating_point():
            print(f"  {name}: {list(tensor.shape)}, std {tensor.std():.4f}, largest {tensor.abs().max():.4f}")
    files.write(f"{tiny.FILES}.safetensors", made)


if __name__ == "__main__":
    main()
