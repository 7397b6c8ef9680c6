#!/usr/bin/env python3
"""An example for check_peers.py: the tiny model of the golden files as a diffusers folder and as a single file, a LoRA
file in kohya layout, and outputs computed with the LoRA merged into the weights by hand, without PEFT.

    make_example.py FOLDER [--convolutions]

`--convolutions`: the LoRA also on the convolutions of resnets and samplers.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))

import synthetic
import tiny
import torch
import training
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file

RANK, ALPHA = 4, 2.0
REST = dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1)

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}


def unet_name(name):
    """A U-Net weight's name in the original layout."""
    path, kind = name.rsplit(".", 1)
    if path in UNET_ENDS:
        return f"{UNET_ENDS[path]}.{kind}"
    if m := re.fullmatch(r"(down|up)_blocks\.(\d)\.(down|up)samplers\.0\.conv", path):
        i = int(m[2])
        return f"input_blocks.{3 + 3 * i}.0.op.{kind}" if m[1] == "down" else (
            f"output_blocks.{2 + 3 * i}.{1 if i == 0 else 2}.conv.{kind}"
        )
    m = re.fullmatch(r"(down_blocks|up_blocks|mid_block)\.(?:(\d)\.)?(resnets|attentions)\.(\d)\.(.+)", path)
    i, j, attention, inner = int(m[2] or 0), int(m[4]), m[3] == "attentions", m[5]
    inner = inner if attention else RESNET[inner]
    place = {
        "down_blocks": f"input_blocks.{1 + 3 * i + j}.{int(attention)}",
        "up_blocks": f"output_blocks.{3 * i + j}.{int(attention)}",
        "mid_block": f"middle_block.{1 if attention else 2 * j}",
    }[m[1]]
    return f"{place}.{inner}.{kind}"


def vae_name(name):
    """An autoencoder weight's name in the original layout."""
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    for new, old in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f"attn_1.{new}.", f"attn_1.{old}.")
    return name.replace("conv_shortcut", "nin_shortcut")


def single_file(unet, vae, text):
    state = {f"model.diffusion_model.{unet_name(name)}": value for name, value in unet.state_dict().items()}
    for name, value in vae.state_dict().items():
        old = vae_name(name)
        if ".attn_1." in old and value.dim() == 2:
            value = value[:, :, None, None]
        state[f"first_stage_model.{old}"] = value
    for name, value in text.state_dict().items():
        state[f"cond_stage_model.transformer.{tiny.text_name(name)}"] = value
    return {name: value.contiguous().clone() for name, value in state.items()}


def lora_and_merge(model, component, prefix, targets, zero=()):
    """The LoRA's tensors in kohya layout; `model` gets them merged. Modules in `zero` have an up of zeros."""
    tensors = {}
    for path in targets:
        module = model.get_submodule(path)
        canonical = tiny.text_name(path) if component == "text_encoder" else path
        weight = module.weight
        down_shape = (RANK, *weight.shape[1:])
        up_shape = (weight.shape[0], RANK, *(1 for _ in weight.shape[2:]))
        down = torch.from_numpy(synthetic.weight(f"lora.{component}.{canonical}.down", down_shape))
        up = torch.from_numpy(synthetic.lora_up(f"lora.{component}.{canonical}.up", up_shape)).clone()
        if path in zero:
            up.zero_()
        name = f"{prefix}_{canonical.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
        delta = (up.double().flatten(1) @ down.double().flatten(1)).reshape(weight.shape)
        weight.data = (weight.double() + ALPHA / RANK * delta).float()
    return tensors


def answers(unet, text, inputs):
    with torch.no_grad():
        return (
            unet(inputs["sample"], inputs["timestep"], inputs["context"]).sample,
            text(input_ids=inputs["input_ids"]).last_hidden_state,
        )


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    unet, vae, text = tiny.unet(), tiny.vae(), tiny.text_encoder()
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, unet=unet, tokenizer=None, scheduler=DDIMScheduler(**tiny.SCHEDULE, **REST),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "base")
    save_file(single_file(unet, vae, text), folder / "base.safetensors")
    inputs = {
        "sample": tiny.given("input.unet.sample", (2, 4, 8, 8)),
        "timestep": torch.tensor([10, 999]),
        "context": tiny.given("input.unet.context", (2, 77, 128)),
        "input_ids": tiny.training_rows(),
    }
    before = answers(unet, text, inputs)
    unet_targets, text_targets = training.default_targets(unet, text, convolutions="--convolutions" in sys.argv)
    # The text encoder's q and v only. diffusers finds text encoder layers by their out_proj: it stands there as zeros.
    text_targets = [path for path in text_targets if path.endswith(("q_proj", "v_proj", "out_proj"))]
    zero = {path for path in text_targets if path.endswith("out_proj")}
    lora = lora_and_merge(unet, "unet", "lora_unet", unet_targets)
    lora |= lora_and_merge(text, "text_encoder", "lora_te", text_targets, zero)
    after = answers(unet, text, inputs)
    save_file(lora, folder / "lora.safetensors")
    outputs = inputs | {
        "output_base": before[0], "text_base": before[1], "output_lora": after[0], "text_lora": after[1],
    }
    save_file({name: value.contiguous() for name, value in outputs.items()}, folder / "outputs.safetensors")
    print(f"{folder}: base, base.safetensors, lora.safetensors ({len(lora) // 3} modules), outputs.safetensors")


if __name__ == "__main__":
    main()
