"""anima/expected.safetensors: what diffusers, transformers and PEFT make of a tiny model of Anima's kind: captions' states,
20 steps of AdamW and four steps of the pipeline's sampler. Weights and inputs are made from their names
(`synthetic.py`); latents are those of `qwen_image`, whose autoencoder it has; the vocabularies are `z_image/tokenizer` and
lora-data's `t5`. Velocities and gradients of the transformer and states of the text conditioner alone are in `transformers`
(`make_transformers.py`)."""

import os
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from diffusers import (
    AnimaAutoBlocks,
    AnimaTextConditioner,
    AutoencoderKLQwenImage,
    ClassifierFreeGuidance,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.transformers import transformer_cosmos
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model, T5TokenizerFast

import files
import synthetic
import training
from make_qwen_image import VAE
from make_transformers import targets, with_published_norms
from make_z_image import PROMPTS, drawn_sigmas, filled, given

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

# The mask of what fills a picture up, which is zero, is all that torchvision would resize.
nearest = lambda mask, size, interpolation: torch.nn.functional.interpolate(mask, size)
transformer_cosmos.transforms = SimpleNamespace(
    functional=SimpleNamespace(resize=nearest), InterpolationMode=SimpleNamespace(NEAREST="nearest")
)

CAPTION = 32
TRANSFORMER = dict(
    in_channels=16, out_channels=16, num_layers=2, attention_head_dim=32, num_attention_heads=2, text_embed_dim=CAPTION,
    adaln_lora_dim=24, rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None, concat_padding_mask=True,
)
TEXT = dict(
    vocab_size=640, hidden_size=CAPTION, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6,
    tie_word_embeddings=True,
)
CONDITIONER = dict(
    source_dim=CAPTION, target_dim=CAPTION, model_dim=CAPTION, num_layers=2, num_attention_heads=2, mlp_ratio=2.0,
    target_vocab_size=400,
)
BATCH = (2, 16, 8, 8)


def text_encoder():
    model = Qwen3Model(Qwen3Config(**TEXT))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(synthetic.weight(f"text_encoder.model.{name}", tuple(parameter.shape))))
    return model.eval().requires_grad_(False)


def transformer():
    return with_published_norms(filled(CosmosTransformer3DModel(**TRANSFORMER), "transformer"))


def pipeline():
    pipe = AnimaAutoBlocks().init_pipeline()
    pipe.update_components(
        tokenizer=Qwen2Tokenizer.from_pretrained(files.FOLDER / "z_image" / "tokenizer"),
        t5_tokenizer=T5TokenizerFast.from_pretrained(files.T5),
        text_encoder=text_encoder(),
        text_conditioner=filled(AnimaTextConditioner(**CONDITIONER), "text_conditioner"),
        transformer=transformer(),
        vae=filled(AutoencoderKLQwenImage(**VAE), "vae"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return pipe


def velocity(model, latents, sigmas, context):
    mask = torch.zeros(1, 1, *latents.shape[-2:])
    return model(latents.unsqueeze(2), timestep=sigmas, encoder_hidden_states=context, padding_mask=mask).sample.squeeze(2)


def trajectory():
    model, context = transformer(), given("input.train.context", (2, 12, CAPTION))
    answer = lambda model, latents, sigmas: velocity(model, latents, sigmas, context)
    return training.flow_trajectory(model, targets(model), answer, BATCH, drawn_sigmas())


def main():
    made, pipe = {}, pipeline()
    with torch.no_grad():
        for index, prompt in enumerate(PROMPTS):
            state = pipe(prompt=prompt, num_inference_steps=1, height=64, width=64, output_type="pt")
            read = int(state.get("t5_attention_mask").sum())
            states = state.get("prompt_embeds")[0]
            assert states.shape[0] == 512 and not states[read:].any()
            made[f"text.{index}"] = states[:read]
        noise = given("input.sample.noise", (1, 16, 8, 12)).unsqueeze(2)
        for name, guidance in (("sample.plain", 1.0), ("sample.guided", 4.0)):
            pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance))
            state = pipe(
                prompt=PROMPTS[0], negative_prompt=PROMPTS[1], latents=noise.clone(), height=64, width=96, num_inference_steps=4,
                output_type="pt",
            )
            made[name] = state.get("latents").squeeze(2)
        made["sample.sigmas"] = pipe.scheduler.sigmas
    made |= trajectory()
    files.write("anima/expected.safetensors", made)


if __name__ == "__main__":
    main()
