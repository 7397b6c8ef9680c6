"""Damaged files for every reader of the program: each must end with status 0, 1 or 2 in little time and memory, and no thread
may panic.

    python3 tools/reliability/inputs.py [lora=target/release/lora] [files=200] [seed=1]

`files` of each kind: adapters (`lora info`), bases (`lora plan`), configurations (`lora dataset`), pictures and captions
(`lora dataset`, many at once). Damage is a cut, bytes that are changed, taken out or put in, or a number that is made
huge. The targets in `fuzz/` go deeper into single readers and need a nightly compiler.
"""

import os
import random
import resource
import sys
import tempfile

from common import BASE, PICTURES, arguments, config, run

SECONDS, BYTES = 120, 4 << 30


def damaged(data, draw):
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 3, 10))):
        # Headers are at the front, where damage says more.
        at = draw.randrange(max(1, min(len(data), draw.choice((16, 256, 4096, len(data) or 1)))))
        kind = draw.randrange(5)
        if kind == 0:
            del data[at:]
        elif kind == 1 and data:
            data[at] = draw.randrange(256)
        elif kind == 2:
            del data[at : at + draw.choice((1, 8, 100))]
        elif kind == 3:
            data[at:at] = draw.choice((b"\xff" * 8, b"\0" * 8, b"{", b"]", b"99999999999999999999", b"\xef\xbb\xbf"))
        else:
            data[at : at + 8] = draw.choice(((1 << 62).to_bytes(8, "little"), b"\xff\xff\xff\x7f\0\0\0\0"))
    return bytes(data)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, data):
    with open(path, "wb") as file:
        file.write(data)
    return path


def main():
    own = arguments({"lora": "target/release/lora", "files": "200", "seed": "1"})
    lora, count, draw = own["lora"], int(own["files"]), random.Random(int(own["seed"]))
    failures, statuses = [], {}

    def judged(kind, path, *words):
        status, said = run(lora, *words, seconds=SECONDS)
        statuses[kind, status] = statuses.get((kind, status), 0) + 1
        most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        if status not in (0, 1, 2) or "panicked" in said or most > BYTES:
            failures.append(f"{kind}: status {status}, at most {most >> 20} MiB: {said[-300:]}")
            write(os.path.join(tempfile.gettempdir(), f"failed-{kind}-{len(failures)}"), read(path))

    with tempfile.TemporaryDirectory() as folder:
        path = config(folder, max_train_steps=1)
        status, said = run(lora, "train", path)
        assert status == 0, said
        adapter, base = read(os.path.join(folder, "out", "lora.safetensors")), read(BASE)
        text = read(path) + b"rank_pattern: {to_q: 8}\nsample_prompts: [a, b]\nseed: 3\n"
        for _ in range(count):
            own_path = write(os.path.join(folder, "a.safetensors"), damaged(adapter, draw))
            judged("adapters", own_path, "info", own_path)
            own_path = write(os.path.join(folder, "b.safetensors"), damaged(base, draw))
            judged("bases", own_path, "plan", path, "--set", f"base_model={own_path}")
            own_path = write(os.path.join(folder, "c.yaml"), damaged(text, draw))
            judged("configurations", own_path, "dataset", "--config", own_path)
        names = [name for name in sorted(os.listdir(PICTURES)) if os.path.isfile(os.path.join(PICTURES, name))]
        for start in range(0, count, 50):
            data = os.path.join(folder, f"data-{start}")
            os.mkdir(data)
            for number in range(start, min(count, start + 50)):
                name = names[number % len(names)]
                write(os.path.join(data, f"{number}-{name}"), damaged(read(os.path.join(PICTURES, name)), draw))
            judged("folders of 50 files", os.path.join(data, os.listdir(data)[0]), "dataset", data, "--json")
    for (kind, status), number in sorted(statuses.items(), key=str):
        print(f"{kind}: status {status}: {number}")
    print(f"{len(failures)} failures")
    print("\n".join(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
