"""Every reader's fuzz target for a number of inputs; ends with status 1 where one of them fails, and names the input.

    (cd fuzz && cargo run --bin seeds && cargo +nightly fuzz build -s none)
    python3 tools/reliability/fuzz.py [binaries=fuzz/target/x86_64-unknown-linux-gnu/release] [targets=all] [runs=700000] [seconds=0]

Needs a nightly compiler and `cargo install cargo-fuzz`. `targets` are names with commas; without a sanitizer inputs are several
times as many, and all but the maps of files is safe code. `seconds` ends each target earlier. An input that takes longer than ten
seconds, or more memory than `fuzz/src/lib.rs` gives out, fails. TMPDIR should be in memory.
"""

import os
import re
import subprocess
import sys

from common import arguments


def main():
    own = arguments(
        {
            "binaries": "fuzz/target/x86_64-unknown-linux-gnu/release",
            "targets": "all",
            "runs": "700000",
            "seconds": "0",
        }
    )
    names = sorted(name.removesuffix(".rs") for name in os.listdir("fuzz/fuzz_targets"))
    names = names if own["targets"] == "all" else own["targets"].split(",")
    total, failures = 0, []
    for name in names:
        corpus, found = os.path.join("fuzz/corpus", name), os.path.join("fuzz/artifacts", name, "")
        os.makedirs(corpus, exist_ok=True)
        os.makedirs(found, exist_ok=True)
        options = [f"-runs={own['runs']}", f"-max_total_time={own['seconds']}", f"-artifact_prefix={found}"]
        options += ["-timeout=10", "-rss_limit_mb=2048", "-max_len=20000", "-print_final_stats=1"]
        done = subprocess.run([os.path.join(own["binaries"], name), corpus, *options], capture_output=True)
        said = done.stderr.decode(errors="replace")
        count = sum(int(number) for number in re.findall(r"stat::number_of_executed_units: *(\d+)", said))
        count = count or max((int(number) for number in re.findall(r"^#(\d+)", said, re.MULTILINE)), default=0)
        total += count
        print(f"{name}: {count} inputs{'' if done.returncode == 0 else ', and one that fails'}", flush=True)
        if done.returncode != 0:
            failures.append(f"{name}: {said[-1500:]}")
    print(f"{total} inputs: {len(failures)} failures")
    print("\n".join(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
