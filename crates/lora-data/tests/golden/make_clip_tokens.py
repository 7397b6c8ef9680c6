"""Makes clip_tokens.json: token ids of texts by transformers' two CLIP tokenizers.

The cleaned ids come from transformers 4.54.1's slow CLIPTokenizer with ftfy 6.3.1, the plain ones from transformers
5.17.0's. The two need environments of their own, so this script runs twice:

    pip install transformers==4.54.1 ftfy==6.3.1   (environment A)
    pip install transformers==5.17.0               (environment B)
    A/bin/python make_clip_tokens.py cleaned MERGES && B/bin/python make_clip_tokens.py plain MERGES

MERGES is ../../assets/clip_merges.txt.gz.
"""

import gzip
import json
import pathlib
import sys
import tempfile

TEXTS = [
    "", " ", "   \t\n  ", "a photo of a cat", "A Photo Of A Cat!", "don't stop, they'll've gone; I'm here, we'd say it's 'quoted'",
    "masterpiece, best quality, 1girl, solo, long hair, looking_at_viewer", "(a:1.2) [b] {c|d} <lora:x:0.8>", "1234567890 3.14 42nd",
    "café crème brûlée naïve Ångström", "Straße ẞ İstanbul ΣΑΣ Σίσυφος", "Привет, мир! Ёлка", "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก",
    "一只红色的苹果，放在桌子上。", "你好！这是什么？（测试）《书名》、“引号”‘单引’", "水彩畫風格：山水；雲霧", "赤いリンゴ、水彩画。「かわいい」", "ﾊﾝｶｸｶﾅ と ＦＵＬＬ ｗｉｄｔｈ　１２３", "한국어 텍스트, 빨간 사과",
    "😀", "👩‍👩‍👧‍👦 family", "🏳️‍🌈 flag 👍🏽", "❤️ ♥ ✨ ★", "a😀b", "emoji🍎apple",
    "“curly quotes” and ‘single’ ones", "it’s a dog’s life", "low „quote“ ‚x‘ ‹y› «z»", "ﬁne ﬂow ﬃ ﬀ", "ǆ ǉ ĳ Ĳ Ǳ ŉ", "full－width　space！？",
    "fish &amp; chips", "&lt;b&gt; &quot;x&quot; &#39;y&#39; &#x41; &eacute; &nbsp;z", "a < b &amp; c", "&notanentity; &amp", "100&percnt;",
    "itâ€™s broken", "cafÃ© au lait", "â€œquotedâ€\x9d text", "Ã¼ber schÃ¶n", "naÃ¯ve rÃ©sumÃ©", "l’humanitÃ©",
    "bell\x07 and null\x00 and esc\x1b[31mred\x1b[0m", "line\r\nbreak\rhere\u2028there\u2029end", "zero\u200bwidth\u200djoin\ufeffbom", "c1\x85control \x91x\x92", "soft\u00adhyphen", "tab\tand\x0bvt\x0cff",
    "e\u0301 combining a\u030a", "x² + y³ = ½", "™ © ® € £ ¥", "…—–-", "___---***", "http://example.com/path?a=b&c=d", "C:\\dir\\file.txt", "<|startoftext|>hello<|endoftext|> world", "<|endoftext|>",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ALL CAPS SHOUTING", "MiXeD CaSe", "'S 'T 'RE don'T",
    "٣٤٥ Ⅷ ㊗ ㍿ ①②③", "𝓯𝓪𝓷𝓬𝔂 𝐛𝐨𝐥𝐝", "𠮷野家", "\U0001f468\u200d\U0001f4bb coder", "Ｈｅｌｌｏ，ｗｏｒｌｄ", "word " * 300, "一只猫，" * 120,
]


def tokenizer(merges_file):
    from transformers import CLIPTokenizer

    lines = gzip.open(merges_file, "rt", encoding="utf-8").read().split("\n")[:48894]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet, extra = {b: chr(b) for b in printable}, 0
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(256 + extra)
            extra += 1
    symbols = list(alphabet.values())
    symbols += [symbol + "</w>" for symbol in symbols] + ["".join(line.split()) for line in lines]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}))
    return CLIPTokenizer.from_pretrained(str(folder))


def main():
    kind, merges_file = sys.argv[1:]
    path = pathlib.Path(__file__).parent / "clip_tokens.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    if [row["text"] for row in rows] != TEXTS:
        rows = [{"text": text} for text in TEXTS]
    tok = tokenizer(merges_file)
    for row in rows:
        row[kind] = tok(row["text"], add_special_tokens=False)["input_ids"]
    lines = ",\n".join(json.dumps(row, ensure_ascii=True, separators=(",", ":")) for row in rows)
    path.write_text("[\n" + lines + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
