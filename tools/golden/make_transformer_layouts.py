"""Files of transformers in two layouts each, for `lora-io`: `NAME.safetensors` in diffusers' names, `NAME_original.safetensors`
in the original tree's, both of the smallest model of that kind; and the same adapter as a file in diffusers' layout
(`NAME_lora_diffusers`), in kohya's on the original tree's layers (`NAME_lora_kohya`, alpha 2, rank 4) and in ComfyUI's
generic names (`NAME_lora_comfyui`).

The original layout is made of diffusers' by the lists below and led back by diffusers' own converter, whose widths of the
published models are replaced. Numbers are small whole ones divided by 64, so that fp16 holds them.
"""

import inspect
import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Where a golden file goes; `files.py` reads it when it is imported.
GOLDEN = Path(__file__).resolve().parents[2] / "crates" / "lora-io" / "tests" / "golden" / "transformers"
os.environ["GOLDEN_FOLDER"] = str(GOLDEN)

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

import synthetic

RANK, ALPHA = 4, 2.0


def flux_block(i, inner):
    """A double block: original module, diffusers' modules whose rows it holds."""
    o, d = f"double_blocks.{i}", f"transformer_blocks.{i}"
    return [
        (f"{o}.img_attn.qkv", [f"{d}.attn.to_{p}" for p in "qkv"]),
        (f"{o}.txt_attn.qkv", [f"{d}.attn.add_{p}_proj" for p in "qkv"]),
        (f"{o}.img_attn.proj", [f"{d}.attn.to_out.0"]),
        (f"{o}.txt_attn.proj", [f"{d}.attn.to_add_out"]),
        (f"{o}.img_attn.norm.query_norm", [f"{d}.attn.norm_q"]),
        (f"{o}.img_attn.norm.key_norm", [f"{d}.attn.norm_k"]),
        (f"{o}.txt_attn.norm.query_norm", [f"{d}.attn.norm_added_q"]),
        (f"{o}.txt_attn.norm.key_norm", [f"{d}.attn.norm_added_k"]),
        (f"{o}.img_mlp.0", [f"{d}.ff.{inner[0]}"]),
        (f"{o}.img_mlp.2", [f"{d}.ff.{inner[1]}"]),
        (f"{o}.txt_mlp.0", [f"{d}.ff_context.{inner[0]}"]),
        (f"{o}.txt_mlp.2", [f"{d}.ff_context.{inner[1]}"]),
    ]


def flux():
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=6, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )
    embed = "time_text_embed"
    rows = [("img_in", ["x_embedder"]), ("txt_in", ["context_embedder"]), ("final_layer.linear", ["proj_out"])]
    for a, b in [("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")]:
        rows += [(f"{a}.{c}_layer", [f"{embed}.{b}_embedder.linear_{i}"]) for c, i in (("in", 1), ("out", 2))]
    rows += flux_block(0, ("net.0.proj", "net.2"))
    rows += [(f"double_blocks.0.{a}_mod.lin", [f"transformer_blocks.0.{b}.linear"]) for a, b in (("img", "norm1"), ("txt", "norm1_context"))]
    o, d = "single_blocks.0", "single_transformer_blocks.0"
    rows += [
        (f"{o}.linear1", [f"{d}.attn.to_{p}" for p in "qkv"] + [f"{d}.proj_mlp"]),
        (f"{o}.linear2", [f"{d}.proj_out"]),
        (f"{o}.modulation.lin", [f"{d}.norm.linear"]),
        (f"{o}.norm.query_norm", [f"{d}.attn.norm_q"]),
        (f"{o}.norm.key_norm", [f"{d}.attn.norm_k"]),
    ]
    targets = r"double_blocks\..*(attn\.(qkv|proj)|mlp\.[02]|mod\.lin)$|single_blocks\..*(linear[12]|modulation\.lin)$|final_layer.*1$"
    return model, rows, {"final_layer.adaLN_modulation.1": ["norm_out.linear"]}, targets


def flux2():
    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=6, mlp_ratio=3.0, axes_dims_rope=(2, 2, 2, 2), rope_theta=2000, guidance_embeds=False,
    )
    rows = [("img_in", ["x_embedder"]), ("txt_in", ["context_embedder"]), ("final_layer.linear", ["proj_out"])]
    rows += [(f"time_in.{c}_layer", [f"time_guidance_embed.timestep_embedder.linear_{i}"]) for c, i in (("in", 1), ("out", 2))]
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        rows.append((f"{name}.lin", [f"{name}.linear"]))
    rows += flux_block(0, ("linear_in", "linear_out"))
    o, d = "single_blocks.0", "single_transformer_blocks.0"
    rows += [
        (f"{o}.linear1", [f"{d}.attn.to_qkv_mlp_proj"]),
        (f"{o}.linear2", [f"{d}.attn.to_out"]),
        (f"{o}.norm.query_norm", [f"{d}.attn.norm_q"]),
        (f"{o}.norm.key_norm", [f"{d}.attn.norm_k"]),
    ]
    targets = r"double_blocks\..*(attn\.(qkv|proj)|mlp\.[02])$|single_blocks\..*linear[12]$"
    return model, rows, {"final_layer.adaLN_modulation.1": ["norm_out.linear"]}, targets


def sd3():
    model = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=1, joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=10,
        pos_embed_max_size=3, qk_norm="rms_norm", dual_attention_layers=(0,),
    )
    embed = "time_text_embed"
    rows = [("x_embedder.proj", ["pos_embed.proj"]), ("context_embedder", ["context_embedder"]), ("final_layer.linear", ["proj_out"])]
    for a, b in (("t", "timestep"), ("y", "text")):
        rows += [(f"{a}_embedder.mlp.{c}", [f"{embed}.{b}_embedder.linear_{i}"]) for c, i in ((0, 1), (2, 2))]
    swapped = {"final_layer.adaLN_modulation.1": ["norm_out.linear"]}
    for i in range(2):
        x, c, d = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block", f"transformer_blocks.{i}"
        rows += [
            (f"{x}.attn.qkv", [f"{d}.attn.to_{p}" for p in "qkv"]),
            (f"{x}.attn.proj", [f"{d}.attn.to_out.0"]),
            (f"{x}.mlp.fc1", [f"{d}.ff.net.0.proj"]),
            (f"{x}.mlp.fc2", [f"{d}.ff.net.2"]),
            (f"{x}.adaLN_modulation.1", [f"{d}.norm1.linear"]),
            (f"{c}.attn.qkv", [f"{d}.attn.add_{p}_proj" for p in "qkv"]),
        ]
        rows += [(f"{x}.attn.ln_{p}", [f"{d}.attn.norm_{p}"]) for p in "qk"]
        rows += [(f"{c}.attn.ln_{p}", [f"{d}.attn.norm_added_{p}"]) for p in "qk"]
        if i == 0:
            rows += [
                (f"{x}.attn2.qkv", [f"{d}.attn2.to_{p}" for p in "qkv"]),
                (f"{x}.attn2.proj", [f"{d}.attn2.to_out.0"]),
                (f"{c}.attn.proj", [f"{d}.attn.to_add_out"]),
                (f"{c}.mlp.fc1", [f"{d}.ff_context.net.0.proj"]),
                (f"{c}.mlp.fc2", [f"{d}.ff_context.net.2"]),
                (f"{c}.adaLN_modulation.1", [f"{d}.norm1_context.linear"]),
            ]
            rows += [(f"{x}.attn2.ln_{p}", [f"{d}.attn2.norm_{p}"]) for p in "qk"]
        else:
            swapped[f"{c}.adaLN_modulation.1"] = [f"{d}.norm1_context.linear"]
    targets = r"joint_blocks\..*(attn2?\.(qkv|proj)|mlp\.fc[12]|adaLN_modulation\.1)$"
    return model, rows, swapped, targets


MODELS = {"flux": flux, "flux2": flux2, "sd3": sd3}


def whole(name, shape):
    """Whole numbers from -8 to 8, divided by 64."""
    return torch.from_numpy(synthetic.uniform(name, shape)).mul(8).round().div(64)


def swap(tensor):
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def original(state, rows, swapped):
    out, used = {}, set()
    for module, parts in rows + list(swapped.items()):
        for kind in ("weight", "bias"):
            keys = [f"{part}.{kind}" for part in parts]
            if keys[0] in state:
                tensor = torch.cat([state[key] for key in keys])
                own = "scale" if module.endswith(("query_norm", "key_norm")) else kind
                out[f"{module}.{own}"] = swap(tensor) if module in swapped else tensor
                used.update(keys)
    rest = set(state) - used
    if rest:
        assert rest == {"pos_embed.pos_embed"}, rest
        out["pos_embed"] = state["pos_embed.pos_embed"]
    return out


def led_back(name, tensors, width):
    """By diffusers' converter, with the widths of the published model replaced."""
    convert = getattr(single_file_utils, f"convert_{name}_transformer_checkpoint_to_diffusers")
    source = inspect.getsource(convert).replace("inner_dim = 3072", f"inner_dim = {width}")
    scope = dict(vars(single_file_utils))
    exec(source, scope)
    return scope[convert.__name__](dict(tensors))


def write(name, tensors, metadata=None):
    GOLDEN.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.half().contiguous().clone() for key, value in sorted(tensors.items())}
    path = GOLDEN / f"{name}.safetensors"
    save_file(tensors, path, metadata=metadata)
    path.chmod(0o644)
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size} bytes")


def main():
    for name, make in MODELS.items():
        model, rows, swapped, targets = make()
        state = {key: whole(f"{name}.{key}", tuple(value.shape)) for key, value in model.state_dict().items()}
        file = original(state, rows, swapped)
        back = led_back(name, file, 8)
        assert set(back) == set(state) and all(torch.equal(back[key].reshape(state[key].shape), state[key]) for key in state)
        write(name, state)
        write(f"{name}_original", file)

        split, kohya, generic = {}, {}, {}
        for module, parts in rows + list(swapped.items()):
            if not re.search("^(" + targets + ")", module):
                continue
            weights = [state[f"{part}.weight"] for part in parts]
            flat = "lora_unet_" + module.replace(".", "_")
            down = whole(f"{flat}.down", (RANK, weights[0].shape[1]))
            up = whole(f"{flat}.up", (sum(len(weight) for weight in weights), RANK))
            kohya |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(ALPHA)}
            generic |= {f"diffusion_model.{module}.lora_A.weight": down, f"diffusion_model.{module}.lora_B.weight": up * ALPHA / RANK}
            rest = swap(up) if module in swapped else up
            for part, weight in zip(parts, weights):
                own, rest = rest[: len(weight)], rest[len(weight):]
                split |= {f"transformer.{part}.lora_A.weight": down, f"transformer.{part}.lora_B.weight": own * ALPHA / RANK}
        write(f"{name}_lora_kohya", kohya)
        write(f"{name}_lora_comfyui", generic)
        write(f"{name}_lora_diffusers", split)


if __name__ == "__main__":
    main()
