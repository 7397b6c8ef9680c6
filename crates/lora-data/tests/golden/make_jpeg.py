"""Small JPEGs in the forms that cameras and programs write, and what libjpeg makes of them at reduced size.

pip install pillow==13.0.0 numpy==2.3.5; python make_jpeg.py (writes into jpeg/ beside it)
"""

import pathlib

import numpy as np
from PIL import Image

out = pathlib.Path(__file__).parent / "jpeg"
out.mkdir(exist_ok=True)
y, x = np.mgrid[0:117, 0:150].astype(float)
waves = [128 + 70 * np.sin(x / 9 + k) * np.cos(y / (7 + 2 * k)) + 30 * np.sin((x + y) / (3 + k)) for k in range(3)]
picture = Image.fromarray(np.stack(waves, -1).clip(0, 255).astype("uint8"))
forms = {
    "444": (picture, dict(subsampling=0)),
    "422": (picture, dict(subsampling=1)),
    "420": (picture, dict(subsampling=2)),
    "grey": (picture.convert("L"), {}),
    "restart": (picture, dict(subsampling=2, restart_marker_blocks=3)),
    "optimised": (picture, dict(subsampling=2, optimize=True, quality=97)),
    "progressive": (picture, dict(subsampling=2, progressive=True)),
    "cmyk": (picture.convert("CMYK"), {}),
}
for name, (form, options) in forms.items():
    path = out / f"{name}.jpg"
    form.save(path, **{"quality": 88, **options})
    if name == "cmyk":
        Image.open(path).convert("RGB").save(out / f"{name}-1.png")
        continue
    for factor in (1, 2, 4, 8):
        half = Image.open(path)
        half.draft(None, (half.size[0] // factor, half.size[1] // factor))
        assert half.size == (-(-150 // factor), -(-117 // factor)), half.size
        half.convert("RGB").save(out / f"{name}-{factor}.png", optimize=True)
