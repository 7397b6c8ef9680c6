"""Reads a run's TensorBoard files with TensorBoard itself and holds them against the run's `metrics.jsonl`.

python check_tensorboard.py OUTPUT_DIR [--logs OUTPUT_DIR/logs/NAME]
"""

import argparse
import io
import json
import math
from pathlib import Path

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--logs", type=Path)
    arguments = arguments.parse_args()
    logs = arguments.logs or next(path for path in (arguments.folder / "logs").iterdir() if path.is_dir())
    everything = {"scalars": 0, "images": 0, "tensors": 0}
    events = EventAccumulator(str(logs), size_guidance=everything)
    events.Reload()

    lines = [json.loads(line) for line in (arguments.folder / "metrics.jsonl").read_text().splitlines()]
    for tag, field in [("loss/current", "loss"), ("norm/gradient", "gradient_norm")]:
        expected = {line["step"]: line[field] for line in lines if line[field] is not None}
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert len(found) == len(events.Scalars(tag)), f"{tag}: steps that were done again count once"
        assert found.keys() == expected.keys(), (tag, found.keys() ^ expected.keys())
        assert all(math.isclose(found[step], expected[step], rel_tol=1e-6) for step in found), tag
    for name in lines[0]["learning_rates"]:
        found = [event.value for event in events.Scalars(f"lr/{name}")]
        expected = [line["learning_rates"][name] for line in lines]
        assert all(map(lambda a, b: math.isclose(a, b, rel_tol=1e-6), found, expected)), name
    validation = arguments.folder / "validation.jsonl"
    if validation.exists():
        looks = {look["step"]: look["loss"] for look in map(json.loads, validation.read_text().splitlines())}
        found = {event.step: event.value for event in events.Scalars("loss/validation")}
        assert found.keys() == looks.keys(), (found, looks)
        assert all(math.isclose(found[step], looks[step], rel_tol=1e-6) for step in found)
    tags = events.Tags()
    for tag in tags["images"]:
        for image in events.Images(tag):
            picture = Image.open(io.BytesIO(image.encoded_image_string))
            assert picture.size == (image.width, image.height), (tag, picture.size)
    print(f"{len(lines)} steps agree; scalars {tags['scalars']}, images {tags['images']}, texts {tags['tensors']}")


if __name__ == "__main__":
    main()
