"""A disk that is full: a run writes to a file system of a few hundred KiB, of many sizes, so that another write fails each
time. A run must end or go on with a message that says so, what it leaves must be readable, and the same run must go on
from its state once there is room.

    python3 tools/reliability/full_disk.py [lora=target/release/lora] [sizes=12] [largest=1600]

Needs Linux. Mounts a tmpfs in a user and mount namespace of its own (`unshare -rm`), which needs no privileges where the
system allows such namespaces; elsewhere run it as root. Sizes are in KiB, spread evenly up to the largest, which should
hold all that a run writes.
"""

import os
import subprocess
import sys
import tempfile

from common import arguments, config, run


def readable(lora, folder):
    """Files of the run that cannot be read."""
    found = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors") and not name.endswith("-state.safetensors"):
            status, said = run(lora, "info", os.path.join(folder, name))
            if status != 0:
                found.append(f"{name}: {said[-200:]}")
    return found


def once(lora, size, folder):
    disk = os.path.join(folder, f"disk-{size}")
    os.mkdir(disk)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", disk], check=True)
    problems = []
    try:
        keys = dict(output_dir=disk, max_train_steps=6, save_state_every_n_steps=2, save_every_n_steps=3, resume="auto")
        path = config(folder, **keys)
        status, said = run(lora, "train", path)
        told = "No space left" in said
        if status not in (0, 1, 2) or "panicked" in said:
            problems.append(f"status {status}: {said[-300:]}")
        if status != 0 and not told:
            problems.append(f"it does not say why it ended: {said[-300:]}")
        problems += readable(lora, disk)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        again, said_again = run(lora, "train", path)
        if again != 0:
            problems.append(f"with room again: status {again}: {said_again[-300:]}")
        problems += readable(lora, disk)
    finally:
        subprocess.run(["umount", disk], check=True)
    return status, told, problems


def main():
    own = arguments({"lora": "target/release/lora", "sizes": "12", "largest": "1600"})
    if os.environ.get("LORA_NAMESPACE") is None and os.geteuid() != 0:
        command = ["unshare", "-rm", sys.executable, *sys.argv]
        os.execvpe("unshare", command, dict(os.environ, LORA_NAMESPACE="1"))
    count, failures, outcomes = int(own["sizes"]), [], {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            size = int(own["largest"]) * (number + 1) // count // 4 * 4
            status, told, problems = once(own["lora"], max(4, size), folder)
            outcome = f"status {status}, {'the disk is said to be full' if told else 'nothing is said of the disk'}"
            outcomes.setdefault(outcome, []).append(size)
            failures += [f"{size} KiB: {problem}" for problem in problems]
    for outcome, sizes in outcomes.items():
        print(f"{outcome}: {', '.join(map(str, sizes))} KiB")
    print(f"{count} sizes: {len(failures)} failures")
    print("\n".join(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
