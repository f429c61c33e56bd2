"""The work every side is given: the same token ids and the same labels, from UA-GEC's changed training sentences."""

from dataclasses import dataclass

import numpy as np

MODEL = "google/gemma-3-270m"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, LEARNING_RATE, BATCH = 8, 16, 5e-4, 8


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


def changed_pairs() -> list[tuple[str, str]]:
    """Returns (as written, as corrected) for each training sentence that its annotator changed, in corpus order."""
    from ua_gec import Corpus

    pairs = [
        (source, target)
        for document in Corpus("train", "gec-fluency")
        for source, target in zip(document.source_sentences, document.target_sentences)
        if source != target and 20 <= len(source) <= 250 and 20 <= len(target) <= 250
    ]
    return list(dict.fromkeys(pairs))


def work(tokenizer, num_documents: int = 64, seed: int = 0) -> Work:
    """Returns short instructions: the written sentence, then its correction, which alone is trained on."""
    pairs = changed_pairs()
    chosen = np.random.default_rng(seed).choice(len(pairs), num_documents, replace=False)
    documents = []
    for index in chosen:
        source, target = pairs[index]
        prompt = [tokenizer.bos_token_id, *tokenizer.encode(source + "\n", add_special_tokens=False)]
        answer = [*tokenizer.encode(target, add_special_tokens=False), tokenizer.eos_token_id]
        documents.append((prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return Work(documents)
