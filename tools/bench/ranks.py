"""Pictures a second of several ranks on this machine, against one process.

    python3 tools/bench/ranks.py [lora=target/release/lora] [steps=30] [ranks=1,2] [rounds=3] [device=cpu] [config=FILE]

Trains on the small base and the pictures of the repository, from its root, or with a configuration of your own, whose keys
win but for those of steps and output. Each rank has a step's batch, so that n ranks do n times the work; on the CPU
each has one core, one process too, so that a ratio of n is what adding devices would give at best. Rounds go through all
numbers of ranks in turn. The machine should do nothing else.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile

CONFIG = """base_model: assets/emoji-64/emoji-64.safetensors
train_data_dir: assets/quickstart
output_dir: out
max_resolution: 64
precision: fp32
lora_rank: 8
batch_size: 4
"""


def free_port():
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def rate(lora, count, ranks, device, config):
    """Pictures a second of all ranks together, of the steps behind the first quarter."""
    with tempfile.TemporaryDirectory() as folder:
        if config is None:
            config = os.path.join(folder, "config.yaml")
            with open(config, "w") as file:
                file.write(CONFIG)
        keys = [f"output_dir={folder}", f"max_train_steps={count}", "sample_prompts=[]", f"device={device}"]
        keys += ["lr_warmup_steps=0"]
        common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost"}
        common |= {"MASTER_PORT": str(free_port())} | ({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})
        running = []
        for rank in range(ranks):
            environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [lora, "train", config, "--set", *keys]
            running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        ends = [(own.communicate()[1], own.returncode) for own in running]
        for words, status in ends:
            if status != 0:
                sys.exit(words.decode(errors="replace"))
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            steps = [json.loads(line) for line in file]
    steps = steps[len(steps) // 4 :]
    return statistics.median(step["items"] / step["seconds"] for step in steps)


def main():
    own = {"lora": "target/release/lora", "steps": "30", "ranks": "1,2", "rounds": "3", "device": "cpu", "config": ""}
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name not in own:
            sys.exit(f"{argument}: expected {', '.join(own)}, each with =value")
        own[name] = value
    counts = [int(count) for count in own["ranks"].split(",")]
    found = {count: [] for count in counts}
    for _ in range(int(own["rounds"])):
        for count in counts:
            new = rate(own["lora"], int(own["steps"]), count, own["device"], own["config"] or None)
            found[count].append(new)
            print(f"{count} rank(s): {new:.2f} a second", file=sys.stderr, flush=True)
    first = statistics.median(found[counts[0]])
    print(f"{os.cpu_count()} cores, load before {os.getloadavg()[2]:.1f}")
    print("| ranks | pictures a second | ratio |\n|---:|---:|---:|")
    for count in counts:
        middle = statistics.median(found[count])
        print(f"| {count} | {middle:.2f} | {middle / first:.2f} |")


if __name__ == "__main__":
    main()
