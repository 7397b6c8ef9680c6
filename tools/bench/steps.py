"""What the scripts of this folder that run a network share: their arguments, and a network of Stable Diffusion 1.5's, XL's or
Z-Image's size. What they do with it is theirs.
"""

import sys

import torch
from diffusers import UNet2DConditionModel, ZImageTransformer2DModel

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


def frozen_z_image(dtype, layers):
    """The same, of so many layers."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        network = ZImageTransformer2DModel(n_layers=layers)
    return network.requires_grad_(False).to(dtype)
