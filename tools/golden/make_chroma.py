"""chroma/expected.safetensors: what diffusers, transformers and PEFT make of a tiny model of Chroma's kind: captions' states,
20 steps of AdamW and four steps of the pipeline's sampler. Weights and inputs are made from their names
(`synthetic.py`); latents are those of `z_image`, whose autoencoder it has; the vocabulary is lora-data's `t5`. Velocities and
gradients of the transformer are in `transformers/chroma.safetensors` (`make_transformers.py`)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from diffusers import AutoencoderKL, ChromaPipeline, FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

import files
import training
from make_transformers import chroma, pack, places, targets, unpack
from make_z_image import PROMPTS, VAE, drawn_sigmas, filled, given

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

CAPTION = 48
TEXT = dict(
    vocab_size=400, d_model=CAPTION, d_kv=16, d_ff=96, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu",
    relative_attention_max_distance=128, relative_attention_num_buckets=32, dropout_rate=0.0,
)
# The published scheduler's settings are FLUX.1's.
SCHEDULER = dict(
    shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
)
BATCH, LENGTHS = (2, 16, 8, 8), [12, 9]


class Masked(ChromaPipeline):
    """diffusers hands its mask on as numbers, which are added to the scores: what is to be hidden is seen by half. The model was
    trained with what this says, truth values."""

    def _prepare_attention_mask(self, *args, **kwargs):
        mask = super()._prepare_attention_mask(*args, **kwargs)
        return None if mask is None else mask.bool()


def transformer():
    return filled(chroma()[0], "transformer")


def pipeline():
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    text = filled(T5EncoderModel(T5Config(**TEXT)), "text_encoder")
    return Masked(scheduler, filled(AutoencoderKL(**VAE), "vae"), text, T5TokenizerFast.from_pretrained(files.T5), transformer())


def velocity(model, latents, sigmas, context):
    """Of a batch whose captions differ in length."""
    _, _, height, width = latents.shape
    text = torch.arange(context.shape[1]) < torch.tensor(LENGTHS)[:, None]
    answer = model(
        pack(latents), encoder_hidden_states=context, timestep=sigmas, img_ids=places(height, width),
        txt_ids=torch.zeros(context.shape[1], 3),
        attention_mask=torch.cat([text, torch.ones(len(LENGTHS), height * width // 4, dtype=torch.bool)], 1),
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
            states, _, mask, *_ = pipe.encode_prompt(prompt)
            made[f"text.{index}"] = states[0][mask[0].bool()]
        noise = pack(given("input.sample.noise", (1, 16, 8, 12)))
        for name, guidance in (("sample.plain", 1.0), ("sample.guided", 4.0)):
            latents = pipe(
                prompt=PROMPTS[0], negative_prompt=PROMPTS[1], latents=noise.clone(), output_type="latent", height=64, width=96,
                num_inference_steps=4, guidance_scale=guidance,
            ).images
            made[name] = unpack(latents, 8, 12)
        made["sample.sigmas"] = pipe.scheduler.sigmas
    made |= trajectory()
    files.write("chroma/expected.safetensors", made)


if __name__ == "__main__":
    main()
