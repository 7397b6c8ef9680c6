"""Training steps of a language model in ours and in transformers + PEFT, in turn on this machine, as a Markdown table.

    make build
    sh tools/fetch-smollm2.sh
    python text_side_by_side.py TARGET/release/lora assets/smollm2.gguf|FOLDER [--rounds 2] [--steps 8]

Needs torch, transformers, peft and gguf. Both adapt all linear layers of the layers (rank 8) with AdamW, one row of plain
text at a time, every token learned. The peer computes on the weights in fp32. Ours computes on them as they are, which are
the file's blocks in GGUF and fp32 in a folder of safetensors in fp32, and on int8 and nf4. The peak is the resident memory of
the process, tokens a second are those of the median step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARSER = argparse.ArgumentParser()
PARSER.add_argument("ours")
PARSER.add_argument("base")
PARSER.add_argument("--rounds", type=int, default=2)
PARSER.add_argument("--steps", type=int, default=8)
PARSER.add_argument("--peer", help="internal: the peer's own process")
TEXT = "The lamp was lit before the evening came, and nobody asked who had carried the oil up all those stairs. " * 400


def peak():
    """Most resident memory of this process so far, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peer(base, tokens, checkpointing, steps):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, own = (base, {}) if os.path.isdir(base) else os.path.split(os.path.realpath(base))
    own = own and {"gguf_file": own}
    tokenizer = AutoTokenizer.from_pretrained(folder, **own)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **own)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    loaded = peak()
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][: tokens * steps]).view(steps, tokens)
    optimiser = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], lr=1e-4)
    seconds, losses = [], []
    for row in ids:
        start = time.perf_counter()
        loss = model(input_ids=row[None], labels=row[None]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "peak": peak(), "loaded": loaded, "loss": losses[0]}))


def ours(program, base, tokens, keys, steps):
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(TEXT)
        config = Path(folder, "run.toml")
        config.write_text(
            f'base_model = "{base}"\ntrain_data_dir = "{text}"\noutput_dir = "{folder}/out"\nlora_rank = 8\n'
            f'target_modules = ["all-linear"]\nmax_seq_length = {tokens}\nmax_train_steps = {steps}\nprecision = "fp32"\n'
            'device = "cpu"\nlearning_rate = 1e-4\n'
        )
        start = subprocess.Popen(
            [program, "train", str(config)] + [part for key in keys for part in ("--set", key)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        error = start.stderr.read()
        _, status, usage = os.wait4(start.pid, 0)
        if status:
            sys.exit(error)
        lines = [json.loads(line) for line in Path(folder, "out/metrics.jsonl").read_text().splitlines()]
        return {
            "seconds": statistics.median(line["seconds"] for line in lines[1:]),
            "peak": usage.ru_maxrss / 1024,
            "loss": lines[0]["loss"],
        }


def main(options):
    if options.peer:
        tokens, checkpointing = map(int, options.peer.split(","))
        return peer(options.base, tokens, checkpointing, options.steps)
    print("| tokens | | peak, MiB | of PEFT's | tokens/s | times PEFT's |\n|---|---|---|---|---|---|")
    for tokens, checkpointing in [(256, 0), (256, 1), (512, 0), (512, 1)]:
        named = f"{tokens}{', checkpointed' if checkpointing else ''}"
        forms = [[], ["base_storage=int8"], ["base_storage=nf4"]]
        own = [f"gradient_checkpointing={'true' if checkpointing else 'false'}"]
        rows = {}
        for _ in range(options.rounds):
            command = [sys.executable, __file__, options.ours, options.base, f"--steps={options.steps}"]
            done = subprocess.run(command + [f"--peer={tokens},{checkpointing}"], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            rows.setdefault("PEFT, fp32", []).append(json.loads(done.stdout.splitlines()[-1]))
            for keys in forms:
                unchanged = "fp32" if os.path.isdir(options.base) else "GGUF's blocks"
                name = "ours, " + (keys[0].split("=")[1] if keys else unchanged)
                rows.setdefault(name, []).append(ours(options.ours, options.base, tokens, own + keys, options.steps))
        median = {name: {key: statistics.median(own[key] for own in all) for key in all[0]} for name, all in rows.items()}
        reference = median["PEFT, fp32"]
        for name, own in median.items():
            ratio, rate = own["peak"] / reference["peak"], tokens / own["seconds"]
            times = reference["seconds"] / own["seconds"]
            print(f"| {named} | {name} | {own['peak']:.0f} | {100 * ratio:.0f}% | {rate:.0f} | {times:.2f} |", flush=True)


if __name__ == "__main__":
    main(PARSER.parse_args())
