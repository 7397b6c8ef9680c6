"""What transformers makes of conversations: renderings, tokens, their places and which of them answers are.

  make_chat.py FOLDER        crates/lora-data/tests/golden/chat

FOLDER has `cases.json` (conversations, variables of the template, the date) and a folder for each style of template: a tiny
tokenizer, a template in the shape of published ones, and `tagged.jinja`, the same template with `{% generation %}` around
answers, by which transformers itself says which tokens belong to them. Written is `expected.json` beside each.
"""

import datetime
import json
import pathlib
import sys

from transformers import PreTrainedTokenizerFast


def byte_offsets(text, spans):
    at = [0]
    for character in text:
        at.append(at[-1] + len(character.encode()))
    return [[at[start], at[end]] for start, end in spans]


def expected(tokenizer, tagged, today, case):
    given = dict(case["kwargs"], strftime_now=today.strftime)
    tools = given.pop("tools", None)

    def render(**more):
        return tokenizer.apply_chat_template(case["messages"], tools=tools, **given, **more)

    try:
        text = render(tokenize=False)
        whole = render(tokenize=True, chat_template=tagged, return_dict=True, return_assistant_tokens_mask=True)
    except Exception as error:
        return {"name": case["name"], "error": str(error)}
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoding.input_ids == list(whole["input_ids"]), case["name"]
    return {
        "name": case["name"],
        "text": text,
        "prompt": render(tokenize=False, add_generation_prompt=True),
        "ids": encoding.input_ids,
        "spans": byte_offsets(text, encoding.offset_mapping),
        "answers": "".join(map(str, whole["assistant_masks"])),
    }


def main(folder):
    folder = pathlib.Path(folder)
    given = json.loads((folder / "cases.json").read_text())
    today = datetime.datetime.fromisoformat(given["today"])
    for style in sorted(path.parent for path in folder.glob("*/tokenizer.json")):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(style)
        tagged = (style / "tagged.jinja").read_text()
        rows = [expected(tokenizer, tagged, today, case) for case in given["cases"]]
        lines = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
        (style / "expected.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
