#!/usr/bin/env python3
"""Small random bases of Chroma's and Anima's kind as diffusers folders, for `check_pipelines.py`.

    make_flow_bases.py FOLDER

The models are those of the golden files (`../golden/make_chroma.py`, `make_anima.py`).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))

import make_anima
import make_chroma
from diffusers import ChromaPipeline


def main():
    folder = Path(sys.argv[1])
    ChromaPipeline(**{name: part for name, part in make_chroma.pipeline().components.items() if part}).save_pretrained(folder / "chroma")
    anima = make_anima.pipeline()
    for name in ("tokenizer", "t5_tokenizer", "text_encoder", "text_conditioner", "transformer", "vae", "scheduler"):
        getattr(anima, name).save_pretrained(folder / "anima" / name)


if __name__ == "__main__":
    main()
