"""TOKEN_CLS: a tag for each word, such as names in text (B-PER, I-PER, O) or parts of speech.

The words are joined by spaces and a word's tokens are found by their characters, so any fast tokenizer serves. The tag
stands on a word's first token; the others make no loss, or, with `train_on: all`, the same one (I- of a B- tag).
"""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from loratune.data.examples import Example
from loratune.data.rows import Row
from loratune.errors import DataError
from loratune.evaluate import metrics, text
from loratune.tasks.classify import refuse_empty
from loratune.tasks.labels import name_of
from loratune.tasks.task import (
    IGNORED,
    Scores,
    Task,
    TaskBatch,
    as_float,
    columns_of,
    needs_backend,
    tokenized,
)  # fmt: skip


class Tag(Task):
    """Softmax over tags at each word. `extra` of an example is the position of each word's first token."""

    kinds = ("tagging",)

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        needs_backend(self.tokenizer, "TOKEN_CLS")
        self.types = text.types(self.labels.names)
        self.marked = any(name[:2] in ("B-", "I-", "E-", "S-") for name in self.labels.names)

    def encode(self, row: Row) -> list[Example]:
        words: list[str] = row.value["tokens"]
        encoding = tokenized(self.tokenizer, " ".join(words), return_offsets_mapping=True)
        ids = self.fits(encoding["input_ids"])
        of_token = _words_of(encoding, words)
        first = _first_tokens(of_token, words)
        tags = [self.labels.number(tag) for tag in row.value["tags"]]
        target = np.full(len(ids), IGNORED, dtype=np.int64)
        if self.train_on == "all":
            inside = [self._inside(tag) for tag in tags]
            target[of_token >= 0] = [inside[word] for word in of_token[of_token >= 0]]
        target[first] = tags
        num_units = int((target != IGNORED).sum())
        return [Example.of(ids, target, row, num_units=num_units, columns=columns_of(encoding), extra=first)]

    def _inside(self, tag: int) -> int:
        """The tag of a word's further tokens: a B- goes on as I-."""
        name = self.labels.names[tag]
        return self.labels.numbers.get(f"I-{name[2:]}", tag) if name.startswith("B-") else tag

    def check(self, training: Sequence[Any], sources: Sequence[str]) -> None:
        """Every tag needs an example to learn from."""
        seen = Counter[int]()
        for example in training:
            seen.update(example.target.tolist())
        refuse_empty(self.labels, seen, sources)

    def losses(self, outputs: Any, batch: TaskBatch) -> Tensor:
        asked = self.padded_targets(batch.examples, outputs.logits.shape[1])
        chosen = asked != IGNORED
        return F.cross_entropy(as_float(outputs.logits[chosen]), asked[chosen], reduction="none")

    def own_labels(self, example: Example) -> dict[str, Tensor]:
        return {"labels": self.tensor(example.target)[None]}

    def predict(self, outputs: Any, batch: TaskBatch) -> list[Any]:
        best = outputs.logits.argmax(-1).cpu().numpy()
        return [row[example.extra] for row, example in zip(best, batch.examples, strict=True)]

    def score(self, examples: Sequence[Example], predictions: Sequence[Any]) -> Scores:
        asked = [example.target[example.extra] for example in examples]
        right = np.array([[(a == b).sum(), len(b)] for a, b in zip(predictions, asked, strict=True)], np.float64)
        accuracy = {"token_accuracy": metrics.additive(right, metrics.ratio)}
        if not self.marked:
            counts, names = self._tag_counts(predictions, asked), self.labels.names
            figures = accuracy | {"macro_f1": metrics.additive(counts, metrics.macro_f1)}
            return Scores(figures, right, metrics.ratio, {"types": metrics.class_table(counts, names)})
        counts = text.span_counts(self._names(predictions), self._names(asked), self.types)
        figures = {
            "span_f1": metrics.additive(counts, metrics.micro_f1),
            "precision": metrics.additive(counts, metrics.micro_precision),
            "recall": metrics.additive(counts, metrics.micro_recall),
            **accuracy,
        }
        return Scores(figures, counts, metrics.micro_f1, {"types": metrics.class_table(counts, self.types)})

    def _names(self, tags: Sequence[Any]) -> list[list[str]]:
        return [[self.labels.names[tag] for tag in each] for each in tags]

    def _tag_counts(self, said: Sequence[Any], asked: Sequence[Any]) -> metrics.Counts:
        number = len(self.labels.names)
        return np.stack([
            metrics.class_counts(metrics.one_hot(a, number), metrics.one_hot(b, number)).sum(0)
            for a, b in zip(said, asked, strict=True)
        ])  # fmt: skip

    def record(self, example: Example, prediction: Any) -> dict[str, Any]:
        return {
            "tokens": example.row.value["tokens"],
            "predicted": [self.labels.names[tag] for tag in prediction],
            "label": [name_of(tag) for tag in example.row.value["tags"]],
        }


def _words_of(encoding: Any, words: Sequence[str]) -> Any:
    """Returns the word that each token begins in, (L,), -1 for special tokens; a token may hold the space before it."""
    ends = np.array(list(accumulate(len(word) + 1 for word in words)))  # behind each word's space
    starts = np.array([start for start, _ in encoding["offset_mapping"]])
    joined = " ".join(words)
    starts += [joined[start:end].startswith(" ") and end > start for start, end in encoding["offset_mapping"]]
    own = np.array([each is not None for each in encoding.sequence_ids(0)])
    return np.where(own, np.searchsorted(ends, starts, side="right"), -1)


def _first_tokens(of_token: Any, words: Sequence[str]) -> Any:
    found, first = np.unique(of_token, return_index=True)
    first = first[found >= 0]
    if len(first) != len(words):
        number = next(n for n in range(len(words)) if n not in found)
        raise DataError(f"the tokenizer makes no token of word {number + 1}, {words[number][:40]!r}; remove it.")
    return first
