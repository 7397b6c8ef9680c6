"""`kill -9` at random moments of a run that keeps states, until it is done: the file that it leaves must be that of a run
that was never killed, to the last byte.

    python3 tools/reliability/kill.py [lora=target/release/lora] [steps=60] [runs=3] [seed=1]

A run is started again after each kill with `resume = "auto"`. Moments are drawn evenly over the time that a start and a third
of the steps take, so that some fall into loading, some into steps, some into the writing of a state.
"""

import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time

from common import arguments, config, run


def digest(folder):
    with open(os.path.join(folder, "out", "lora.safetensors"), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def half_written(folder):
    out = os.path.join(folder, "out")
    return [os.path.join(out, name) for name in os.listdir(out) if name.startswith(".lora-partial-")]


def main():
    own = arguments({"lora": "target/release/lora", "steps": "60", "runs": "3", "seed": "1"})
    draw = random.Random(int(own["seed"]))
    keys = dict(max_train_steps=own["steps"], save_state_every_n_steps=2, resume="auto")
    kills, failures = 0, []
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        status, said = run(own["lora"], "train", config(folder, **keys))
        assert status == 0, said
        whole, expected = time.monotonic() - began, digest(folder)
    for number in range(int(own["runs"])):
        with tempfile.TemporaryDirectory() as folder:
            command = [own["lora"], "train", config(folder, **keys)]
            for _ in range(200):
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                try:
                    said, _ = process.communicate(timeout=draw.uniform(0.0, max(1.0, whole / 2)))
                except subprocess.TimeoutExpired:
                    process.kill()
                    said, _ = process.communicate()
                    kills += 1
                    continue
                if process.returncode != 0:
                    failures.append(f"run {number}: status {process.returncode}: {said.decode()[-400:]}")
                elif digest(folder) != expected:
                    failures.append(f"run {number}: another file than without kills")
                break
            else:
                failures.append(f"run {number}: not done after 200 starts")
            if half_written(folder):
                # Young ones are left alone, as another run may be at them; a later run clears them away.
                for path in half_written(folder):
                    os.utime(path, (0, 0))
                subprocess.run(command, capture_output=True)
                if half_written(folder):
                    failures.append(f"run {number}: left behind: {half_written(folder)}")
    print(f"{own['runs']} runs of {own['steps']} steps, {kills} kills: {len(failures)} failures")
    print("\n".join(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
