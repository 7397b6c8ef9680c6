"""GGUF files with a tokenizer and nothing else, of the same tokenizers in the layout of Hugging Face.

  make_gguf_tokenizers.py FOLDER OUT      crates/lora-data/tests/golden/chat crates/lora-data/tests/golden/gguf

They are written by llama.cpp's own package (gguf 0.17.1); the numbers that they must give are those that transformers gives
with the folders (`make_chat.py`).
"""

import json
import pathlib
import sys

import gguf

# The name of each folder's rule of splitting; none where pieces are merged by their scores.
RULES = {"llama3": "llama-bpe", "qwen3": "qwen2", "chatml": "smollm", "mistral": None}


def write(folder, path, rule):
    whole = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {token["content"]: token for token in whole["added_tokens"]}
    ids = dict(whole["model"]["vocab"]) | {text: token["id"] for text, token in added.items()}
    # As published models have it, there are more rows than tokens.
    tokens = [f"[PAD{number}]" for number in range(max(ids.values()) + 8)]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for text, number in ids.items():
        kinds = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
        tokens[number] = text
        types[number] = kinds[not added[text]["special"]] if text in added else gguf.TokenType.NORMAL
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]
    writer = gguf.GGUFWriter(path, "llama")
    if rule is None:
        ranks = {pair.replace(" ", ""): -float(place) for place, pair in enumerate(merges)}
        scores = [ranks.get(text, -1e4 if kind == gguf.TokenType.NORMAL else 0.0) for text, kind in zip(tokens, types)]
        is_byte = [text.startswith("<0x") and len(text) == 6 for text in tokens]
        types = [gguf.TokenType.BYTE if own else kind for own, kind in zip(is_byte, types)]
        types[ids["<unk>"]] = gguf.TokenType.UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(scores)
        writer.add_unk_token_id(ids["<unk>"])
        writer.add_add_space_prefix(True)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rule)
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if "bos_token" in settings:
        writer.add_bos_token_id(ids[settings["bos_token"]])
    writer.add_eos_token_id(ids[settings["eos_token"]])
    writer.add_pad_token_id(ids[settings["pad_token"]])
    writer.add_add_bos_token(bool(settings.get("add_bos_token")))
    template = folder / "chat_template.jinja"
    writer.add_chat_template(template.read_text() if template.exists() else settings["chat_template"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(folder, out):
    out = pathlib.Path(out)
    out.mkdir(exist_ok=True)
    for name, rule in RULES.items():
        write(pathlib.Path(folder) / name, out / f"{name}.gguf", rule)


if __name__ == "__main__":
    main(*sys.argv[1:])
