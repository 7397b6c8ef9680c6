"""Milliseconds of a step on the CPU while other programs compute, by how the threads of kernels wait for each other.

    python3 tools/bench/busy.py [lora=target/release/lora] [steps=40] [busy=0,1,2] [rounds=3]

Trains on the small base and the pictures of the repository, from its root. Rows are settings of the environment, columns the
number of other programs that keep a core busy all the time. Of each, the middle of all steps of all rounds but the first
steps counts; rounds go through all settings in turn, so that what else the machine does meets all of them alike. The
machine should do nothing else.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile

SETTINGS = {
    # A set variable keeps `lora train` from setting its own: 300000 is what libgomp takes without any.
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "one thread less": {"GOMP_SPINCOUNT": "300000", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) - 1))},
    "one thread less, GOMP_SPINCOUNT=1000": {
        "GOMP_SPINCOUNT": "1000",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) - 1)),
    },
    "as lora train sets it": {},
}
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def steps(lora, count, setting):
    """Milliseconds of each step of a run but the first quarter."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | setting
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"output_dir={folder}", f"max_train_steps={count}", "sample_prompts=[]", "device=cpu", "batch_size=2"]
        keys += ["lr_warmup_steps=0"]
        config = "base_model: assets/emoji-64/emoji-64.safetensors\ntrain_data_dir: assets/quickstart\n"
        config += "output_dir: out\nmax_resolution: 64\nprecision: fp32\nlora_rank: 8\n"
        with open(os.path.join(folder, "config.yaml"), "w") as file:
            file.write(config)
        command = [lora, "train", os.path.join(folder, "config.yaml"), "--set", *keys]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            seconds = [json.loads(line)["seconds"] for line in file]
    return [1000 * own for own in seconds[len(seconds) // 4 :]]


def main():
    own = {"lora": "target/release/lora", "steps": "40", "busy": "0,1,2", "rounds": "3"}
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name not in own:
            sys.exit(f"{argument}: expected {', '.join(own)}, each with =value")
        own[name] = value
    busy = [int(count) for count in own["busy"].split(",")]
    found = {(name, count): [] for name in SETTINGS for count in busy}
    for _ in range(int(own["rounds"])):
        for count in busy:
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
            try:
                for name, setting in SETTINGS.items():
                    new = steps(own["lora"], int(own["steps"]), setting)
                    found[name, count] += new
                    print(f"beside {count}, {name}: {statistics.median(new):.1f} ms", file=sys.stderr, flush=True)
            finally:
                for other in others:
                    other.kill()
                    other.wait()
    print(f"{os.cpu_count()} cores, load before {os.getloadavg()[2]:.1f}; ms a step, the middle one")
    print("| threads wait | " + " | ".join(f"beside {count}" for count in busy) + " |")
    print("|---|" + "---:|" * len(busy))
    for name in SETTINGS:
        print(f"| {name} | " + " | ".join(f"{statistics.median(found[name, count]):.1f}" for count in busy) + " |")


if __name__ == "__main__":
    main()
