"""crates/lora-data/tests/golden/jpeg/damaged.tsv: what PIL (libjpeg-turbo) makes of damaged copies of the pictures there.

A line holds a picture's name, what is done to its bytes, and the outcome: `same` pixels as of the whole file, `other` pixels,
or `refused`. What is done is one of

- `keep N`: the first N bytes
- `set AT HEX`: these bytes over those that are there
- `insert AT HEX`: these bytes between
- `remove AT N`: N bytes less
- `zero AT N`: N bytes of zeros over those that are there

The same lines come out each time with the pinned packages (requirements.txt).
"""

import io
import random
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "crates" / "lora-data" / "tests" / "golden" / "jpeg"
NAMES = ["444", "422", "420", "grey", "restart", "optimised", "progressive", "cmyk"]


def segments(data):
    """Marker, place and length of each segment up to the first scan's."""
    at, found = 2, []
    while True:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((marker, at, length))
        at += 2 + length
        if marker == 0xDA:
            return found


def damages(data, draw):
    parts = segments(data)
    scan = parts[-1][1] + 2 + parts[-1][2]
    length, second = len(data), parts[1][1]
    for share in range(1, 20):
        yield f"keep {length * share // 20}"
    for short in (1, 2, 3, 4, 8, 16):
        yield f"keep {length - short}"
    for _, at, own in parts:
        for change in (-1, 1, 300):
            yield f"set {at + 2} {max(0, own + change):04x}"
    for _ in range(3):
        at = draw.randrange(scan, length - 2)
        yield f"zero {at} {length - at}"
        yield f"zero {at} {min(64, length - 2 - at)}"
        yield f"remove {at} {min(draw.choice((1, 64, 500)), length - 2 - at)}"
        yield f"insert {at} ffd9"
        yield f"insert {at} fffe00046162"
    for first, last, count in ((scan, length - 2, 20), (2, scan, 20)):
        for _ in range(count):
            at = draw.randrange(first, last)
            yield f"set {at} {data[at] ^ 1 << draw.randrange(8):02x}"
    yield f"insert {length} {draw.randbytes(20).hex()}"
    yield f"insert {second} 0001"
    yield f"insert {second} ffff"
    # An end within a segment, as of a thumbnail.
    yield "insert 2 ffe1000a457869660000ffd9"


def damaged(data, edit):
    kind, at, *rest = edit.split()
    at = int(at)
    if kind == "keep":
        return data[:at]
    if kind == "remove":
        return data[:at] + data[at + int(rest[0]) :]
    if kind == "zero":
        return data[:at] + bytes(int(rest[0])) + data[at + int(rest[0]) :]
    new = bytes.fromhex(rest[0])
    return data[:at] + new + data[at + (len(new) if kind == "set" else 0) :]


def pixels(data):
    try:
        return Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    except Exception:
        return None


def main():
    lines = []
    for name in NAMES:
        data = (FOLDER / f"{name}.jpg").read_bytes()
        whole = pixels(data)
        for edit in damages(data, random.Random(name)):
            found = pixels(damaged(data, edit))
            outcome = "refused" if found is None else "same" if found == whole else "other"
            lines.append(f"{name}\t{edit}\t{outcome}\n")
    (FOLDER / "damaged.tsv").write_text("".join(lines))
    print(f"damaged.tsv: {len(lines)} files")


if __name__ == "__main__":
    main()
