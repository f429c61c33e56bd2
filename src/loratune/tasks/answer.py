"""QUESTION_ANS: the words of a context that answer a question; long contexts in windows that overlap.

A window that does not hold the whole answer asks for position 0, "not here". Padding is left out of the softmax, so
that a loss does not depend on the rows beside it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loratune.data.encode import LongRow
from loratune.data.examples import Example
from loratune.data.rows import Row
from loratune.evaluate import metrics
from loratune.evaluate.text import answer_scores
from loratune.tasks.task import Scores, Task, TaskBatch, as_float, columns_of, needs_backend

WINDOW, MAX_ANSWER_TOKENS, _BEST = 384, 30, 20  # as in SQuAD's usual recipe (Devlin et al. 2019)


class Answer(Task):
    """Two softmaxes over positions, where the answer begins and where it ends; the loss is their mean.

    `extra` of an example: the characters of the context that each token is of, (L, 2), -1 where it is of none.
    """

    kinds = ("question",)

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        needs_backend(self.tokenizer, "QUESTION_ANS")
        self.window = min(WINDOW, self.max_tokens or WINDOW)

    def encode(self, row: Row) -> list[Example]:
        question, context = row.value["question"], row.value["context"]
        around = len(self.tokenizer(question, "a", verbose=False)["input_ids"])  # with one token of a context
        stride = self.window // 3
        if around + stride >= self.window:
            raise LongRow(f"the question takes {around} tokens of a window of {self.window}; shorten it.")
        encoding = self.tokenizer(
            question, context, truncation="only_second", max_length=self.window, stride=stride, verbose=False,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        return [self._window(row, encoding, number) for number in range(len(encoding["input_ids"]))]

    def _window(self, row: Row, encoding: Any, number: int) -> Example:
        of_context = np.array([each == 1 for each in encoding.sequence_ids(number)])
        spans = np.where(of_context[:, None], np.array(encoding["offset_mapping"][number]), -1)
        answers = row.value["answers"]
        target = np.zeros(2, dtype=np.int64)
        if answers["text"]:
            start = answers["answer_start"][0]
            end = start + len(answers["text"][0])
            inside = np.flatnonzero((spans[:, 0] < end) & (spans[:, 1] > start) & of_context)
            if len(inside) and spans[inside[0], 0] <= start and spans[inside[-1], 1] >= end:
                target[:] = inside[0], inside[-1]
        columns: dict[str, Any] = {name: each[number] for name, each in columns_of(encoding).items()}
        return Example.of(encoding["input_ids"][number], target, row, columns=columns, extra=spans)

    def losses(self, outputs: Any, batch: TaskBatch) -> Tensor:
        asked = self.targets(batch)
        padding = batch.inputs["attention_mask"] == 0
        begins, ends = (
            F.cross_entropy(as_float(logits).masked_fill(padding, -torch.inf), asked[:, side], reduction="none")
            for side, logits in enumerate((outputs.start_logits, outputs.end_logits))
        )
        return (begins + ends) / 2

    def own_labels(self, example: Example) -> dict[str, Tensor]:
        start, end = self.tensor(example.target)
        return {"start_positions": start[None], "end_positions": end[None]}

    def predict(self, outputs: Any, batch: TaskBatch) -> list[Any]:
        """Returns for each window (score of its best span, score of "not here", first character, behind the last)."""
        begins, ends = (as_float(each).cpu().numpy() for each in (outputs.start_logits, outputs.end_logits))
        return [
            _best_span(begin[: len(example.extra)], end[: len(example.extra)], example.extra)
            for begin, end, example in zip(begins, ends, batch.examples, strict=True)
        ]

    def _answers(self, examples: Sequence[Example], predictions: Sequence[Any]) -> list[tuple[Row, str]]:
        """Returns each question's row and its answer: the best of its windows, or "" where "not here" scores higher.

        That is asked only where some question of the data has no answer.
        """
        by_row: dict[int, list[Any]] = {}
        rows = {id(example.row): example.row for example in examples}
        for example, prediction in zip(examples, predictions, strict=True):
            by_row.setdefault(id(example.row), []).append(prediction)
        may_lack = any(not row.value["answers"]["text"] for row in rows.values())
        found: list[tuple[Row, str]] = []
        for key, windows in by_row.items():
            score, _, start, end = max(windows, key=lambda each: each[0])
            lacks = may_lack and min(each[1] for each in windows) > score
            found.append((rows[key], "" if lacks else rows[key].value["context"][start:end]))
        return found

    def score(self, examples: Sequence[Example], predictions: Sequence[Any]) -> Scores:
        scores = [
            answer_scores(said, row.value["answers"]["text"]) for row, said in self._answers(examples, predictions)
        ]
        exact, f1 = zip(*scores, strict=True)
        figures = {"token_f1": metrics.mean(f1), "exact_match": metrics.mean(exact)}
        return Scores(figures, metrics.shares(f1), metrics.ratio)

    def record(self, example: Example, prediction: Any) -> dict[str, Any]:
        [(row, said)] = self._answers([example], [prediction])
        return self._told(row, said)

    def records(self, examples: Sequence[Example], predictions: Sequence[Any]) -> list[dict[str, Any]]:
        return [{"where": row.where, **self._told(row, said)} for row, said in self._answers(examples, predictions)]

    def _told(self, row: Row, said: str) -> dict[str, Any]:
        value = row.value
        return {
            "question": value["question"], "context": value["context"], "predicted": said,
            "label": value["answers"]["text"],
        }  # fmt: skip


def _best_span(begin: Any, end: Any, spans: Any) -> tuple[float, float, int, int]:
    null = float(begin[0] + end[0])
    best = (-np.inf, null, 0, 0)
    usable = spans[:, 1] > spans[:, 0]
    starts, stops = (np.argsort(-np.where(usable, each, -np.inf), kind="stable")[:_BEST] for each in (begin, end))
    for i in starts:
        for j in stops:
            if usable[i] and usable[j] and i <= j < i + MAX_ANSWER_TOKENS and begin[i] + end[j] > best[0]:
                best = (float(begin[i] + end[j]), null, int(spans[i, 0]), int(spans[j, 1]))
    return best
