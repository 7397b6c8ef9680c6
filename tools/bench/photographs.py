"""Images per second of torchvision and PIL on a folder of JPEGs, cut to sd-scripts' buckets around 512 px, two workers.

pip install torch==2.11.0 torchvision==0.26.0 pillow==13.0.0 numpy==2.3.5
python photographs.py FOLDER            measures
python photographs.py FOLDER --make     first makes 200 photographs of 2 to 4 megapixels there (pip install scikit-image==0.26.0)

Ours on the same folder: LORA_BENCH_PHOTOS=FOLDER cargo bench -p lora-benches --bench data -- photographs
"""

import pathlib
import sys
import time

import numpy as np
import torch
import torchvision.transforms.v2.functional as functional
from PIL import Image
from torchvision.io import ImageReadMode, decode_image, read_file

folder = pathlib.Path(sys.argv[1])


def make():
    """Crops of scikit-image's pictures at random places and sizes, with grain, at quality 88."""
    import skimage.data as data

    names = "astronaut coffee chelsea rocket hubble_deep_field retina immunohistochemistry camera brick grass gravel".split()
    sources = []
    for name in names:
        pixels = np.asarray(getattr(data, name)())
        pixels = np.stack([pixels] * 3, -1) if pixels.ndim == 2 else pixels[..., :3]
        sources.append(Image.fromarray(pixels))
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(200):
        source = sources[index % len(sources)]
        ratio, area = random.choice([4 / 3, 3 / 2, 16 / 9, 1, 3 / 4, 2 / 3]), random.uniform(2e6, 4e6)
        across = min(source.width, source.height * ratio) * random.uniform(0.7, 1)
        x, y = random.uniform(0, source.width - across), random.uniform(0, source.height - across / ratio)
        width = int((area * ratio) ** 0.5)
        height = int(width / ratio)
        part = source.resize((width, height), Image.LANCZOS, (x, y, x + across, y + across / ratio))
        pixels = np.asarray(part) + random.normal(0, 3, (height, width, 1))
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / f"{index:03}.jpg", quality=88)


def buckets(area=512 * 512, step=64, least=256, most=1024):
    found = {(512, 512)}
    for width in range(least, most + 1, step):
        height = min(most, area // width // step * step)
        if height >= least:
            found |= {(width, height), (height, width)}
    return sorted(found)


BUCKETS = buckets()


def plan(width, height):
    ratio = width / height
    across, down = min(BUCKETS, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))
    scale = down / height if ratio > across / down else across / width
    scaled = int(width * scale + 0.5), int(height * scale + 0.5)
    return across, down, *scaled, (scaled[0] - across) // 2, (scaled[1] - down) // 2


class Photographs(torch.utils.data.Dataset):
    def __init__(self, reader):
        self.files, self.reader = sorted(folder.glob("*.jpg")), reader

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        if self.reader == "torchvision":
            pixels = decode_image(read_file(str(self.files[index])), mode=ImageReadMode.RGB)
            across, down, width, height, left, top = plan(pixels.shape[2], pixels.shape[1])
            mode = functional.InterpolationMode.BILINEAR
            pixels = functional.resize(pixels, [height, width], interpolation=mode, antialias=True)
            pixels = pixels[:, top : top + down, left : left + across]
        else:
            picture = Image.open(self.files[index])
            across, down, width, height, left, top = plan(*picture.size)
            picture = picture.convert("RGB").resize((width, height), Image.LANCZOS)
            picture = picture.crop((left, top, left + across, top + down))
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return pixels.float() / 127.5 - 1


if "--make" in sys.argv:
    make()
torch.set_num_threads(1)
for reader in ["torchvision", "PIL"]:
    loader = torch.utils.data.DataLoader(Photographs(reader), batch_size=None, num_workers=2)
    for _ in range(3):
        start = time.time()
        count = sum(1 for _ in loader)
        print(f"{reader}: {count / (time.time() - start):.1f} images/s")
