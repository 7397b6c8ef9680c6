"""What the scripts of this folder share: their arguments, configurations of small runs, and running the program. From the root
of the repository; standard library only.
"""

import glob
import os
import shutil
import subprocess
import sys

BASE = "assets/emoji-64/emoji-64.safetensors"
PICTURES = "assets/quickstart"


def arguments(defaults):
    """The command line's `name=value` over the defaults, as text; ends the program at a name that is not among them."""
    own = dict(defaults)
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name not in own:
            sys.exit(f"{argument}: expected {', '.join(own)}, each with =value")
        own[name] = value
    return own


def config(folder, **keys):
    """A configuration of a small run on the CPU, in a folder; its path. `None` leaves a key out."""
    all_keys = dict(base_model=os.path.abspath(BASE), train_data_dir=os.path.abspath(PICTURES), max_resolution=64)
    all_keys |= dict(device="cpu", precision="fp32", lora_rank=4, target_modules="attention", batch_size=2)
    all_keys |= dict(output_dir=os.path.join(folder, "out")) | keys
    all_keys = {name: value for name, value in all_keys.items() if value is not None}
    path = os.path.join(folder, "config.yaml")
    with open(path, "w") as file:
        file.writelines(f"{name}: {value}\n" for name, value in all_keys.items())
    return path


def texts(folder):
    """The keys of a run on texts instead, with a tiny language model that it puts together in the folder."""
    base, own = os.path.join(folder, "base"), os.path.abspath("crates/lora-train/tests/golden/language")
    shutil.copytree("crates/lora-models/tests/golden/llm/qwen2/model", base)
    for path in glob.glob(os.path.join(own, "*.json")):
        shutil.copy(path, base)
    keys = dict(base_model=base, train_data_dir=os.path.join(own, "chat.jsonl"), target_modules="all-linear")
    return keys | dict(max_resolution=None, max_seq_length=160)


def few_pictures(folder):
    """The keys of a run on eight of the pictures, which it copies into the folder."""
    for path in sorted(glob.glob(os.path.join(PICTURES, "*.png")))[:8]:
        shutil.copy(path, folder)
        shutil.copy(path.removesuffix("png") + "txt", folder)
    return dict(train_data_dir=folder, batch_size=1)


def run(lora, *words, seconds=600):
    """Exit status (negative for a signal, None where it did not end) and all that was said."""
    try:
        done = subprocess.run([lora, *words], capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        return None, (error.stdout or b"").decode(errors="replace")
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")
