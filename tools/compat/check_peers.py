#!/usr/bin/env python3
"""Does a LoRA file of ours mean the same to others? Loads it in diffusers and directly in PEFT and compares outputs.

    check_peers.py --base FILE_OR_FOLDER --lora FILE --outputs FILE.safetensors

`--base`: Stable Diffusion 1.x, a single file or a diffusers folder. `--lora`: kohya layout. `--outputs`: what we
computed, tensors `sample`, `timestep`, `context`, `output_base`, `output_lora` of the U-Net (context taken as it is), and
if the text encoder is trained `input_ids`, `text_base`, `text_lora` (last hidden state after the final norm).

Exit 0 if every key was used and all relative errors are within tolerance, else 1. No network is needed.
"""

import argparse
import logging
import re
import sys

import models  # first: it switches the network off
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file


class Warnings(logging.Handler):
    """Collects what the libraries warn of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []
        for name in ("diffusers", "transformers", "peft"):
            logging.getLogger(name).addHandler(self)

    def emit(self, record):
        message = record.getMessage()
        # Casting is no news; everything that names LoRA, PEFT or keys is.
        if re.search(r"lora|peft|adapter|unexpected|missing|not used|alpha", message, re.IGNORECASE):
            self.messages.append(f"{record.name}: {message}")


def modules_of(lora):
    """{name in the file: (down, up, alpha or None)}; whatever is not LoRA is a failure."""
    names = sorted({key.split(".", 1)[0] for key in lora})
    found, rest = {}, dict(lora)
    for name in names:
        down, up = rest.pop(f"{name}.lora_down.weight", None), rest.pop(f"{name}.lora_up.weight", None)
        alpha = rest.pop(f"{name}.alpha", None)
        if down is None or up is None:
            raise SystemExit(f"{name}: lora_down.weight or lora_up.weight is missing")
        found[name] = (down.float(), up.float(), None if alpha is None else float(alpha))
    return found, sorted(rest)


def file_names(model, prefix, text):
    """{name in the file: module path} of a network's linears and convolutions."""
    table = {}
    for path, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            level = "text_model." if text and not path.startswith("text_model.") else ""
            table[f"{prefix}_{level}{path}".replace(".", "_")] = path
    return table


def adapted(model):
    return sum(isinstance(module, LoraLayer) for module in model.modules())


def inject(model, table, lora, problems):
    """Adapts `model` through PEFT alone; returns the names it took."""
    mine = {table[name]: value for name, value in lora.items() if name in table}
    if not mine:
        return set()
    ranks = {path: down.shape[0] for path, (down, _, _) in mine.items()}
    alphas = {path: ranks[path] if alpha is None else alpha for path, (_, _, alpha) in mine.items()}
    exact = lambda values: {f"^{re.escape(path)}": value for path, value in values.items()}
    config = LoraConfig(
        r=1, lora_alpha=1, target_modules=list(mine), rank_pattern=exact(ranks), alpha_pattern=exact(alphas)
    )
    inject_adapter_in_model(config, model)
    state = {}
    for path, (down, up, _) in mine.items():
        state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"] = down, up
    result = set_peft_model_state_dict(model, state)
    if result.unexpected_keys:
        problems.append(f"PEFT: unexpected keys {result.unexpected_keys[:5]} …")
    missing = [key for key in result.missing_keys if "lora_" in key]
    if missing:
        problems.append(f"PEFT: missing keys {missing[:5]} …")
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and abs(module.scaling["default"] - alphas[path] / ranks[path]) > 1e-6:
            problems.append(f"PEFT: scale of {path} is {module.scaling['default']}")
    model.eval()
    return {name for name in lora if name in table}


def answers(pipeline, outputs):
    """What the peers compute for our inputs."""
    with torch.no_grad():
        made = {"output": pipeline.unet(outputs["sample"], outputs["timestep"], outputs["context"]).sample}
        if "input_ids" in outputs:
            made["text"] = pipeline.text_encoder(input_ids=outputs["input_ids"]).last_hidden_state
    return made


def relative(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30)).item()


def compare(rows, peer, kind, found, outputs):
    for part, value in found.items():
        ours = outputs[f"{part}_{kind}"].float()
        if ours.shape != value.shape:
            raise SystemExit(f"{part}_{kind}: shape {list(ours.shape)}, {peer} has {list(value.shape)}")
        rows.append((peer, f"{part}_{kind}", relative(ours, value)))


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--base", required=True)
    arguments.add_argument("--lora", required=True)
    arguments.add_argument("--outputs", required=True)
    arguments.add_argument("--tolerance", type=float, default=1e-3, help="for outputs, relative (default 1e-3)")
    arguments.add_argument(
        "--effect-tolerance", type=float, default=1e-2, help="for the change that the LoRA makes, relative (default 1e-2)"
    )
    options = arguments.parse_args()
    outputs = load_file(options.outputs)
    for name in ("sample", "context"):
        outputs[name] = outputs[name].float()
    outputs["timestep"] = outputs["timestep"].reshape(-1)
    if "input_ids" in outputs:
        outputs["input_ids"] = outputs["input_ids"].long()
    lora, unknown = modules_of(load_file(options.lora))
    problems, rows = [], []
    if unknown:
        problems.append(f"{len(unknown)} keys that are not LoRA: {unknown[:5]} …")
    parts = {"unet": sum(n.startswith("lora_unet_") for n in lora), "text": sum(n.startswith("lora_te_") for n in lora)}
    print(f"file: {parts['unet']} U-Net and {parts['text']} text encoder modules")
    if parts["text"] and "input_ids" not in outputs:
        problems.append("the file trains the text encoder, but the outputs have no input_ids, text_base, text_lora")

    warnings = Warnings()
    for peer in ("diffusers", "PEFT"):
        pipeline = models.load(options.base)
        base = answers(pipeline, outputs)
        if peer == "diffusers":
            compare(rows, peer, "base", base, outputs)
            taken = None
            try:
                pipeline.load_lora_weights(options.lora)
            except (ValueError, KeyError, IndexError, RuntimeError, AttributeError, TypeError) as error:
                problems.append(f"{peer} refuses the file: {type(error).__name__}: {error}")
                continue
        else:
            tables = (file_names(pipeline.unet, "lora_unet", False), file_names(pipeline.text_encoder, "lora_te", True))
            taken = inject(pipeline.unet, tables[0], lora, problems) | inject(
                pipeline.text_encoder, tables[1], lora, problems
            )
        if taken is not None and (unused := sorted(set(lora) - taken)):
            problems.append(f"{peer}: {len(unused)} modules are not in the model: {unused[:5]} …")
        counts = {"unet": adapted(pipeline.unet), "text": adapted(pipeline.text_encoder)}
        print(f"{peer}: adapted {counts['unet']} U-Net and {counts['text']} text encoder modules")
        if counts != parts:
            problems.append(f"{peer} adapted {counts}, the file has {parts}")
        changed = answers(pipeline, outputs)
        compare(rows, peer, "lora", changed, outputs)
        for part in changed:
            effect = outputs[f"{part}_lora"].float() - outputs[f"{part}_base"].float()
            theirs = changed[part] - base[part]
            if theirs.norm() == 0 and effect.norm() == 0:
                print(f"{peer}: the LoRA does not change {part}")
                continue
            rows.append((peer, f"{part} effect", relative(effect, theirs)))
    problems += [f"warning from {message}" for message in dict.fromkeys(warnings.messages)]

    print(f"{'peer':<10} {'what':<14} {'relative error':>14}")
    for peer, what, error in rows:
        limit = options.effect_tolerance if what.endswith("effect") else options.tolerance
        # The negation catches NaN.
        failed = not error <= limit
        print(f"{peer:<10} {what:<14} {error:>14.2e}{'  over ' + format(limit, '.0e') if failed else ''}")
        if failed:
            problems.append(f"{peer}: {what} differs by {error:.2e}, allowed {limit:.0e}")
    for problem in problems:
        print(f"FAILED {problem}")
    print("failed" if problems else "all keys used, all outputs agree")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
