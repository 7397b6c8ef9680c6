"""crates/lora-io/tests/golden/families: Stable Diffusion 2 and XL with a handful of channels, in the layouts that they are
published in, and with a LoRA merged into them.

For each family: `NAME.safetensors`, one file in the original layout; `NAME-folder.safetensors`, the same weights under
the names of a diffusers folder (`unet.…`, `text_encoder_2.…`); `NAME-lora.safetensors`, a LoRA in kohya's layout;
`NAME-merged.safetensors`, the weights that differ after diffusers loaded and fused it.

The original names are written down here, and diffusers' own converters must lead them back to the weights they came from.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils as converters
from safetensors.torch import save
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

FOLDER = Path(__file__).resolve().parents[2] / "crates" / "lora-io" / "tests" / "golden" / "families"
RANK, ALPHA = 2, 1.0
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def text(width, heads, layers, with_projection):
    config = CLIPTextConfig(
        vocab_size=12, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, projection_dim=width,
        num_attention_heads=heads, max_position_embeddings=5, bos_token_id=10, eos_token_id=11, pad_token_id=11,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)


def parts(family):
    """The networks by component."""
    xl = family == "sdxl"
    common = dict(in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=2, use_linear_projection=True)
    if xl:
        unet = UNet2DConditionModel(
            block_out_channels=(4, 4, 8), cross_attention_dim=12, attention_head_dim=(1, 1, 2), sample_size=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 1), addition_embed_type="text_time", addition_time_embed_dim=2,
            projection_class_embeddings_input_dim=20, **common,
        )
    else:
        unet = UNet2DConditionModel(
            block_out_channels=(4, 4, 8, 8), cross_attention_dim=8, attention_head_dim=(1, 1, 2, 2), sample_size=8,
            **common,
        )
    vae = AutoencoderKL(
        block_out_channels=(4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )
    encoders = {"text_encoder": text(4, 1, 2, False), "text_encoder_2": text(8, 2, 2, True)}
    if not xl:
        encoders = {"text_encoder": text(8, 2, 2, False)}
    made = {"unet": unet, "vae": vae, **encoders}
    draw = torch.Generator().manual_seed(len(family))
    for network in made.values():
        for values in network.parameters():
            values.data = torch.randint(-60, 61, values.shape, generator=draw) / 64.0
        network.eval().requires_grad_(False)
    return made


def unet_paths(config):
    """diffusers' prefix: the original one."""
    paths = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    levels, place = len(config.block_out_channels), 1
    for level in range(levels):
        for layer in range(2):
            paths[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{place}.0"
            paths[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{place}.1"
            place += 1
        if level + 1 < levels:
            paths[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
            place += 1
    for level in range(levels):
        for layer in range(3):
            place = 3 * level + layer
            paths[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{place}.0"
            paths[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{place}.1"
        if level + 1 < levels:
            inner = 2 if "CrossAttn" in config.up_block_types[level] else 1
            paths[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{place}.{inner}.conv"
    return paths


def vae_paths(config):
    levels = len(config.block_out_channels)
    paths = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for coder in ("encoder", "decoder"):
        paths |= {f"{coder}.{name}": f"{coder}.{name}" for name in ("conv_in", "conv_out")}
        paths[f"{coder}.conv_norm_out"] = f"{coder}.norm_out"
        for place in (0, 1):
            paths[f"{coder}.mid_block.resnets.{place}"] = f"{coder}.mid.block_{place + 1}"
        for ours, theirs in attention.items():
            paths[f"{coder}.mid_block.attentions.0.{ours}"] = f"{coder}.mid.attn_1.{theirs}"
    for level in range(levels):
        up = levels - 1 - level
        for layer in range(2):
            paths[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
            paths[f"decoder.up_blocks.{level}.resnets.{layer}"] = f"decoder.up.{up}.block.{layer}"
        paths[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        paths[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{up}.upsample.conv"
    return paths


def renamed(state, paths):
    made = {}
    for name, values in state.items():
        prefix = max((path for path in paths if name.startswith(path + ".")), key=len)
        rest = name[len(prefix) + 1 :]
        if ".resnets." in prefix and "attn" not in rest:
            part, _, end = rest.partition(".")
            rest = f"{RESNET[part]}.{end}" if not prefix.startswith(("encoder", "decoder")) else rest
        made[f"{paths[prefix]}.{rest}".replace("conv_shortcut", "nin_shortcut")] = values
    return made


def bare(state):
    """A text encoder's names without the `text_model.` level."""
    return {name.removeprefix("text_model."): values for name, values in state.items() if "position_ids" not in name}


def open_clip(state, last):
    """OpenCLIP's names; `last` is a layer that the model does not use."""
    state = bare(state)
    made = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.625),
    }
    for layer in range(2):
        start, block = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            made |= {f"{block}{theirs}.{kind}": state[f"{start}{ours}.{kind}"] for ours, theirs in OPEN_CLIP.items()}
            fused = [state[f"{start}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            made[f"{block}attn.in_proj_{kind}"] = torch.cat(fused)
    if last:
        block = {name: values for name, values in made.items() if ".resblocks.1." in name}
        made |= {name.replace("blocks.1.", "blocks.2."): values / 2 for name, values in block.items()}
    width = state["final_layer_norm.weight"].shape[0]
    made["text_projection"] = state.get("text_projection.weight", torch.eye(width)).T.contiguous()
    return made


def single_file(family, networks):
    unet, vae = networks["unet"], networks["vae"]
    made = {"model.diffusion_model." + n: v for n, v in renamed(unet.state_dict(), unet_paths(unet.config)).items()}
    for name, values in renamed(vae.state_dict(), vae_paths(vae.config)).items():
        convolution = ".attn_1." in name and values.ndim == 2
        made["first_stage_model." + name] = values[:, :, None, None] if convolution else values
    first = networks["text_encoder"].state_dict()
    if family == "sdxl":
        prefix = "conditioner.embedders.0.transformer.text_model."
        made |= {prefix + name: values for name, values in bare(first).items()}
        made[prefix + "embeddings.position_ids"] = torch.arange(5)[None]
        second = open_clip(networks["text_encoder_2"].state_dict(), False)
        made |= {"conditioner.embedders.1.model." + name: values for name, values in second.items()}
        made |= {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    else:
        made |= {"cond_stage_model.model." + name: values for name, values in open_clip(first, True).items()}
    made["alphas_cumprod"] = torch.linspace(1, 0, 4)
    return made


def check(family, networks, made):
    """diffusers' converters give the weights back."""
    unet = converters.convert_ldm_unet_checkpoint(dict(made), dict(networks["unet"].config))
    vae = converters.convert_ldm_vae_checkpoint(dict(made), dict(networks["vae"].config))
    last, prefix = ("text_encoder_2", "conditioner.embedders.1.model.")
    if family == "sd2":
        last, prefix = ("text_encoder", "cond_stage_model.model.")
    encoder = converters.convert_open_clip_checkpoint(networks[last], dict(made), prefix=prefix)
    for component, converted in [("unet", unet), ("vae", vae), (last, encoder)]:
        state = {name.removeprefix("text_model."): values for name, values in networks[component].state_dict().items()}
        found = {name.removeprefix("text_model."): values for name, values in converted.items()}
        for name, values in state.items():
            if "position_ids" not in name:
                assert torch.equal(found[name].reshape(values.shape), values), (component, name)


def lora(family, networks):
    """kohya's names: the original tree for SDXL's U-Net, diffusers' for SD 2's."""
    xl, made = family == "sdxl", {}
    draw = torch.Generator().manual_seed(7)
    paths = unet_paths(networks["unet"].config)

    def add(name, module):
        for part, shape in (("down", (RANK, module.in_features)), ("up", (module.out_features, RANK))):
            values = torch.randint(-60, 61, shape, generator=draw) / 256.0
            made[f"{name.replace('.', '_')}.lora_{part}.weight"] = values
        made[f"{name.replace('.', '_')}.alpha"] = torch.tensor(ALPHA)

    for path, module in networks["unet"].named_modules():
        blocks = ("down_blocks.1.attentions.0.", "mid_block.", "up_blocks.1.attentions.2.")
        if isinstance(module, torch.nn.Linear) and path.startswith(blocks) and "resnets" not in path:
            prefix = max((own for own in paths if path.startswith(own + ".")), key=len)
            add("lora_unet." + (paths[prefix] + path[len(prefix) :] if xl else path), module)
    for component in ("text_encoder", "text_encoder_2"):
        prefix = {"text_encoder": "lora_te1." if xl else "lora_te.", "text_encoder_2": "lora_te2."}[component]
        for path, module in networks[component].named_modules() if component in networks else ():
            if isinstance(module, torch.nn.Linear) and "layers" in path:
                add(f"{prefix}text_model.{path.removeprefix('text_model.')}", module)
    return made


def merged(family, networks, adapter):
    """The weights that differ after diffusers fused the adapter."""
    before = folder(networks)
    given = dict(vae=networks["vae"], unet=networks["unet"], scheduler=DDPMScheduler(), tokenizer=None)
    given["text_encoder"] = networks["text_encoder"]
    if family == "sdxl":
        pipeline = StableDiffusionXLPipeline(text_encoder_2=networks["text_encoder_2"], tokenizer_2=None, **given)
    else:
        pipeline = StableDiffusionPipeline(
            safety_checker=None, feature_extractor=None, requires_safety_checker=False, **given
        )
    pipeline.load_lora_weights(dict(adapter))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    changed = {name: values for name, values in folder(networks).items() if not torch.equal(values, before[name])}
    modules = {name.split(".")[0] for name in adapter}
    assert len(changed) == len(modules), (len(changed), len(modules))
    return changed


def folder(networks):
    made = {}
    for component, network in networks.items():
        for name, values in network.state_dict().items():
            if "text_encoder" in component and not name.startswith("text_projection"):
                name = "text_model." + name.removeprefix("text_model.")
            if "position_ids" not in name:
                made[f"{component}.{name}"] = values.clone()
    return made


def write(name, tensors, dtype):
    kept = {key: values.to(dtype) if values.is_floating_point() else values for key, values in tensors.items()}
    (FOLDER / f"{name}.safetensors").write_bytes(save({key: values.contiguous() for key, values in kept.items()}))


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    for family in ("sd2", "sdxl"):
        networks = parts(family)
        made = single_file(family, networks)
        check(family, networks, made)
        adapter = lora(family, networks)
        write(family, made, torch.float16)
        write(f"{family}-folder", folder(networks), torch.float16)
        write(f"{family}-lora", adapter, torch.float32)
        write(f"{family}-merged", merged(family, networks, adapter), torch.float32)


if __name__ == "__main__":
    main()
