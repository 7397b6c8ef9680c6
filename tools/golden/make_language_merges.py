"""crates/lora-io/tests/golden/language: tiny language models, adapters of PEFT's kinds on them, and what merging has to give.

A folder a model: `model/` as transformers saves it (in shards), and a folder a case: PEFT's own files, and
`merged.safetensors` with the weights that differ from the base's as transformers saves the merged model, `ids` and
`logits` of the model with the adapter live. Weights are PEFT's `merge_and_unload`. On a tied model that is wrong for an
adapter of one end, which changes both; so there the adapter is merged into the same model with its ends parted, whose
logits must be those of the live adapter. Adapters whose two ends are one (`ensure_weight_tying`) are merged at one end.

usage: make_language_merges.py [CASE…]
"""

import json
import shutil
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen2Config, Qwen3MoeConfig

FOLDER = Path(__file__).resolve().parents[2] / "crates" / "lora-io" / "tests" / "golden" / "language"
IDS = torch.tensor([[3, 17, 5, 30, 22, 9, 1, 14, 17, 8]])

SIZES = dict(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS = dict(num_experts_per_tok=2, intermediate_size=12)
MODELS = {
    "qwen2": Qwen2Config(**SIZES, intermediate_size=24, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=3, moe_intermediate_size=12, norm_topk_prob=True),
    "mixtral": MixtralConfig(**SIZES, **EXPERTS, num_local_experts=3),
    "gpt_oss": GptOssConfig(**SIZES, **EXPERTS, num_local_experts=3, sliding_window=8),
}

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "qwen2": {
        "linear": dict(target_modules="all-linear", use_rslora=True),
        "dora": dict(target_modules=["v_proj", "down_proj"], use_dora=True),
        "biases": dict(target_modules=["q_proj"], bias="all"),
        "lora_bias": dict(target_modules=["q_proj", "k_proj"], lora_bias=True),
        "embed_lora": dict(target_modules=["q_proj", "embed_tokens"]),
        "head_lora": dict(target_modules=["q_proj", "lm_head"]),
        "both_lora": dict(target_modules=["embed_tokens", "lm_head"]),
        "both_lora_tied": dict(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True),
        "head_saved": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "embed_saved": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        "embed_saved_tied": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        "norms_saved": dict(target_modules=["v_proj"], modules_to_save=["norm", "input_layernorm"]),
        "tokens": dict(target_modules=["q_proj"], trainable_token_indices=[5, 17, 30]),
        "tokens_alone": dict(token_indices=[5, 17, 30]),
        "tokens_and_head": dict(target_modules=["q_proj", "lm_head"], trainable_token_indices=[5, 17, 30]),
    },
    "qwen3_moe": {
        "experts": dict(target_modules=["q_proj"], target_parameters=BOTH),
        "gate_up": dict(target_modules=["q_proj"], target_parameters=BOTH[:1]),
        "down": dict(target_modules=["q_proj"], target_parameters=BOTH[1:]),
        "rewritten": dict(target_modules=["gate_proj", "up_proj", "down_proj"]),
        "router": dict(target_modules=["o_proj"], target_parameters=["mlp.gate.weight"]),
        "tokens": dict(target_modules=["q_proj"], trainable_token_indices={"lm_head": [4, 9]}),
    },
    "mixtral": {"experts": dict(target_modules=["q_proj"], target_parameters=BOTH)},
    "gpt_oss": {"experts": dict(target_modules=["q_proj"], target_parameters=BOTH, bias="all")},
}


# Cases that part the ends of a tied model.
PARTED = ("embed_lora", "head_lora", "both_lora", "head_saved", "embed_saved", "tokens_and_head")


def values(name, shape, deviation):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    # Few bits, so that half precision holds the same numbers.
    return (deviation * torch.randn(shape, generator=generator) * 64).round() / 64


def base(config):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            start = 1.0 if "norm" in name else 0.0
            value.copy_(start + values(name, value.shape, 0.3))
    return model


def load(folder, **given):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **given).eval()


def saved(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            tensors |= load_file(file)
        return {name: value.clone() for name, value in tensors.items()}


def of_file(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[0]


def parted(folder):
    model = load(folder, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    return model


def one_end(adapter):
    """The adapter of both ends without the head's part."""
    folder = Path(tempfile.mkdtemp())
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value for name, value in tensors.items() if "lm_head" not in name}, folder / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"ensure_weight_tying": False, "target_modules": ["embed_tokens"], "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(folder, adapter, name, live):
    if name in ("both_lora_tied", "embed_saved_tied"):
        if name == "embed_saved_tied":
            model = PeftModel.from_pretrained(load(folder), adapter).merge_and_unload()
        else:
            model = PeftModel.from_pretrained(load(folder), one_end(adapter)).merge_and_unload()
        model.tie_weights()
    elif name in PARTED:
        model = parted(folder)
        if name == "tokens_and_head":
            # PEFT trains the head's rows with the embedding's where the two are one.
            rows = load_file(adapter / "adapter_model.safetensors")
            rows = rows["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
            with torch.no_grad():
                model.lm_head.weight[[5, 17, 30]] = rows
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        model.config.tie_word_embeddings = False
    else:
        model = PeftModel.from_pretrained(load(folder), adapter).merge_and_unload()
    apart = (logits(model) - live).abs().max().item()
    print(f"  {name}: merged and live are {apart:.1e} apart")
    assert apart < 2e-5, name
    return saved(model)


def case(folder, name, given):
    target = folder.parent / name
    shutil.rmtree(target, ignore_errors=True)
    untouched = logits(load(folder))
    if "token_indices" in given:
        config = TrainableTokensConfig(task_type="CAUSAL_LM", **given)
    else:
        config = LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **given)
    model = get_peft_model(load(folder), config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.requires_grad:
                drawn = values(f"{name} {key}", value.shape, 0.25)
                value.copy_(drawn if "lora_" in key and "magnitude" not in key else value + drawn)
    model.save_pretrained(target)
    (target / "README.md").unlink(missing_ok=True)
    config = json.loads((target / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "tiny"
    for key in ("target_modules", "target_parameters"):
        if isinstance(config.get(key), list):
            config[key].sort()
    (target / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    live = logits(PeftModel.from_pretrained(load(folder), target))
    assert (live - logits(model)).abs().max() < 1e-5
    assert (live - untouched).abs().max() > 1e-2
    before = of_file(folder)
    after = merged(folder, target, name, live)
    assert set(before) <= set(after), set(before) - set(after)
    changed = {key: value for key, value in after.items() if key not in before or not torch.equal(value, before[key])}
    save_file({key: value.contiguous() for key, value in sorted((changed | {"logits": live}).items())}, target / "merged.safetensors")
    for file in target.iterdir():
        file.chmod(0o644)


def main(wanted):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for model, config in MODELS.items():
        print(model)
        folder = FOLDER / model / "model"
        shutil.rmtree(folder, ignore_errors=True)
        base(config).save_pretrained(folder, max_shard_size="12KB")
        for file in folder.iterdir():
            file.chmod(0o644)
        for name, given in CASES[model].items():
            if not wanted or name in wanted:
                case(folder, name, given)
    save_file({"ids": IDS.to(torch.int32)}, FOLDER / "ids.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
