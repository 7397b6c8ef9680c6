"""Tests again and again, with other numbers of threads, as on other processors and several programs at a time: a test that fails
now and then, or elsewhere, is a fault.

    python3 tools/reliability/repeat.py [times=10] [arguments="--workspace"] [at_once=1] [longest=SECONDS] [until=HH:MM]
        [logs=out/repeat]

`arguments` go to `cargo test`, which builds once; then the programs of the tests run by themselves, without those in
documentation, in an order that is another each time, `at_once` beside each other. Threads of libtorch's kernels are as many as
there are cores, one and three by turns; the kernels are this processor's for three rounds, then for three those of one with AVX2
alone. Programs that took longer than `longest` are not run again. What a failed program printed lies in `logs`. `until` ends the
script at a time of day, with what was reached: a round that was begun counts for the programs that ran.
"""

import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import arguments

# Threads of libtorch's kernels, by the round; None is as many as cores.
THREADS = (None, "1", "3")
# What its libraries are told that the processor has, by three rounds each.
PROCESSORS = (
    {},
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
)


def programs(words):
    """The programs that `cargo test` would run, each with the folder that it runs in."""
    built = subprocess.run(["cargo", "test", *words, "--no-run", "--message-format=json"], check=True, stdout=subprocess.PIPE)
    found = [json.loads(line) for line in built.stdout.splitlines() if line.startswith(b"{")]
    found = [own for own in found if own.get("executable") and own.get("profile", {}).get("test")]
    return [(own["executable"], os.path.dirname(own["manifest_path"])) for own in found]


def run(program, folder, threads, processor):
    """How many tests of a program passed, the names of those that failed, what it printed, and the seconds it took."""
    # Kernels' threads that keep looking for work would take the cores from the programs beside this one.
    variables = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"} | processor | ({"OMP_NUM_THREADS": threads} if threads else {})
    began = time.monotonic()
    done = subprocess.run([program], cwd=folder, capture_output=True, text=True, errors="replace", env=variables)
    text = done.stdout + done.stderr
    names = re.findall(r"^test (\S+) \.\.\. FAILED", text, re.MULTILINE)
    names = names or ([f"{os.path.basename(program)} itself"] if done.returncode else [])
    return sum(int(count) for count in re.findall(r"(\d+) passed", text)), names, text, time.monotonic() - began


def main():
    own = arguments({"times": "10", "arguments": "--workspace", "at_once": "1", "longest": "inf", "until": "", "logs": "out/repeat"})
    tests = programs(shlex.split(own["arguments"]))
    logs = Path(own["logs"])
    passed, failed, again, times = 0, {}, list(tests), 0
    runs, sizes = dict.fromkeys(tests, 0), dict.fromkeys(tests, 0)
    over = lambda: own["until"] and time.strftime("%H:%M") >= own["until"]
    while again and times < int(own["times"]) and not over():
        threads, processor = THREADS[times % len(THREADS)], PROCESSORS[times // len(THREADS) % len(PROCESSORS)]
        times += 1
        order = random.sample(again, len(again))
        with ThreadPoolExecutor(int(own["at_once"])) as pool:
            outcomes = pool.map(lambda test: None if over() else run(*test, threads, processor), order)
            for test, outcome in zip(order, outcomes):
                if outcome is None:
                    continue
                count, names, text, seconds = outcome
                passed, runs[test], sizes[test] = passed + count, runs[test] + 1, count + len(names)
                if seconds > float(own["longest"]):
                    again.remove(test)
                for name in names:
                    failed[name] = failed.get(name, 0) + 1
                if names:
                    logs.mkdir(parents=True, exist_ok=True)
                    (logs / f"{os.path.basename(test[0])}-{times}.txt").write_text(f"threads: {threads}, {processor}\n{text}")
        print(f"{times} times: {passed} passed, {sum(failed.values())} failed", file=sys.stderr, flush=True)
    for often in sorted(set(runs.values())):
        own = [test for test in tests if runs[test] == often]
        print(f"{often} times: {sum(sizes[test] for test in own)} tests in {len(own)} programs")
    print(f"{passed} passed, {sum(failed.values())} failed")
    for name, count in sorted(failed.items()):
        print(f"{name}: {count}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
