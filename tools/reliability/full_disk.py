"""A disk that is full: the program writes to a file system of a few hundred KiB, of many sizes, so that another write fails
each time.

    python3 tools/reliability/full_disk.py [lora=target/release/lora] [what=train|commands|NAME] [step=100] [largest=3600]

`train`: a run must end or go on with a message that says so, what it leaves must be readable, and the same run must go on from
its state once there is room. `commands`: every command that writes a file must say so, leave the file that was there before as
it was and nothing else, and do its work once there is room; `what` may be the name of one of them.

Needs Linux. Mounts a tmpfs in a user and mount namespace of its own (`unshare -rm`), which needs no privileges where the
system allows such namespaces; elsewhere run it as root. Sizes are in KiB, from `step` to `largest`, which should hold all
that a run writes; those of `commands` end where the command has had room.
"""

import os
import shutil
import subprocess
import sys
import tempfile

from common import BASE, PICTURES, arguments, config, few_pictures, run, texts

GGUF = "crates/lora-models/tests/golden/llm/gguf/llama3.mixed.gguf"
ADAPTER = "crates/lora-train/tests/golden/language/adapter"


class Disk:
    """A tmpfs of so many KiB, at a folder."""

    def __init__(self, size, folder):
        self.path = os.path.join(folder, "disk")
        os.makedirs(self.path, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", self.path], check=True)

    def __enter__(self):
        return self

    def enlarge(self):
        subprocess.run(["mount", "-o", "remount,size=64m", self.path], check=True)

    def __exit__(self, *_):
        subprocess.run(["umount", self.path], check=True)


def readable(lora, folder):
    """Files of a run that cannot be read."""
    found = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors") and not name.endswith("-state.safetensors"):
            status, said = run(lora, "info", os.path.join(folder, name))
            if status != 0:
                found.append(f"{name}: {said[-200:]}")
    return found


def judged(status, said, wanted=(0, 1, 2)):
    """What is wrong with how the program ended, and whether it said that the disk is full."""
    problems, told = [], "No space left" in said
    if status not in wanted or "panicked" in said:
        problems.append(f"status {status}: {said[-300:]}")
    elif status != 0 and not told:
        problems.append(f"it does not say why it ended: {said[-300:]}")
    return problems, told


def training(lora, size, folder, pictures):
    with Disk(size, folder) as disk:
        keys = dict(output_dir=disk.path, max_train_steps=6, save_state_every_n_steps=2, save_every_n_steps=3)
        path = config(folder, **keys, resume="auto", **pictures)
        status, said = run(lora, "train", path)
        problems, told = judged(status, said)
        problems += readable(lora, disk.path)
        disk.enlarge()
        status_again, said = run(lora, "train", path)
        problems += [f"with room again: {problem}" for problem in judged(status_again, said, (0,))[0]]
        problems += readable(lora, disk.path)
    return status, told, problems


def commands(lora, folder):
    """Commands by name, each with the name of its output as `{}`; what they read is made in the folder."""
    keys = texts(folder)
    base, adapter = keys["base_model"], os.path.join(folder, "adapter")
    shutil.copytree(ADAPTER, adapter)
    weights = os.path.join(base, "model.safetensors")
    shown = os.path.join(folder, "pictures")
    os.mkdir(shown)
    status, said = run(lora, "train", config(folder, max_train_steps=1, **few_pictures(shown)))
    assert status == 0, said
    file, tuned = os.path.join(folder, "out", "lora.safetensors"), os.path.join(folder, "tuned.safetensors")
    status, said = run(lora, "merge", "--base", os.path.abspath(BASE), "--lora", file, "--out", tuned)
    assert status == 0, said
    return {
        "merge into a folder": ["merge", "--base", base, "--lora", adapter, "--out", "{}"],
        "merge into a file": ["merge", "--base", weights, "--lora", adapter, "--out", "{}.safetensors"],
        "combine": ["combine", "--lora", file, "--lora", file, "--out", "{}.safetensors"],
        "convert to diffusers": ["convert", file, "--to", "diffusers", "--out", "{}.safetensors"],
        "convert to PEFT": ["convert", file, "--to", "peft", "--out", "{}"],
        "convert to GGUF": ["convert", adapter, "--to", "gguf", "--base", base, "--out", "{}.gguf"],
        "resize": ["resize", file, "--rank", "2", "--out", "{}.safetensors"],
        "extract": ["extract", "--base", os.path.abspath(BASE), "--tuned", tuned, "--rank", "4", "--targets", "attention"]
        + ["--out", "{}.safetensors"],
        "dequantise": ["dequantise", os.path.abspath(GGUF), "--out", "{}.safetensors"],
        "dataset --html": ["dataset", os.path.abspath(PICTURES), "--shown", "10", "--html", "{}.html"],
    }


def command(lora, words, size, folder):
    """One command on a disk of a size: whether it had room, and what is wrong."""
    with Disk(size, folder) as disk:
        words = [word.replace("{}", os.path.join(disk.path, "written")) for word in words]
        out = next(word for word in words if word.startswith(disk.path))
        is_file, old = "." in os.path.basename(out), b"what was there before"
        if is_file:
            with open(out, "wb") as file:
                file.write(old)
        status, said = run(lora, *words)
        problems, _ = judged(status, said)
        if status != 0:
            left = sorted(os.path.relpath(os.path.join(at, name), disk.path) for at, _, names in os.walk(disk.path) for name in names)
            if left != ([os.path.basename(out)] if is_file else []):
                problems.append(f"it leaves {left}")
            elif is_file and open(out, "rb").read() != old:
                problems.append("the file that was there before is not what it was")
            disk.enlarge()
            again, said = run(lora, *words)
            problems += [f"with room again: {problem}" for problem in judged(again, said, (0,))[0]]
        return status == 0, problems


def main():
    own = arguments({"lora": "target/release/lora", "what": "train", "step": "100", "largest": "3600"})
    if os.environ.get("LORA_NAMESPACE") is None and os.geteuid() != 0:
        words = ["unshare", "-rm", sys.executable, *sys.argv]
        os.execvpe("unshare", words, dict(os.environ, LORA_NAMESPACE="1"))
    lora, failures, count = os.path.abspath(own["lora"]), [], 0
    sizes = range(int(own["step"]), int(own["largest"]) + 1, int(own["step"]))
    with tempfile.TemporaryDirectory() as folder:
        if own["what"] == "train":
            shown = os.path.join(folder, "pictures")
            os.mkdir(shown)
            pictures, outcomes = few_pictures(shown), {}
            for size in sizes:
                status, told, problems = training(lora, size, folder, pictures)
                outcome = f"status {status}, {'the disk is said to be full' if told else 'nothing is said of the disk'}"
                outcomes.setdefault(outcome, []).append(size)
                failures += [f"{size} KiB: {problem}" for problem in problems]
                count += 1
            for outcome, of in outcomes.items():
                print(f"{outcome}: {', '.join(map(str, of))} KiB")
        else:
            all_commands = commands(lora, folder)
            names = list(all_commands) if own["what"] == "commands" else own["what"].split(",")
            for name, words in ((name, all_commands[name]) for name in names):
                for size in sizes:
                    had_room, problems = command(lora, words, size, folder)
                    failures += [f"{name}, {size} KiB: {problem}" for problem in problems]
                    count += 1
                    if had_room:
                        break
                print(f"{name}: " + (f"room from {size} KiB on" if had_room else f"no room with {size} KiB"))
    print(f"{count} disks: {len(failures)} failures")
    print("\n".join(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
