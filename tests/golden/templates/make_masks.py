"""Writes masks.json: the documents of one conversation under every template, «...» marking the trained tokens.

    PYTHONPATH=src:tests/data python tests/golden/templates/make_masks.py

Read the difference before you keep it: this file says what each family learns.
"""

import json
from itertools import groupby
from pathlib import Path

from chat_families import FAMILIES, NO_SYSTEM
from toy_tokenizer import build
from transformers import PreTrainedTokenizerFast

from loratune.data.encode import Document, Encoder
from loratune.data.rows import Row

TURNS = [("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"), ("user", "Столиця?"), ("assistant", "Київ.")]


def marked(tokenizer: PreTrainedTokenizerFast, document: Document) -> str:
    pairs = zip(document.input_ids.tolist(), document.trained.tolist())
    runs = [(trained, tokenizer.decode([i for i, _ in run])) for trained, run in groupby(pairs, key=lambda p: p[1])]
    return "".join(f"«{text}»" if trained else text for trained, text in runs)


def documents(name: str) -> list[str]:
    tokenizer = build(FAMILIES[name])
    messages = [{"role": role, "content": content} for role, content in TURNS[name in NO_SYSTEM :]]
    row = Row("chat.jsonl", 1, "messages", {"messages": messages})
    return [marked(tokenizer, document) for document in Encoder(tokenizer, None).encode(row)]


if __name__ == "__main__":
    text = json.dumps({name: documents(name) for name in sorted(FAMILIES)}, ensure_ascii=False, indent=1)
    Path(__file__).with_name("masks.json").write_text(text + "\n", encoding="utf-8")
