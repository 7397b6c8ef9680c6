"""flux2/expected.safetensors: what diffusers, transformers and PEFT make of a tiny model of FLUX.2 klein's kind: captions'
states, latents, 20 steps of AdamW and four steps of the pipeline's sampler. Weights and inputs are made from their names
(`synthetic.py`); the vocabulary is `z_image/tokenizer`. Velocities and gradients of the transformer are in
`transformers/flux2.safetensors` (`make_transformers.py`)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

import files
import synthetic
import training
from make_transformers import flux2_velocity, targets
from make_z_image import PROMPTS, drawn_sigmas, filled, given

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

CAPTION = 32
TRANSFORMER = dict(
    patch_size=1, in_channels=128, num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
    joint_attention_dim=3 * CAPTION, mlp_ratio=3.0, axes_dims_rope=(8, 8, 8, 8), rope_theta=2000, guidance_embeds=False,
)
TEXT = dict(
    vocab_size=640, hidden_size=CAPTION, intermediate_size=48, num_hidden_layers=28, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6,
    tie_word_embeddings=True,
)
VAE = dict(
    latent_channels=32, block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, norm_num_groups=32,
)
# The published scheduler's settings.
SCHEDULER = dict(
    shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
)
# Rows of a caption's 512 states that are kept: some of the caption's own, and of those that fill it up.
ROWS = [0, 5, 17, 31, 60, 150, 511]
BATCH = (2, 32, 8, 8)


def transformer():
    return filled(Flux2Transformer2DModel(**TRANSFORMER), "transformer")


def vae():
    model = filled(AutoencoderKLFlux2(**VAE), "vae")
    for name in ("running_mean", "running_var"):
        buffer = getattr(model.bn, name)
        buffer.copy_(torch.from_numpy(synthetic.weight(f"vae.bn.{name}", tuple(buffer.shape))))
    return model


def pipeline():
    tokenizer = Qwen2Tokenizer.from_pretrained(files.FOLDER / "z_image" / "tokenizer")
    text = filled(Qwen3ForCausalLM(Qwen3Config(**TEXT)), "text_encoder")
    return Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(**SCHEDULER), vae(), text, tokenizer, transformer())


def normalised(pipe, latents):
    squares, norm = pipe._patchify_latents(latents), pipe.vae.bn
    squares = (squares - norm.running_mean.view(1, -1, 1, 1)) / (norm.running_var.view(1, -1, 1, 1) + norm.eps).sqrt()
    return pipe._unpatchify_latents(squares)


def trajectory(texts):
    model = transformer()
    answer = lambda model, latents, sigmas: flux2_velocity(model, latents, sigmas, texts, None)
    return training.flow_trajectory(model, targets(model), answer, BATCH, drawn_sigmas())


def main():
    made, pipe = {}, pipeline()
    with torch.no_grad():
        texts, _ = pipe.encode_prompt(list(PROMPTS))
        made |= {f"text.{index}": states[ROWS] for index, states in enumerate(texts)}
        encoded = pipe.vae.encode(given("input.vae.pixels", (2, 3, 64, 48))).latent_dist
        made["vae.mean"], made["vae.logvar"] = encoded.mean, encoded.logvar
        made["vae.normalised"] = normalised(pipe, encoded.mean)
        made["vae.decoded"] = pipe.vae.decode(given("input.vae.latents", (2, 32, 8, 6))).sample
        # The pipeline takes latents as squares of 2 by 2, and gives them back as its autoencoder decodes them.
        noise = pipe._patchify_latents(given("input.sample.noise", (1, 32, 8, 12)))
        for name, guidance in (("sample.plain", 1.0), ("sample.guided", 4.0)):
            latents = pipe(
                prompt=PROMPTS[0], latents=noise.clone(), output_type="latent", height=64, width=96, num_inference_steps=4,
                guidance_scale=guidance,
            ).images
            made[name] = normalised(pipe, latents)
        made["sample.sigmas"] = pipe.scheduler.sigmas
    made |= trajectory(given("input.train.context", (2, 12, 3 * CAPTION)))
    files.write("flux2/expected.safetensors", made)


if __name__ == "__main__":
    main()
