"""Tests again and again, in an order of threads that is another each time: a test that fails now and then is a fault.

    python3 tools/reliability/repeat.py [times=10] [arguments="--workspace"]

`arguments` go to `cargo test`; what is built is built before the first time counts.
"""

import re
import shlex
import subprocess
import sys

from common import arguments


def main():
    own = arguments({"times": "10", "arguments": "--workspace"})
    words = ["cargo", "test", *shlex.split(own["arguments"])]
    subprocess.run([*words, "--no-run"], check=True, capture_output=True)
    passed, failed = 0, {}
    for _ in range(int(own["times"])):
        done = subprocess.run([*words, "--no-fail-fast"], capture_output=True, text=True)
        text = done.stdout + done.stderr
        passed += sum(int(count) for count in re.findall(r"(\d+) passed", text))
        names = re.findall(r"^test (\S+) \.\.\. FAILED", text, re.MULTILINE)
        for name in names or (["the run itself"] if done.returncode else []):
            failed[name] = failed.get(name, 0) + 1
    print(f"{own['times']} times: {passed} passed, {sum(failed.values())} failed")
    for name, count in sorted(failed.items()):
        print(f"{name}: {count}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
