"""Tests again and again, in an order of threads that is another each time: a test that fails now and then is a fault.

    python3 tools/reliability/repeat.py [times=10] [arguments="--workspace"] [until=HH:MM]

`arguments` go to `cargo test`, which builds once; then the programs of the tests run by themselves, without those in
documentation. `until` ends the script at a time of day, with what was reached.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time

from common import arguments


def programs(words):
    """The programs that `cargo test` would run, each with the folder that it runs in."""
    built = subprocess.run(["cargo", "test", *words, "--no-run", "--message-format=json"], check=True, stdout=subprocess.PIPE)
    found = [json.loads(line) for line in built.stdout.splitlines() if line.startswith(b"{")]
    found = [own for own in found if own.get("executable") and own.get("profile", {}).get("test")]
    return [(own["executable"], os.path.dirname(own["manifest_path"])) for own in found]


def main():
    own = arguments({"times": "10", "arguments": "--workspace", "until": ""})
    tests = programs(shlex.split(own["arguments"]))
    passed, failed, times = 0, {}, 0
    while times < int(own["times"]) and not (own["until"] and time.strftime("%H:%M") >= own["until"]):
        times += 1
        for program, folder in tests:
            done = subprocess.run([program], cwd=folder, capture_output=True, text=True, errors="replace")
            text = done.stdout + done.stderr
            passed += sum(int(count) for count in re.findall(r"(\d+) passed", text))
            names = re.findall(r"^test (\S+) \.\.\. FAILED", text, re.MULTILINE)
            for name in names or ([f"{os.path.basename(program)} itself"] if done.returncode else []):
                failed[name] = failed.get(name, 0) + 1
        print(f"{times} times: {passed} passed, {sum(failed.values())} failed", file=sys.stderr, flush=True)
    print(f"{times} times {len(tests)} programs: {passed} passed, {sum(failed.values())} failed")
    for name, count in sorted(failed.items()):
        print(f"{name}: {count}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
