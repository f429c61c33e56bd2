"""Writes trl_packs.json: which documents TRL puts side by side with packing_strategy="bfd", by their lengths.

trl/bin/python tests/golden/templates/make_trl_packs.py        in the environment of make_trl_masks.py
"""

import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import pack_dataset


def golden(case: int) -> dict[str, Any]:
    draw = random.Random(case)
    max_tokens = draw.choice([16, 64, 250])
    lengths = [draw.randint(1, max_tokens) for _ in range(draw.randint(1, 60))]
    rows = Dataset.from_dict({"input_ids": [[index] * length for index, length in enumerate(lengths)]})
    packed = pack_dataset(rows, max_tokens, strategy="bfd")
    packs = [sorted(set(row)) for row in packed["input_ids"]]  # every token is the index of its document
    assert all(sorted(lengths[i] for i in p) == sorted(n) for p, n in zip(packs, packed["seq_lengths"]))
    return {"max_tokens": max_tokens, "lengths": lengths, "packs": packs}


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(golden(case)) for case in range(24))
    Path(__file__).with_name("trl_packs.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
