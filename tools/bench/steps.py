"""What the scripts of this folder that run a network share: their arguments, and a network of Stable Diffusion 1.5's, XL's,
Z-Image's, FLUX.1's or Stable Diffusion 3.5 medium's size. What they do with it is theirs.
"""

import sys

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, ZImageTransformer2DModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def arguments(defaults):
    """The command line's `name=value` over the defaults, as text; ends the program at a name that is not among them."""
    own = dict(defaults)
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name not in own:
            sys.exit(f"{argument}: expected {', '.join(own)}, each with =value")
        own[name] = value
    return own


SIZES = {
    "sd1": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "sdxl": dict(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        cross_attention_dim=2048,
        attention_head_dim=[5, 10, 20],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}


def frozen_unet(dtype, model="sd1"):
    """Random weights that do not train, on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        unet = UNet2DConditionModel(**SIZES[model])
    return unet.requires_grad_(False).to(dtype)


def z_image(layers):
    return ZImageTransformer2DModel(n_layers=layers or 30)


def flux(layers):
    """FLUX.1 dev's sizes are diffusers' defaults; twice as many single blocks as double ones."""
    double = layers or 19
    return FluxTransformer2DModel(num_layers=double, num_single_layers=2 * double, guidance_embeds=True)


def sd3(layers):
    blocks = layers or 24
    return SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=blocks, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(blocks // 2 + 1)),
    )


TRANSFORMERS = {"z_image": z_image, "flux": flux, "sd3": sd3}


def frozen_transformer(dtype, model, layers):
    """The same, of so many layers, as many as published where that is 0."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        network = TRANSFORMERS[model](layers)
    return network.requires_grad_(False).to(dtype)
