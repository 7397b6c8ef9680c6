#!/usr/bin/env python3
"""Do a diffusers pipeline and our command mean the same by a LoRA, in both directions?

    check_pipelines.py --base FOLDER [--command target/release/lora] [--pictures assets/emoji-64] [--size 64] [--convert]

`--base`: any picture base that both know, as a diffusers folder (a small random one will do). Ours to them: `lora train` makes a
LoRA in a few steps; a pipeline that loads it and a pipeline of the folder that `lora merge` writes must give the same latents.
Theirs to us: PEFT draws an adapter on the pipeline's networks, `save_lora_weights` writes it, `lora merge` reads it; the same
latents again. `--convert`: what our command trained is written in diffusers' layout first (`lora convert`), as Anima needs it and
small models of FLUX.1's and Chroma's kind, whose kohya files diffusers takes apart by the published widths. Exit 0 if every tensor of both files was used and all relative errors are within tolerance, else 1.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import models  # first: it switches the network off
import torch
from check_peers import Warnings, adapted, relative
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

# What PEFT adapts of each network in the direction from them to us; FLUX.2's single blocks have one layer for the first three.
ENCODER = ["q_proj", "k_proj", "v_proj", "out_proj"]
DENOISER = ["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"]


def anima(folder):
    """Its pipeline, which diffusers puts together of steps; torchvision resizes a mask there."""
    from diffusers import AnimaAutoBlocks, AnimaTextConditioner, AutoencoderKLQwenImage, CosmosTransformer3DModel
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import Qwen2Tokenizer, Qwen3Model, T5TokenizerFast

    parts = dict(
        tokenizer=Qwen2Tokenizer, t5_tokenizer=T5TokenizerFast, text_encoder=Qwen3Model, text_conditioner=AnimaTextConditioner,
        transformer=CosmosTransformer3DModel, vae=AutoencoderKLQwenImage, scheduler=FlowMatchEulerDiscreteScheduler,
    )
    pipeline = AnimaAutoBlocks().init_pipeline()
    pipeline.update_components(**{name: part.from_pretrained(folder / name) for name, part in parts.items()})
    return pipeline


def loaded(folder):
    if (folder / "text_conditioner").is_dir():
        return anima(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline, size):
    given = dict(prompt="a small picture of a cat", num_inference_steps=4, height=size, width=size)
    with torch.no_grad():
        if hasattr(pipeline, "text_conditioner"):
            return pipeline(output_type="pt", generator=torch.Generator().manual_seed(1), **given).get("latents")
        return pipeline(output_type="latent", generator=torch.Generator().manual_seed(1), **given).images


def networks(pipeline):
    """The networks that a LoRA may adapt, by the pipeline's names."""
    names = ("unet", "transformer", "text_encoder", "text_encoder_2")
    return {name: network for name in names if (network := getattr(pipeline, name, None)) is not None}


def adapts(key):
    """How many layers of the pipeline a layer of the file is: the original tree of FLUX.2 has queries, keys and values in one."""
    return 3 if "_attn_qkv." in key else 1


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def trained(options, folder):
    """A LoRA of our command, whose few steps are large enough to be seen."""
    config = folder / "config.json"
    keys = dict(
        base_model=str(options.base), train_data_dir=str(options.pictures), output_dir=str(folder), output_name="ours",
        max_resolution=options.size, max_train_steps=4, learning_rate=0.02, lora_rank=4, lora_alpha=2, device="cpu",
        save_precision="fp32", precision="fp32", seed=1,
    )
    if not (options.base / "transformer").is_dir():  # bases with a transformer have no such key
        keys["train_text_encoder"] = options.text_encoder
    config.write_text(json.dumps(keys))
    run(options.command, "train", config)
    file = folder / "ours.safetensors"
    if not options.convert:
        return file
    converted = folder / "converted.safetensors"
    run(options.command, "convert", file, "--to", "diffusers", "--out", converted)
    return converted


def drawn(options, folder):
    """An adapter of PEFT's on the networks of the pipeline, written by the pipeline. Returns the file and how many layers it has."""
    pipeline, layers = loaded(options.base), {}
    torch.manual_seed(2)
    for name, network in networks(pipeline).items():
        if "encoder" in name and not options.text_encoder:
            continue
        targets = ENCODER if "encoder" in name else DENOISER
        network.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
        for path, value in network.named_parameters():
            if "lora_B" in path:
                torch.nn.init.normal_(value, std=0.1)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(network)
    if hasattr(pipeline, "text_conditioner"):  # it reads such files and writes none
        save_file({f"transformer.{name}": value for name, value in layers["transformer_lora_layers"].items()}, folder / "theirs.safetensors")
    else:
        pipeline.save_lora_weights(folder, weight_name="theirs.safetensors", **layers)
    return folder / "theirs.safetensors"


def compared(options, file, folder, name, problems):
    """Latents with the file loaded by the pipeline against those of the base that our command merged it into."""
    pipeline = loaded(options.base)
    without, warnings = latents(pipeline, options.size), Warnings()
    pipeline.load_lora_weights(file)
    count = sum(adapted(network) for network in networks(pipeline).values())
    with safe_open(file, framework="pt") as opened:
        expected = sum(adapts(key) for key in opened.keys() if ".lora_down." in key or ".lora_A." in key or ".lora.down." in key)
    live = latents(pipeline, options.size)
    merged = folder / f"merged-{name}"
    run(options.command, "merge", "--base", options.base, "--lora", file, "--out", merged)
    ours = latents(loaded(merged), options.size)
    error, effect = relative(ours, live), relative(live, without)
    print(f"{name}: {count} of {expected} layers adapted, relative error {error:.1e} where the LoRA changes {effect:.1e}")
    # A network that the file leaves alone is named by a warning of its own.
    told = [message for message in warnings.messages if options.text_encoder or "No LoRA keys associated to " not in message]
    problems += [f"{name}: {message}" for message in told]
    if count != expected:
        problems.append(f"{name}: the file has {expected} layers, the pipeline adapted {count}")
    # The negations catch NaN.
    if not error <= options.tolerance:
        problems.append(f"{name}: latents differ by {error:.1e}, allowed {options.tolerance:.0e}")
    if not effect >= 100 * options.tolerance:
        problems.append(f"{name}: the LoRA changes latents by {effect:.1e} alone, which shows nothing")


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--base", required=True, type=pathlib.Path)
    arguments.add_argument("--command", default="target/release/lora")
    arguments.add_argument("--pictures", default="assets/emoji-64", type=pathlib.Path)
    arguments.add_argument("--size", default=64, type=int)
    arguments.add_argument("--convert", action="store_true", help="hand what was trained over in diffusers' layout")
    arguments.add_argument("--text-encoder", action="store_true", help="adapt the text encoders too")
    arguments.add_argument("--tolerance", default=2e-4, type=float, help="of latents, relative (default 2e-4)")
    options = arguments.parse_args()
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        compared(options, trained(options, folder), folder, "ours", problems)
        compared(options, drawn(options, folder), folder, "theirs", problems)
    for problem in problems:
        print(f"FAILED {problem}")
    print("failed" if problems else "all layers used, all latents agree")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
