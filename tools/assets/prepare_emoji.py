#!/usr/bin/env python3
"""Makes assets/quickstart: captioned pictures of one style, from the npm package emoji-datasource-google.

    python3 tools/assets/prepare_emoji.py [--package FILE.tgz] [--output FOLDER]

Without --package it fetches the pinned version with `npm pack`. The pictures are the package's own files, unchanged;
captions are made from the names below and the package's own categories. The same package gives the same bytes.
Needs Python 3.9 or later, nothing else.
"""

import argparse
import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE, VERSION = "emoji-datasource-google", "16.0.0"
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
ROOT = Path(__file__).resolve().parents[2]
PICTURES = "package/img/google/64"

# The package's short name: what a person would call it. The file is named after it, without its article.
TRAINING = {
    # animals
    "dog": "the face of a dog",
    "cat": "the face of a cat",
    "fox_face": "the face of a fox",
    "lion_face": "the face of a lion",
    "tiger": "the face of a tiger",
    "panda_face": "the face of a panda",
    "koala": "the face of a koala",
    "rabbit": "the face of a rabbit",
    "frog": "the face of a frog",
    "pig": "the face of a pig",
    "monkey_face": "the face of a monkey",
    "elephant": "an elephant",
    "penguin": "a penguin",
    "owl": "an owl",
    "octopus": "an octopus",
    "tropical_fish": "a tropical fish",
    "whale": "a spouting whale",
    "crab": "a crab",
    "turtle": "a turtle",
    "butterfly": "a butterfly",
    "bee": "a honeybee",
    "ladybug": "a ladybug",
    # plants
    "cactus": "a cactus",
    "sunflower": "a sunflower",
    "tulip": "a tulip",
    "evergreen_tree": "an evergreen tree",
    "mushroom": "a mushroom",
    # food
    "apple": "a red apple",
    "pear": "a pear",
    "banana": "a banana",
    "strawberry": "a strawberry",
    "watermelon": "a slice of watermelon",
    "pineapple": "a pineapple",
    "cherries": "two cherries",
    "carrot": "a carrot",
    "avocado": "an avocado",
    "pizza": "a slice of pizza",
    "hamburger": "a hamburger",
    "doughnut": "a doughnut",
    "cupcake": "a cupcake",
    "icecream": "a soft ice cream",
    "bread": "a loaf of bread",
    "coffee": "a hot cup of coffee",
    # vehicles
    "car": "a red car",
    "bus": "a bus",
    "fire_engine": "a fire engine",
    "tractor": "a tractor",
    "bike": "a bicycle",
    "airplane": "an airplane",
    "helicopter": "a helicopter",
    "boat": "a sailboat",
    "rocket": "a rocket",
    # objects
    "guitar": "a guitar",
    "umbrella_with_rain_drops": "an umbrella in the rain",
    "bulb": "a light bulb",
    "camera": "a camera",
    "crown": "a golden crown",
    "gift": "a wrapped gift",
    "soccer": "a soccer ball",
    "alarm_clock": "an alarm clock",
}
HELD_OUT = {
    "wolf": "the face of a wolf",
    "bear": "the face of a bear",
    "cow": "the face of a cow",
    "hedgehog": "a hedgehog",
    "dolphin": "a dolphin",
    "snail": "a snail",
    "parrot": "a parrot",
    "cherry_blossom": "a cherry blossom",
    "four_leaf_clover": "a four leaf clover",
    "green_apple": "a green apple",
    "lemon": "a lemon",
    "grapes": "a bunch of grapes",
    "pretzel": "a pretzel",
    "cookie": "a cookie",
    "taxi": "a yellow taxi",
    "truck": "a delivery truck",
    "trumpet": "a trumpet",
    "basketball": "a basketball",
    "key": "a golden key",
    "balloon": "a red balloon",
}

# The package's subcategory, as a word for the caption.
KINDS = {
    "animal-mammal": "animal",
    "animal-bird": "bird",
    "animal-amphibian": "animal",
    "animal-reptile": "animal",
    "animal-marine": "sea animal",
    "animal-bug": "small animal",
    "monkey-face": "animal",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "food",
    "food-sweet": "sweet food",
    "drink": "drink",
    "transport-ground": "vehicle",
    "transport-air": "aircraft",
    "transport-water": "boat",
    "musical-instrument": "musical instrument",
    "sky & weather": "weather",
    "light & video": "object",
    "clothing": "object",
    "event": "party object",
    "sport": "sport",
    "time": "object",
    "lock": "object",
}

README = """# Pictures for the quickstart

60 small pictures of one style with captions, to train a first LoRA on, and 20 more in `held_out/` to compare with:
animals, plants, food, vehicles and objects from Noto Emoji, 64 x 64 PNG with an alpha channel. Each `name.txt` is the
caption of `name.png`.

Made by `python3 tools/assets/prepare_emoji.py` from the npm package {package} {version}; run it again to get the same
bytes. Where the pictures come from and under which terms: [ATTRIBUTION.md](ATTRIBUTION.md), [LICENSE](LICENSE).
"""

ATTRIBUTION = """# Attribution

The pictures (`*.png`, here and in `held_out/`) are from **Noto Emoji**, copyright Google LLC,
<https://github.com/googlefonts/noto-emoji>, licensed under the Apache License, Version 2.0 (the file `LICENSE` beside).
They are unmodified copies of the files in `img/google/64` of the npm package `{package}` {version} by Cal Henderson
(<https://github.com/iamcal/emoji-data>), renamed. That package's README says of them: "Android/Google/Noto images, are
available under the Apache License 2.0".

Captions use that package's categories. Its own licence, for the data:

{licence}"""


def fetch(folder):
    """The package's archive through npm."""
    subprocess.run(["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"], cwd=folder, check=True)
    return Path(folder) / f"{PACKAGE}-{VERSION}.tgz"


def caption(phrase, entry):
    kind = KINDS[entry["subcategory"]]
    return f"an emoji of {phrase}, {kind}, flat style, simple shapes, plain background\n"


def stem(phrase):
    for article in ("the face of a ", "an ", "a ", "the "):
        if phrase.startswith(article):
            phrase = phrase[len(article):] + ("_face" if "face" in article else "")
            break
    return phrase.replace(" ", "_")


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--package", type=Path, help="the package's .tgz, instead of fetching it")
    arguments.add_argument("--output", type=Path, default=ROOT / "assets" / "quickstart")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive = options.package or fetch(folder)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"{archive}: SHA-256 is {found}, expected {SHA256} ({PACKAGE} {VERSION})")
        with tarfile.open(archive) as package:
            read = lambda name: package.extractfile(name).read()
            entries = {entry["short_name"]: entry for entry in json.loads(read("package/emoji.json"))}
            wanted = [(options.output, TRAINING), (options.output / "held_out", HELD_OUT)]
            size = 0
            for target, names in wanted:
                target.mkdir(parents=True, exist_ok=True)
                for old in [*target.glob("*.png"), *target.glob("*.txt")]:
                    old.unlink()
                assert len({stem(phrase) for phrase in names.values()}) == len(names)
                for short_name, phrase in names.items():
                    entry = entries[short_name]
                    assert entry["has_img_google"], short_name
                    picture = read(f"{PICTURES}/{entry['image']}")
                    (target / f"{stem(phrase)}.png").write_bytes(picture)
                    (target / f"{stem(phrase)}.txt").write_text(caption(phrase, entry))
                    size += len(picture)
            licence = read("package/LICENSE").decode().replace("\r\n", "\n")
    terms = {"package": PACKAGE, "version": VERSION}
    (options.output / "README.md").write_text(README.format(**terms))
    quoted = "".join(f"> {line}".rstrip() + "\n" for line in licence.splitlines())
    (options.output / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(**terms, licence=quoted))
    # The project's own licence has the same text.
    (options.output / "LICENSE").write_bytes((ROOT / "LICENSE").read_bytes())
    print(f"{options.output}: {len(TRAINING)} pictures, {len(HELD_OUT)} held out, {size} bytes")


if __name__ == "__main__":
    main()
