#!/usr/bin/env python3
"""Prepares emoji art from pinned npm packages: captioned pictures of 64 x 64 pixels in several styles.

    pip install -r tools/assets/requirements.txt
    python3 tools/assets/prepare_emoji.py base FOLDER     what the small base model is trained on: four styles
    python3 tools/assets/prepare_emoji.py quickstart      assets/quickstart: a fifth style, which the base never sees

`base` writes FOLDER/train/STYLE (the quickstart's subjects and three in ten of the others), FOLDER/held_out/STYLE (one
subject in seven of those, in one style: the base sees it in the other styles only), FOLDER/more/STYLE (the other subjects,
for the autoencoder) and FOLDER/known/STYLE (of `train`, what the second stage is trained on: the quickstart's subjects and
those held out, in three styles). Captions are the emoji's official English name, a word for its kind and, for the base, its style:
`red apple, fruit, noto`. Packages are fetched with `npm pack`, or taken from --packages. The same versions give the same
bytes.
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import resvg_py
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SIDE = 64

# npm package -> version, SHA-256 of its archive.
PACKAGES = {
    "emoji-datasource-google": ("16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "emoji-datasource-twitter": ("16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
    "fluentui-emoji": ("1.3.0", "ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5"),
    "unicode-emoji-json": ("0.9.0", "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401"),
}

# Style -> package and folder of its pictures.
BASE_STYLES = {
    "noto": ("emoji-datasource-google", "package/img/google/64"),
    "twemoji": ("emoji-datasource-twitter", "package/img/twitter/64"),
    "fluent": ("fluentui-emoji", "package/icons/flat"),
    "gradient": ("fluentui-emoji", "package/icons/modern"),
}
NEW_STYLE = ("fluentui-emoji", "package/icons/high-contrast")

# Subcategory of Unicode's list -> the word in captions. Others (faces, people, flags, signs, letters) are left out.
KINDS = {
    "animal-mammal": "animal",
    "animal-bird": "bird",
    "animal-amphibian": "animal",
    "animal-reptile": "reptile",
    "animal-marine": "sea animal",
    "animal-bug": "small animal",
    "monkey-face": "animal",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "food",
    "food-asian": "food",
    "food-sweet": "sweet food",
    "drink": "drink",
    "dishware": "dishware",
    "transport-ground": "vehicle",
    "transport-air": "aircraft",
    "transport-water": "boat",
    "place-building": "building",
    "place-geographic": "landscape",
    "sky & weather": "weather",
    "musical-instrument": "musical instrument",
    "sport": "sport",
    "game": "game",
    "event": "party object",
    "award-medal": "award",
    "arts & crafts": "craft",
    "clothing": "clothing",
    "household": "household object",
    "light & video": "device",
    "computer": "device",
    "phone": "device",
    "office": "office object",
    "writing": "office object",
    "tool": "tool",
    "science": "science",
    "medical": "medicine",
    "lock": "lock",
    "money": "money",
    "hotel": "object",
    "time": "clock",
}
# The styles of the second stage: of the fourth, the base shall only have heard.
KNOWN_STYLES = {"noto", "twemoji", "fluent"}
# Dials that differ by a hand.
LEFT_OUT = {f"clock{hour}{half}" for hour in range(1, 13) for half in ("", "30")}

QUICKSTART = """
dog face, cat face, fox, lion, tiger face, panda, koala, rabbit face, frog, pig face, monkey face, elephant, penguin, owl,
octopus, tropical fish, spouting whale, crab, turtle, butterfly, honeybee, lady beetle, cactus, sunflower, tulip,
evergreen tree, mushroom, red apple, pear, banana, strawberry, watermelon, pineapple, cherries, carrot, avocado, pizza,
hamburger, doughnut, cupcake, soft ice cream, bread, hot beverage, automobile, bus, fire engine, tractor, bicycle, airplane,
helicopter, sailboat, rocket, guitar, umbrella with rain drops, light bulb, camera, crown, wrapped gift, soccer ball,
alarm clock
"""
QUICKSTART_HELD_OUT = """
wolf, bear, cow face, hedgehog, dolphin, snail, parrot, cherry blossom, four leaf clover, green apple, lemon, grapes, pretzel,
cookie, taxi, delivery truck, trumpet, basketball, key, balloon
"""

README = """# Pictures for the quickstart

60 small pictures of one style with captions, to train a first LoRA on, and 20 more in `held_out/` to compare with:
animals, plants, food, vehicles and objects in black ink, 64 x 64 PNG. Each `name.txt` is the caption of `name.png`. The base
model in `assets/emoji-64` has seen these subjects in colour and never this style.

Made by `python3 tools/assets/prepare_emoji.py quickstart` from the npm package {package} {version}; run it again to get the
same bytes. Where the pictures come from and under which terms: [ATTRIBUTION.md](ATTRIBUTION.md).
"""

ATTRIBUTION = """# Attribution

The pictures (`*.png`, here and in `held_out/`) are the high-contrast style of **Fluent Emoji**, copyright Microsoft
Corporation, <https://github.com/microsoft/fluentui-emoji>, licensed under the MIT License. They were drawn at 64 x 64 pixels
from the SVG files in `icons/high-contrast` of the npm package `{package}` {version}, whose own licence is:

{licence}
Captions are the emoji's official English names (Unicode CLDR) and words of our own.
"""


def listed(text):
    return [name.strip() for name in text.replace("\n", " ").split(",")]


class Packages:
    """The pinned packages' archives."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.open = {}

    def read(self, package, name):
        """A file of a package; None where it has no such file."""
        if package not in self.open:
            version, expected = PACKAGES[package]
            path = self.folder / f"{package}-{version}.tgz"
            if not path.exists():
                subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=self.folder, check=True)
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != expected:
                raise SystemExit(f"{path}: SHA-256 is {found}, expected {expected}")
            archive = tarfile.open(path)
            self.open[package] = (archive, {member.name: member for member in archive.getmembers()})
        archive, members = self.open[package]
        return archive.extractfile(members[name]).read() if name in members else None

    def picture(self, place, emoji):
        """An emoji in a style, RGBA of SIDE x SIDE; None where the style lacks it."""
        package, folder = place
        if package == "fluentui-emoji":
            svg = self.read(package, f"{folder}/{emoji['slug']}.svg")
            if svg is None:
                return None
            # Larger and then reduced: clipped gradients are drawn with hard edges.
            drawn = bytes(resvg_py.svg_to_bytes(svg_string=svg.decode(), width=4 * SIDE, height=4 * SIDE))
            return Image.open(io.BytesIO(drawn)).convert("RGBa").resize((SIDE, SIDE), Image.BOX).convert("RGBA")
        png = self.read(package, f"{folder}/{emoji['image']}")
        return png and Image.open(io.BytesIO(png)).convert("RGBA").resize((SIDE, SIDE), Image.LANCZOS)

    def emoji(self):
        """The emoji that captions can name, in Unicode's order."""
        names = json.loads(self.read("unicode-emoji-json", "package/data-by-emoji.json"))
        bare = lambda text: text.replace("\ufe0f", "")
        names = {bare(emoji): entry for emoji, entry in names.items()}
        found = []
        for entry in json.loads(self.read("emoji-datasource-google", "package/emoji.json")):
            kind = KINDS.get(entry["subcategory"])
            emoji = bare("".join(chr(int(code, 16)) for code in entry["unified"].split("-")))
            if kind is None or emoji not in names or entry["short_name"] in LEFT_OUT:
                continue
            slug = names[emoji]["slug"].replace("_", "-")
            name = names[emoji]["name"]
            found.append({"name": name, "slug": slug, "kind": kind, "image": entry["image"], "order": entry["sort_order"]})
        return sorted(found, key=lambda emoji: emoji["order"])


def save(folder, emoji, picture, *style):
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{emoji['slug']}.png", optimize=True)
    (folder / f"{emoji['slug']}.txt").write_text(", ".join([emoji["name"], emoji["kind"], *style]) + "\n")


def parts(slug, styles, chosen):
    """Where each style's picture of a subject belongs; by the hash of its name."""
    draw = int.from_bytes(hashlib.sha256(slug.encode()).digest()[:4], "big")
    if slug not in chosen and draw // 49 % 10 >= 3:
        return {style: "more" for style in styles}
    held_out = sorted(styles)[draw // 7 % len(styles)] if draw % 7 == 0 and len(styles) > 2 else None
    return {style: "held_out" if style == held_out else "train" for style in styles}


def base(packages, output):
    chosen = {name.replace(" ", "-") for name in listed(QUICKSTART) + listed(QUICKSTART_HELD_OUT)}
    counts = {"train": 0, "held_out": 0, "more": 0, "known": 0}
    for emoji in packages.emoji():
        pictures = {style: packages.picture(place, emoji) for style, place in BASE_STYLES.items()}
        pictures = {style: picture for style, picture in pictures.items() if picture}
        places = parts(emoji["slug"], pictures, chosen)
        known = emoji["slug"] in chosen or "held_out" in places.values()
        for style, part in places.items():
            save(output / part / style, emoji, pictures[style], style)
            counts[part] += 1
            if part == "train" and known and style in KNOWN_STYLES:
                save(output / "known" / style, emoji, pictures[style], style)
                counts["known"] += 1
    print(f"{output}: " + ", ".join(f"{count} {part}" for part, count in counts.items()))


def quickstart(packages, output):
    by_name = {emoji["name"]: emoji for emoji in packages.emoji()}
    for target, names in ((output, listed(QUICKSTART)), (output / "held_out", listed(QUICKSTART_HELD_OUT))):
        target.mkdir(parents=True, exist_ok=True)
        for old in [*target.glob("*.png"), *target.glob("*.txt")]:
            old.unlink()
        for name in names:
            picture = packages.picture(NEW_STYLE, by_name[name])
            paper = Image.new("RGBA", picture.size, "white")
            save(target, by_name[name], Image.alpha_composite(paper, picture).convert("L"))
    licence = packages.read("fluentui-emoji", "package/LICENSE").decode().replace("\r\n", "\n")
    terms = {"package": "fluentui-emoji", "version": PACKAGES["fluentui-emoji"][0]}
    (output / "README.md").write_text(README.format(**terms))
    quoted = "".join(f"> {line}".rstrip() + "\n" for line in licence.splitlines())
    (output / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(**terms, licence=quoted))
    print(f"{output}: {len(listed(QUICKSTART))} pictures, {len(listed(QUICKSTART_HELD_OUT))} held out")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--packages", type=Path, help="folder of the packages' archives, kept there when fetched")
    commands = arguments.add_subparsers(dest="command", required=True)
    commands.add_parser("base").add_argument("output", type=Path)
    commands.add_parser("quickstart").add_argument("output", type=Path, nargs="?", default=ROOT / "assets" / "quickstart")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.packages:
            options.packages.mkdir(parents=True, exist_ok=True)
        make = {"base": base, "quickstart": quickstart}[options.command]
        make(Packages(options.packages or folder), options.output)


if __name__ == "__main__":
    main()
