"""The tiny models of the golden files: the architectures of Stable Diffusion 1.5, 2.1 and XL with few channels, weights by
formula. `GOLDEN_MODEL` says which: `sd1` (the default), `sd2` or `sdxl`."""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

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
# And those of Stable Diffusion XL: three levels with deeper transformers, two text encoders side by side, of which the second
# gives a pooled vector, and six sizes.
SIZE_WIDTH = 256
if MODEL == "sdxl":
    UNET |= dict(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 2],
        cross_attention_dim=96 + 128,
        attention_head_dim=[1, 2, 3],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=128 + 6 * SIZE_WIDTH,
    )
    TEXT |= dict(hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=3)
TEXT_2 = TEXT | dict(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    hidden_act="gelu",
    projection_dim=128,
)
# Height and width of a picture, top and left edge of the part that is shown, its height and width.
SIZES = [[128.0, 128.0, 0.0, 0.0, 128.0, 128.0], [96.0, 160.0, 8.0, 0.0, 128.0, 128.0]]
# Where the golden files are, and how their names begin.
FILES = {"sd1": "tiny", "sd2": "sd2/tiny", "sdxl": "sdxl/tiny"}[MODEL]
# What rows of tokens are filled up with, for each text encoder.
PADS = {"sd1": [EOS], "sd2": [0], "sdxl": [EOS, 0]}[MODEL]
CONTEXT = UNET["cross_attention_dim"]

# The published scheduler/scheduler_config.json, what concerns the noise.
SCHEDULE = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type={"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}[MODEL],
)


def text_name(name):
    """A text encoder's module or state-dict name with the `text_model.` level."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def fill(module, component):
    """Gives every parameter its formula value, and freezes it."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            canonical = text_name(name) if component.startswith("text_encoder") else name
            values = synthetic.weight(f"{component}.{canonical}", tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values))
    module = module if DTYPE == torch.float32 else module.to(DTYPE)
    return module.eval().requires_grad_(False)


def unet():
    return fill(UNet2DConditionModel(**UNET), "unet")


def vae():
    return fill(AutoencoderKL(**VAE), "vae")


def text_encoders():
    """All of them, by component."""
    made = {"text_encoder": fill(CLIPTextModel(CLIPTextConfig(**TEXT)), "text_encoder")}
    if MODEL == "sdxl":
        second = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2))
        made["text_encoder_2"] = fill(second, "text_encoder_2")
    return made


def given(name, shape):
    """A named input as a tensor."""
    return torch.from_numpy(synthetic.activation(name, shape)).to(DTYPE)


def token_row(ids, pad=PADS[0]):
    """BOS, ids, EOS, padded to 77."""
    assert len(ids) <= LENGTH - 2
    return [BOS, *ids, EOS] + [pad] * (LENGTH - 2 - len(ids))


def training_rows(pad=PADS[0]):
    """The two token rows that training uses."""
    return torch.tensor([
        token_row([550, 16327, 539, 320, 736, 3055, 267, 3989, 1844], pad),
        token_row([320, 1125, 539, 320, 2368], pad),
    ])


def conditions(texts, rows):
    """What the U-Net is conditioned on: the states that it reads, and what its `added_cond_kwargs` are; `rows` are token
    rows for each text encoder."""
    answers = [text(input_ids=ids, output_hidden_states=True) for text, ids in zip(texts.values(), rows)]
    if MODEL != "sdxl":
        return answers[0].last_hidden_state, None
    states = torch.cat([answer.hidden_states[-2] for answer in answers], -1)
    return states, dict(text_embeds=answers[1].text_embeds, time_ids=torch.tensor(SIZES[: len(rows[0])], dtype=DTYPE))
