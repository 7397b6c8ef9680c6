"""Language models that `lora` writes, in transformers and in the gguf package.

- Every case of crates/lora-io/tests/golden/language is merged by `lora merge`; transformers must load the folder with the
  logits of PEFT's live adapter.
- Every GGUF model of the folder GGUF becomes a folder by `lora dequantise`. Transformers' logits of it must be those that
  `expected.safetensors` there has (`NAME.ids`, `NAME.SCHEME.logits_last8`), and those of transformers' own reading of the
  GGUF file where it reads such a file right: it passes over Llama 3's `rope_freqs` and over `attention.key_length`. Tokens
  of texts without digits must be those of its own reading too (it passes over `tokenizer.ggml.pre`).
- The same models are merged into with `--requantise`; the gguf package must read the file, and find all as it was but for
  the tensors that the adapter changes.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

LANGUAGE = Path(__file__).resolve().parents[2] / "crates" / "lora-io" / "tests" / "golden" / "language"
TEXTS = ["The cat sat on the mat.", "don't  DO\n\n\tthat", "naïve 東京 🦀", "<|im_start|>user\nHello<|im_end|>"]


def load(folder, **given):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **given)


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids.long(), use_cache=False).logits[0]


def merges(lora, work):
    ids = load_file(LANGUAGE / "ids.safetensors")["ids"]
    for case in sorted(LANGUAGE.glob("*/*/adapter_config.json")):
        case = case.parent
        out = work / f"{case.parent.name}-{case.name}"
        subprocess.run([lora, "merge", "--base", case.parent / "model", "--lora", case, "--out", out], check=True, capture_output=True)
        model, info = load(out, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        apart = (logits(model, ids) - load_file(case / "merged.safetensors")["logits"]).abs().max().item()
        print(f"{out.name}: logits {apart:.1e} from PEFT's")
        assert apart < 5e-5


def folders(lora, models, work):
    expected = load_file(models / "expected.safetensors")
    for path in sorted(models.glob("*.gguf")):
        name, scheme = path.name.split(".")[:2]
        out = work / path.stem
        subprocess.run([lora, "dequantise", path, "--out", out, "--dtype", "fp32"], check=True, capture_output=True)
        model, ids = load(out), expected[f"{name}.ids"]
        found = logits(model, ids)
        wanted = expected[f"{name}.{scheme}.logits_last8"]
        apart = (found[-8:] - wanted.reshape(8, -1)).abs().max().item()
        line = f"{path.name}: logits {apart:.1e} from the reference's"
        assert apart < 1e-3, line
        try:
            theirs = logits(load(str(models), gguf_file=path.name), ids[:, :16])
            apart = (logits(model, ids[:, :16]) - theirs).abs().max().item()
            line += f", {apart:.1e} from those of transformers' own reading (16 tokens)"
        except Exception as error:
            line += f" (transformers does not load it: {str(error)[:60]!r})"
        print(line)
        tokenizer = AutoTokenizer.from_pretrained(out)
        try:
            own = AutoTokenizer.from_pretrained(str(models), gguf_file=path.name)
            same = [tokenizer.encode(text, add_special_tokens=False) == own.encode(text, add_special_tokens=False) for text in TEXTS]
            print(f"  tokens equal: {same}, template kept: {tokenizer.chat_template == own.chat_template}")
        except Exception as error:
            print(f"  transformers reads no tokenizer there: {str(error)[:80]!r}")


def requantised(lora, models, work):
    for path in sorted(models.glob("*.gguf")):
        base = load(work / path.stem)
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "down_proj"]))
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.data.normal_(0, 0.05)
        adapter, out = work / f"{path.stem}-adapter", work / f"{path.stem}-merged.gguf"
        model.save_pretrained(adapter)
        command = [lora, "merge", "--base", path, "--lora", adapter, "--out", out, "--requantise"]
        subprocess.run(command, check=True, capture_output=True)
        before, after = gguf.GGUFReader(path), gguf.GGUFReader(out)
        keys = lambda reader: [key for key in reader.fields if not key.startswith("GGUF.")]  # noqa: E731
        assert keys(before) == keys(after)
        changed, worst = 0, 0.0
        for one, other in zip(before.tensors, after.tensors, strict=True):
            assert (one.name, one.tensor_type, list(one.shape)) == (other.name, other.tensor_type, list(other.shape))
            if any(part in one.name for part in ("attn_q.", "ffn_down.")):
                a, b = (gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in (one, other))
                worst, changed = max(worst, np.linalg.norm(a - b) / np.linalg.norm(a)), changed + 1
                assert not np.array_equal(a, b), one.name
            else:
                assert np.array_equal(one.data, other.data), one.name
        print(f"{out.name}: {changed} tensors changed, by {worst:.2f} of their norm at most; the others keep their bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path, help="the command")
    parser.add_argument("gguf", type=Path, help="a folder of GGUF models with expected.safetensors")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        merges(arguments.lora, Path(work))
        folders(arguments.lora, arguments.gguf, Path(work))
        requantised(arguments.lora, arguments.gguf, Path(work))


if __name__ == "__main__":
    main()
