"""Loads Stable Diffusion 1.x in diffusers without network: a diffusers folder, or a single file whose sizes are read
from its tensors."""

import json
import os
import re
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

WITHOUT = dict(tokenizer=None, safety_checker=None, feature_extractor=None)

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()


def load(path):
    """The pipeline in float32, without tokenizer and safety checker."""
    path = Path(path)
    if path.is_dir():
        pipeline = StableDiffusionPipeline.from_pretrained(
            path, torch_dtype=torch.float32, local_files_only=True, **WITHOUT
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_configs(Path(folder), shapes(path))
            pipeline = StableDiffusionPipeline.from_single_file(
                str(path), config=folder, torch_dtype=torch.float32, local_files_only=True, **WITHOUT
            )
    pipeline.unet.eval().requires_grad_(False)
    pipeline.text_encoder.eval().requires_grad_(False)
    return pipeline


def shapes(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


def write_configs(folder, shapes):
    """What diffusers' folder of Stable Diffusion 1.x has beside its weights, with this checkpoint's sizes."""
    unet = "model.diffusion_model."
    if f"{unet}label_emb.0.0.weight" in shapes or "cond_stage_model.model.ln_final.weight" in shapes:
        raise SystemExit("only Stable Diffusion 1.x single files; give a diffusers folder for others")
    text = "cond_stage_model.transformer.text_model."
    if f"{text}final_layer_norm.weight" not in shapes:
        raise SystemExit(f"no {text}… in the file: not a complete Stable Diffusion 1.x checkpoint")
    width = shapes[f"{text}final_layer_norm.weight"][0]
    # The original numbers a level's blocks and what halves it in one row.
    stride = min(int(m[1]) for name in shapes if (m := re.match(re.escape(unet) + r"input_blocks\.(\d+)\.0\.op\.", name)))
    vae_levels = {int(m[1]) for name in shapes if (m := re.match(r"first_stage_model\.encoder\.down\.(\d+)\.", name))}
    vae_blocks = {
        int(m[1]) for name in shapes if (m := re.match(r"first_stage_model\.encoder\.down\.0\.block\.(\d+)\.", name))
    }
    layers = {int(m[1]) for name in shapes if (m := re.match(re.escape(text) + r"encoder\.layers\.(\d+)\.", name))}
    configs = {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "tokenizer": [None, None],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 64,
            "in_channels": shapes[f"{unet}input_blocks.0.0.weight"][1],
            "out_channels": shapes[f"{unet}out.2.weight"][0],
            "block_out_channels": [shapes[f"{unet}input_blocks.{1 + stride * i}.0.out_layers.3.weight"][0] for i in range(4)],
            "layers_per_block": stride - 1,
            "cross_attention_dim": shapes[f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"][1],
            "attention_head_dim": 8,
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [
                shapes[f"first_stage_model.encoder.down.{i}.block.0.conv2.weight"][0] for i in sorted(vae_levels)
            ],
            "down_block_types": ["DownEncoderBlock2D"] * len(vae_levels),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae_levels),
            "layers_per_block": len(vae_blocks),
            "latent_channels": 4,
            "sample_size": 512,
        },
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": shapes[f"{text}embeddings.token_embedding.weight"][0],
            "max_position_embeddings": shapes[f"{text}embeddings.position_embedding.weight"][0],
            "hidden_size": width,
            "intermediate_size": shapes[f"{text}encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": len(layers),
            "num_attention_heads": width // 64,
            "hidden_act": "quick_gelu",
            "bos_token_id": 49406,
            "eos_token_id": 49407,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(config))
