"""Writes trl_masks.json: what TRL's SFTTrainer trains with assistant_only_loss=True, on the templates it supports.

    python -m venv trl && trl/bin/pip install trl==1.16.0 torch==2.13.0 transformers==5.23.0
    PYTHONPATH=tests/data trl/bin/python tests/golden/templates/make_trl_masks.py

TRL swaps a template for its own variant with `{% generation %}` tags, then asks the tokenizer for the assistant's mask.
«...» marks the trained tokens.
"""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from chat_families import FAMILIES, NO_SYSTEM, REFUSED
from toy_tokenizer import build
from trl.chat_template_utils import get_training_chat_template

SYSTEM = {"role": "system", "content": "Be brief."}
ASK, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
THEN = [
    {"role": "user", "content": "Яка столиця України?"},
    {"role": "assistant", "content": "Київ, the answer\n\nis a"},
]
CONVERSATIONS = [[ASK, ANSWER], [SYSTEM, ASK, ANSWER], [ASK, ANSWER, *THEN], [SYSTEM, ASK, ANSWER, *THEN, ASK]]
DATE = "2024-07-26"


def marked(tokenizer: Any, ids: list[int], mask: list[int]) -> str:
    runs = [(trained, [i for i, _ in run]) for trained, run in groupby(zip(ids, mask), key=lambda pair: pair[1])]
    return "".join(f"«{tokenizer.decode(run)}»" if trained else tokenizer.decode(run) for trained, run in runs)


def golden(name: str) -> list[dict[str, Any]]:
    tokenizer = build((FAMILIES | REFUSED)[name])
    tokenizer.chat_template = get_training_chat_template(tokenizer) or tokenizer.chat_template
    if "strftime_now" in tokenizer.chat_template:
        tokenizer.chat_template = tokenizer.chat_template.replace('strftime_now("%Y-%m-%d")', f"'{DATE}'")
    entries = []
    for messages in CONVERSATIONS:
        if name not in NO_SYSTEM or messages[0] != SYSTEM:
            output = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            text = marked(tokenizer, output["input_ids"], output["assistant_masks"])
            entries.append({"messages": messages, "marked": text})
    return entries


if __name__ == "__main__":
    result = {}
    for name in sorted(FAMILIES | REFUSED):
        try:
            result[name] = golden(name)
        except ValueError as error:
            print(f"{name}: {error}")
    target = Path(__file__).with_name("trl_masks.json")
    target.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
