"""qwen_image/expected.safetensors: what diffusers, transformers and PEFT make of a tiny model of Qwen-Image's kind: captions'
states, latents, 20 steps of AdamW and four steps of the pipeline's sampler. Weights and inputs are made from their names
(`synthetic.py`); the vocabulary is `z_image/tokenizer`. Velocities and gradients of the transformer are in
`transformers/qwen_image.safetensors` (`make_transformers.py`)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

import files
import synthetic
import training
from make_transformers import pack, targets, unpack
from make_z_image import PROMPTS, drawn_sigmas, filled, given

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

CAPTION = 32
TRANSFORMER = dict(
    patch_size=2, in_channels=64, out_channels=16, num_layers=2, attention_head_dim=32, num_attention_heads=2,
    joint_attention_dim=CAPTION, guidance_embeds=False, axes_dims_rope=(4, 14, 14),
)
TEXT = dict(
    vocab_size=640, hidden_size=CAPTION, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=128000, rms_norm_eps=1e-6, rope_theta=1e6,
    rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, use_sliding_window=False, tie_word_embeddings=True,
)
# Of the vision tower, which nothing asks, as little as there can be.
VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=1, out_hidden_size=CAPTION, fullatt_block_indexes=[0])
# Statistics of latents are the published ones, which are diffusers' defaults.
VAE = dict(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
# The published scheduler's settings.
SCHEDULER = dict(
    shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
    shift_terminal=0.02, time_shift_type="exponential",
)
BATCH = (2, 16, 8, 8)
LENGTHS = [12, 9]


def text_encoder():
    """Its parameters are called as the language model's alone, which is what text is read by."""
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True))
    inner = model.model.language_model
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            parameter.copy_(torch.from_numpy(synthetic.weight(f"text_encoder.model.{name}", tuple(parameter.shape))))
    return model.eval().requires_grad_(False)


def transformer():
    return filled(QwenImageTransformer2DModel(**TRANSFORMER), "transformer")


def pipeline():
    tokenizer = Qwen2Tokenizer.from_pretrained(files.FOLDER / "z_image" / "tokenizer")
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    return QwenImagePipeline(scheduler, filled(AutoencoderKLQwenImage(**VAE), "vae"), text_encoder(), tokenizer, transformer())


def velocity(model, latents, sigmas, context):
    batch, _, height, width = latents.shape
    mask = torch.zeros(batch, context.shape[1], dtype=torch.long)
    for item, length in enumerate(LENGTHS):
        mask[item, :length] = 1
    answer = model(
        pack(latents), encoder_hidden_states=context, encoder_hidden_states_mask=mask, timestep=sigmas,
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
    ).sample
    return unpack(answer, height, width)


def trajectory():
    model, context = transformer(), given("input.train.context", (2, max(LENGTHS), CAPTION))
    answer = lambda model, latents, sigmas: velocity(model, latents, sigmas, context)
    return training.flow_trajectory(model, targets(model), answer, BATCH, drawn_sigmas())


def main():
    made, pipe = {}, pipeline()
    with torch.no_grad():
        for index, prompt in enumerate(PROMPTS):
            states, mask = pipe.encode_prompt(prompt)
            made[f"text.{index}"] = states[0] if mask is None else states[0][mask[0].bool()]
        pixels = given("input.vae.pixels", (2, 3, 64, 48)).unsqueeze(2)
        encoded = pipe.vae.encode(pixels).latent_dist
        made["vae.mean"], made["vae.logvar"] = encoded.mean[:, :, 0], encoded.logvar[:, :, 0]
        said = pipe.vae.config
        means, deviations = (torch.tensor(own).view(1, -1, 1, 1) for own in (said.latents_mean, said.latents_std))
        made["vae.normalised"] = (made["vae.mean"] - means) / deviations
        made["vae.decoded"] = pipe.vae.decode(given("input.vae.latents", (2, 16, 8, 6)).unsqueeze(2)).sample[:, :, 0]
        noise = pack(given("input.sample.noise", (1, 16, 8, 12)))
        for name, guidance in (("sample.plain", 1.0), ("sample.guided", 4.0)):
            latents = pipe(
                prompt=PROMPTS[0], negative_prompt=PROMPTS[1], latents=noise.clone(), output_type="latent", height=64, width=96,
                num_inference_steps=4, true_cfg_scale=guidance,
            ).images
            made[name] = unpack(latents, 8, 12)
        made["sample.sigmas"] = pipe.scheduler.sigmas
    made |= trajectory()
    files.write("qwen_image/expected.safetensors", made)


if __name__ == "__main__":
    main()
