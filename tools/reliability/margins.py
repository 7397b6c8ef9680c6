"""How near the tests come to their bounds: numbers that are compared with a float differ between processors and numbers of
threads, whose kernels add in other orders, and a bound that holds by a hair on one machine fails on another.

    python3 tools/reliability/margins.py [share=0.33] [at_once=1] [arguments="--workspace --all-targets"] [copy=out/margins]

Copies the repository, has each comparison of an assertion with a float write down both sides and pass, and runs the tests with
the kernels of this processor, of one with AVX2 and of one with SSE 4, with one thread and with two. Prints every bound of which
one of these used up `share` or more, with the share for each (`AVX2 × 2`: two threads). Where all are alike, no order decides and
the bound may stay. Tests that want two numbers to differ fail in the copy, which says nothing.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from common import arguments
from repeat import PROCESSORS, programs, run

SSE = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
WAYS = [(name, threads, own) for name, own in zip(("own", "AVX2", "SSE 4"), (*PROCESSORS, SSE)) for threads in ("1", "2")]

# An expression: a function that makes the right side of a comparison of its value and its place.
NOTED = """{
    #[derive(PartialEq)]
    struct Bound(f64, &'static str, u32);
    macro_rules! noted { ($($kind:ty)*) => { $(
        impl PartialEq<Bound> for $kind { fn eq(&self, _: &Bound) -> bool { false } }
        impl PartialOrd<Bound> for $kind {
            fn partial_cmp(&self, bound: &Bound) -> Option<std::cmp::Ordering> {
                if let Ok(path) = std::env::var("MARGINS") {
                    let mut file = std::fs::OpenOptions::new().append(true).create(true).open(path).unwrap();
                    let line = format!("{}:{} {:e} {:e}\\n", bound.1, bound.2, f64::from(*self), bound.0);
                    std::io::Write::write_all(&mut file, line.as_bytes()).unwrap();
                }
                Some(std::cmp::Ordering::Less)
            }
        }
    )* } }
    noted!(f64 f32);
    Bound
}"""


def end(line, begin):
    """Where the right side of a comparison ends: at what binds less, or a bracket that was open before."""
    is_choice, depth = line.startswith("if ", begin), 0
    for place in range(begin, len(line)):
        depth += (line[place] in "([{") - (line[place] in ")]}")
        stops = (",", ";", " &&", " ||") if is_choice else (",", ";", " &&", " ||", " {")
        if depth < 0 or depth == 0 and any(line.startswith(stop, place) for stop in stops):
            return place
    return len(line)


def rewritten(text, noted):
    """A test's text with what its numbers are compared with noted."""
    # Besides literals, what a file gives a small number.
    names = {"tolerance", "bound", *re.findall(r"let (\w+) = [^;]*?\de-\d", text)}
    is_bound = re.compile(r"\de-\d|\b0\.0\d|\b(?:%s)\b" % "|".join(sorted(names)))
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if line.lstrip().startswith(("//", "if ", "while ", "} else if ")):
            continue
        for first in [own.end() for own in re.finditer(r" <=? ", line)][::-1]:
            last = end(line, first)
            in_text = line[:first].replace('\\"', "").count('"') % 2 or '"' in line[first:last]
            if not in_text and is_bound.search(line, first, last):
                place = f'(include!("{noted}"))(({line[first:last]}) as f64, file!(), line!())'
                lines[number] = line = line[:first] + place + line[last:]
    return "\n".join(lines)


def instrument(copy):
    """Copies the repository with its tests' comparisons rewritten."""
    shutil.rmtree(copy, ignore_errors=True)
    noted = os.path.abspath(os.path.join(copy, "noted.inc"))
    files = subprocess.run(["git", "ls-files", "-z"], check=True, stdout=subprocess.PIPE, text=True).stdout.split("\0")
    for path in filter(os.path.exists, filter(None, files)):
        os.makedirs(os.path.dirname(os.path.join(copy, path)), exist_ok=True)
        shutil.copy2(path, os.path.join(copy, path))
        if not (path.startswith("crates/") and path.endswith(".rs")):
            continue
        text = open(path).read()
        own = re.search(r"^\s*#\[cfg\(test\)\]\s*mod \w+ \{", text, re.MULTILINE)
        begin = 0 if "/tests" in path else own.start() if own else len(text)
        with open(os.path.join(copy, path), "w") as file:
            file.write(text[:begin] + rewritten(text[begin:], noted))
    with open(noted, "w") as file:
        file.write(NOTED)


def main():
    own = arguments({"share": "0.33", "at_once": "1", "arguments": "--workspace --all-targets", "copy": "out/margins"})
    instrument(own["copy"])
    # What is of no crate of this repository is not built again.
    os.environ.setdefault("CARGO_TARGET_DIR", os.path.abspath("target"))
    os.chdir(own["copy"])
    subprocess.run(["make", "--no-print-directory", "setup", "setup-onnx"], check=True)
    tests, shares = programs(shlex.split(own["arguments"])), {}
    for name, threads, processor in WAYS:
        way, log = f"{name} × {threads}", os.path.abspath("noted.log")
        with ThreadPoolExecutor(int(own["at_once"])) as pool:
            list(pool.map(lambda test: run(*test, threads, processor | {"MARGINS": log}), tests))
        with open(log) as file:
            lines = file.readlines()
        os.remove(log)
        for line in lines:
            place, value, bound = line.rsplit(" ", 2)
            value, bound = float(value), float(bound)
            share = abs(value) / bound if bound else float(value != 0.0)
            shares.setdefault(place, {})[way] = max(share, shares.get(place, {}).get(way, 0.0))
        print(f"{way}: {len(shares)} bounds", file=sys.stderr, flush=True)
    for place, ways in sorted(shares.items(), key=lambda own: -max(own[1].values())):
        if max(ways.values()) >= float(own["share"]):
            print(place, ", ".join(f"{way} {share:.2f}" for way, share in ways.items()), sep=": ")


if __name__ == "__main__":
    main()
