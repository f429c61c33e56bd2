"""The work every side is given: the same model, the same token ids and the same labels.

Models: Gemma 3 270M as it is, or random weights of Llama 3.2 1B's shape. Data, from UA-GEC's changed sentences:
short (a sentence, then its correction), long (five sentences before the one that is corrected), prefix40 and prefix70
(instructions of that share of all tokens before each), full (every token trained, all of one length).

    python bench/work.py FILE      writes the rows of Llama's shape, for peers that have an environment of their own
"""

import json
import sys
from dataclasses import dataclass

import numpy as np
import torch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, LEARNING_RATE, BATCH = 8, 16, 5e-4, 8
MODELS = {"gemma": "google/gemma-3-270m", "llama": "random weights of Llama 3.2 1B's shape"}


@dataclass(frozen=True)
class Work:
    """Documents as (input_ids, trained), in the order in which the steps take them."""

    documents: list[tuple[list[int], list[bool]]]

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.documents)

    @property
    def num_labels(self) -> int:
        return sum(sum(trained) for _, trained in self.documents)


def load(name: str):
    """Returns (model, Gemma's tokenizer): ids are taken modulo Llama's vocabulary, whose weights know no text."""
    import loratune

    if name == "gemma":
        return loratune.load_model(MODELS["gemma"])
    from transformers import LlamaConfig, LlamaForCausalLM

    from loratune.model.load import load_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), load_tokenizer(MODELS["gemma"])


def changed_pairs(longest: int) -> list[tuple[str, str]]:
    """Returns (as written, as corrected) for each training sentence that its annotator changed, in corpus order."""
    from ua_gec import Corpus

    pairs = [
        (source, target)
        for document in Corpus("train", "gec-fluency")
        for source, target in zip(document.source_sentences, document.target_sentences)
        if source != target and 20 <= len(source) <= longest and 20 <= len(target) <= longest
    ]
    return list(dict.fromkeys(pairs))


def work(tokenizer, shape: str, num_documents: int, vocabulary: int, seed: int = 0) -> Work:
    """Returns documents of a shape; `tiny` is short sentences, for runs of many steps."""
    pairs = changed_pairs(60 if shape == "tiny" else 250)
    chosen = np.random.default_rng(seed).choice(len(pairs), num_documents * 6, replace=False).tolist()
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    prefix = [tokenizer.bos_token_id]
    if shape.startswith("prefix"):
        share, mean = int(shape.removeprefix("prefix")) / 100, 62  # tokens of a document without instructions
        text = encode("\n".join(pairs[index][1] for index in chosen[-60:]))
        prefix += text[: round(mean * share / (1 - share))]
    documents = []
    for number in range(num_documents):
        source, target = pairs[chosen[number]]
        if shape == "long":
            source = "\n".join([*(pairs[chosen[num_documents + 5 * number + k]][0] for k in range(5)), source])
        prompt, answer = prefix + encode(source + "\n"), [*encode(target), tokenizer.eos_token_id]
        ids = [each % vocabulary for each in prompt + answer]
        trained = [False] * len(prompt) + [True] * len(answer)
        if shape == "full":
            ids, trained = (ids * 3)[:64], [False] + [True] * 63
        documents.append((ids, trained))
    return Work(documents)


if __name__ == "__main__":
    from pathlib import Path

    from loratune.model.load import load_tokenizer

    rows = work(load_tokenizer(MODELS["gemma"]), "short", 16, 128256)
    Path(sys.argv[1]).write_text(json.dumps(rows.documents))
