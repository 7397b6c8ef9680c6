"""The tiny models of the golden files: the architectures of Stable Diffusion 1.5 and 2.1 with few channels, weights by
formula. `GOLDEN_MODEL` says which: `sd1` (the default) or `sd2`."""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import synthetic

THREADS = int(os.environ.get("GOLDEN_THREADS", "1"))
MODEL = os.environ.get("GOLDEN_MODEL", "sd1")
DTYPE = {"float32": torch.float32, "float64": torch.float64}[os.environ.get("GOLDEN_DTYPE", "float32")]
BOS, EOS, LENGTH = 49406, 49407, 77

torch.set_num_threads(THREADS)
torch.use_deterministic_algorithms(True)
warnings.filterwarnings("ignore", message="CUDA initialization")

UNET = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(32, 64, 64, 64),
    layers_per_block=2,
    cross_attention_dim=128,
    attention_head_dim=8,  # in Stable Diffusion 1.x: the number of heads
    norm_num_groups=32,
)
VAE = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(32, 32, 64, 64),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    norm_num_groups=32,
    sample_size=64,
    scaling_factor=0.18215,
)
TEXT = dict(
    vocab_size=49408,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=LENGTH,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
# What the published configs of Stable Diffusion 2.1 (768 px) have otherwise: heads of one width at every level, linear
# projections, the exact GELU, rows padded with token 0, velocity. Its autoencoder is Stable Diffusion 1.5's.
if MODEL == "sd2":
    UNET |= dict(
        block_out_channels=(32, 64, 96, 96),
        cross_attention_dim=96,
        attention_head_dim=[1, 2, 3, 3],
        use_linear_projection=True,
    )
    TEXT |= dict(hidden_size=96, intermediate_size=384, num_attention_heads=3, hidden_act="gelu")
# Where the golden files are, and how their names begin.
FILES = {"sd1": "tiny", "sd2": "sd2/tiny"}[MODEL]
PAD = {"sd1": EOS, "sd2": 0}[MODEL]
CONTEXT = UNET["cross_attention_dim"]

# The published scheduler/scheduler_config.json, what concerns the noise.
SCHEDULE = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type={"sd1": "epsilon", "sd2": "v_prediction"}[MODEL],
)


def text_name(name):
    """A text encoder's module or state-dict name with the `text_model.` level."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def fill(module, component):
    """Gives every parameter its formula value, and freezes it."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            canonical = text_name(name) if component == "text_encoder" else name
            values = synthetic.weight(f"{component}.{canonical}", tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values))
    module = module if DTYPE == torch.float32 else module.to(DTYPE)
    return module.eval().requires_grad_(False)


def unet():
    return fill(UNet2DConditionModel(**UNET), "unet")


def vae():
    return fill(AutoencoderKL(**VAE), "vae")


def text_encoder():
    return fill(CLIPTextModel(CLIPTextConfig(**TEXT)), "text_encoder")


def given(name, shape):
    """A named input as a tensor."""
    return torch.from_numpy(synthetic.activation(name, shape)).to(DTYPE)


def token_row(ids):
    """BOS, ids, EOS, padded to 77."""
    assert len(ids) <= LENGTH - 2
    return [BOS, *ids, EOS] + [PAD] * (LENGTH - 2 - len(ids))


def training_rows():
    """The two token rows that training uses."""
    return torch.tensor([
        token_row([550, 16327, 539, 320, 736, 3055, 267, 3989, 1844]),
        token_row([320, 1125, 539, 320, 2368]),
    ])
