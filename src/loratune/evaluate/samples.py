"""Greedy samples on fixed prompts: what the model answers to the first held-out rows, beside what they ask for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loratune.data.encode import Document
from loratune.evaluate.generate import generate, text_of

NUM_SAMPLES = 3
_TEXT_PROMPT_TOKENS = 12


@dataclass(frozen=True)
class Sample:
    """One prompt, the model's greedy answer, and the row's own."""

    prompt: str
    answer: str
    reference: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sample(
    model: Any, tokenizer: Any, documents: Sequence[Document], num_samples: int = NUM_SAMPLES
) -> tuple[Sample, ...]:
    """Returns the model's greedy answers to the first documents' prompts, cut a little after the reference's length."""
    chosen = documents[:num_samples]
    cuts = [prompt_length(document) for document in chosen]
    prompts = [document.input_ids[:cut].tolist() for document, cut in zip(chosen, cuts, strict=True)]
    references = [document.input_ids[cut:].tolist() for document, cut in zip(chosen, cuts, strict=True)]
    longest = max(len(reference) for reference in references)
    answers = generate(model, tokenizer, prompts, min(128, longest + longest // 4 + 4, _room(model, prompts)))
    return tuple(
        Sample(text_of(tokenizer, prompt), text_of(tokenizer, answer), text_of(tokenizer, reference))
        for prompt, answer, reference in zip(prompts, answers, references, strict=True)
    )


def _room(model: Any, prompts: Sequence[Sequence[int]]) -> int:
    """Returns how many tokens fit behind the longest prompt; one at least: a document fits and has a label."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return 128 if positions is None else positions - max(map(len, prompts))


def prompt_length(document: Document) -> int:
    """Up to the first trained token; of a plain text, where everything is trained, its first tokens."""
    first = int(np.flatnonzero(document.trained)[0])
    return first if first > 1 else min(_TEXT_PROMPT_TOKENS, max(1, document.num_tokens // 2))
