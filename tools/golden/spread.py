"""How far the golden files move with two threads instead of one, and in float64: what tolerances have to allow.

    python spread.py         remakes everything twice into temporary folders and compares with the files in place
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

import files
import tiny

SCRIPTS = ["make_models.py", "make_gradients.py", "make_trajectory.py", "make_samplers.py"]
if tiny.MODEL == "sd2":
    SCRIPTS.append("make_schedules.py")


def compare(folder, kept):
    for path in sorted(Path(kept).glob(f"{tiny.FILES}*.safetensors")):
        ours, theirs = load_file(path), load_file(Path(folder) / path.relative_to(kept))
        assert ours.keys() == theirs.keys()
        rows = []
        for name, tensor in ours.items():
            if not tensor.is_floating_point():
                assert tensor.equal(theirs[name]), name
                continue
            difference = (tensor.double() - theirs[name].double()).norm().item()
            norm = tensor.double().norm().item()
            rows.append((difference / norm if norm else float(difference > 0), norm, difference, name))
        nothing = [row for row in rows if row[1] < 1e-7]
        print(f"{path.name}: largest |difference| / |tensor|")
        for relative, norm, _, name in sorted((row for row in rows if row not in nothing), reverse=True)[:5]:
            print(f"    {relative:.1e}  (norm {norm:.1e})  {name}")
        if nothing:
            print(f"    {len(nothing)} tensors of norm < 1e-7, largest |difference| {max(row[2] for row in nothing):.1e}")


def main():
    for changed in ({"GOLDEN_THREADS": "2"}, {"GOLDEN_DTYPE": "float64"}):
        with tempfile.TemporaryDirectory() as folder:
            for script in SCRIPTS:
                environment = os.environ | changed | {"GOLDEN_FOLDER": folder}
                subprocess.run([sys.executable, script], cwd=Path(__file__).parent, env=environment, check=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            print(f"== {changed}")
            compare(folder, files.FOLDER)


if __name__ == "__main__":
    main()
