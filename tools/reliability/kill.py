"""`kill -9` at moments of runs that keep states: the files that they leave must be those of a run that was never killed, to
the last byte.

    python3 tools/reliability/kill.py [lora=target/release/lora] [base=pictures|texts] [kills=100] [steps=12] [seed=1] [until=HH:MM]

Each step writes its adapter and a state, so that much of a run is writing. A run is started again after each kill with
`resume = "auto"`, until it is done; then another run begins. Half of the moments are drawn evenly over the time that a run takes;
the others lie up to 2 ms after a file began to be written. `pictures` is the small base of the repository, `texts` a tiny
language model of its tests. `until` ends the script at a time of day, with what was reached.
"""

import collections
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time

from common import arguments, config, few_pictures, run, texts

# These tell times.
UNEQUAL = {"metrics.jsonl"}


def digests(folder):
    """Each file that a run left, by its path in the output folder."""
    found, out = {}, os.path.join(folder, "out")
    for place, _, names in os.walk(out):
        for path in (os.path.join(place, name) for name in names if name not in UNEQUAL):
            with open(path, "rb") as file:
                found[os.path.relpath(path, out)] = hashlib.sha256(file.read()).hexdigest()
    return found


def half_written(folder):
    out = os.path.join(folder, "out")
    files = [os.path.join(place, name) for place, _, names in os.walk(out) for name in names]
    return {path for path in files if os.path.basename(path).startswith(".lora-partial-")}


def at_random(process, folder, draw, whole):
    try:
        process.wait(timeout=draw.uniform(0.0, whole))
    except subprocess.TimeoutExpired:
        pass


def in_a_write(process, folder, draw, whole):
    """Returns within 2 ms of the beginning of one of the next writes."""
    seen, writes = half_written(folder), draw.randrange(1, 12)
    while process.poll() is None and writes > 0:
        new = half_written(folder) - seen
        seen |= new
        writes -= len(new)
        time.sleep(0.001)
    time.sleep(draw.uniform(0.0, draw.choice((0.0, 0.002))))


def started(command, folder, draw, whole, left):
    """One start of a run: its exit status (None where it was killed), whether it was killed in a write, what it said."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        if left > 0:
            before = half_written(folder)
            draw.choice((at_random, in_a_write))(process, folder, draw, whole)
            if process.poll() is None:
                process.kill()
                process.wait()
                return None, bool(half_written(folder) - before), ""
        process.wait()
        said.seek(0)
        return process.returncode, False, said.read().decode(errors="replace")


def cleared(command, folder):
    """Whether another start removes what kills left half-written. Young files are left alone, as another run may be at them."""
    for path in half_written(folder):
        os.utime(path, (0, 0))
    subprocess.run(command, capture_output=True)
    return not half_written(folder)


def main():
    own = arguments(
        {"lora": "target/release/lora", "base": "pictures", "kills": "100", "steps": "12", "seed": "1", "until": ""}
    )
    draw, lora, wanted = random.Random(int(own["seed"])), own["lora"], int(own["kills"])
    keys = dict(max_train_steps=own["steps"], save_state_every_n_steps=1, save_every_n_steps=1, resume="auto")

    # One place for all runs, as files name their base by its path.
    shared = tempfile.TemporaryDirectory()
    keys |= texts(shared.name) if own["base"] == "texts" else few_pictures(shared.name)

    def fresh(folder):
        return [lora, "train", config(folder, **keys)]

    with tempfile.TemporaryDirectory() as folder:
        command = fresh(folder)
        began = time.monotonic()
        status, said = run(*command)
        assert status == 0, said
        whole, expected = time.monotonic() - began, digests(folder)
    counts, failures = collections.Counter(), []

    def told():
        return (
            f"{counts['runs']} runs of {own['steps']} steps, {counts['kills']} kills, of which {counts['in a write']} "
            f"left a file half-written; {len(expected)} files of each run compared: {len(failures)} failures"
        )

    while counts["kills"] < wanted and not (own["until"] and time.strftime("%H:%M") >= own["until"]):
        counts["runs"] += 1
        with tempfile.TemporaryDirectory() as folder:
            command, status = fresh(folder), None
            while status is None:
                status, writing, said = started(command, folder, draw, whole, wanted - counts["kills"])
                counts["kills"] += status is None
                counts["in a write"] += writing
            left = half_written(folder)
            if left and not cleared(command, folder):
                failures.append(f"run {counts['runs']}: left behind: {left}")
            found = digests(folder)
            if status != 0:
                failures.append(f"run {counts['runs']}: status {status}: {said[-400:]}")
            elif found != expected:
                other = [name for name in expected | found if expected.get(name) != found.get(name)]
                failures.append(f"run {counts['runs']}: other files than without kills: {', '.join(sorted(other))}")
        print(told(), file=sys.stderr, flush=True)
    print(told())
    print("\n".join(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
