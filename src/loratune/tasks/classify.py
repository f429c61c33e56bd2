"""SEQ_CLS: one label of a text or of two, any number of labels, or a number."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loratune.data.examples import Example
from loratune.data.rows import Row
from loratune.data.values import as_number
from loratune.errors import DataError
from loratune.evaluate import metrics
from loratune.tasks.labels import MULTI, REGRESSION, Labels, label_of
from loratune.tasks.task import Scores, Task, TaskBatch, as_float, columns_of, tokenized

_MAX_CONFUSION = 30  # classes; a larger table is not read


class Classify(Task):
    """Softmax over classes, a sigmoid for each of several labels, or the squared error of a number.

    A document with several labels makes as many losses as there are classes, so that a step's loss is the mean over all
    decisions, as transformers has it. Rows: classification, or pairs with a label or a score.
    """

    kinds = ("classification", "pair")

    def encode(self, row: Row) -> list[Example]:
        texts = [row.value[key] for key in ("text", "text_pair", "sentence1", "sentence2") if key in row.value]
        encoding = tokenized(self.tokenizer, *texts)
        target = _TARGETS.get(self.labels.problem or "", _one)(self.labels, label_of(row))
        num_units = len(target) if self.labels.problem == MULTI else 1
        ids = self.fits(encoding["input_ids"])
        return [Example.of(ids, target, row, num_units=num_units, columns=columns_of(encoding))]

    def check(self, training: Sequence[Any], sources: Sequence[str]) -> None:
        """Every class needs an example to learn from."""
        if self.labels.problem == REGRESSION:
            return
        seen = Counter[int]()
        for example in training:
            seen.update(_numbers(example.target, self.labels))
        refuse_empty(self.labels, seen, sources)

    def losses(self, outputs: Any, batch: TaskBatch) -> Tensor:
        logits = as_float(outputs.logits)
        asked = self.targets(batch)
        if self.labels.problem == REGRESSION:
            return F.mse_loss(logits[:, 0], asked[:, 0].to(logits.dtype), reduction="none")
        if self.labels.problem == MULTI:
            return F.binary_cross_entropy_with_logits(logits, asked.to(logits.dtype), reduction="none").flatten()
        return F.cross_entropy(logits, asked[:, 0], reduction="none")

    def own_labels(self, example: Example) -> dict[str, Tensor]:
        target = self.tensor(example.target)
        return {"labels": target[None] if self.labels.problem == MULTI else target}

    def predict(self, outputs: Any, batch: TaskBatch) -> list[Any]:
        logits = as_float(outputs.logits)
        shaped = {REGRESSION: lambda x: x, MULTI: torch.sigmoid}.get(
            self.labels.problem or "", lambda x: x.softmax(-1)
        )(logits)
        return list(shaped.double().cpu().numpy())

    def score(self, examples: Sequence[Example], predictions: Sequence[Any]) -> Scores:
        said, asked = np.stack(predictions), np.stack([example.target for example in examples])
        if self.labels.problem == REGRESSION:
            pair = said[:, 0], asked[:, 0].astype(np.float64)
            return Scores(metrics.number_figures(*pair), metrics.moments(*pair), metrics.pearson)
        if self.labels.problem == MULTI:
            return self._score_several(said > 0.5, asked > 0.5)
        predicted, true, number = said.argmax(1), asked[:, 0], len(self.labels.names)
        counts = metrics.class_counts(metrics.one_hot(predicted, number), metrics.one_hot(true, number))
        tables = {"classes": metrics.class_table(counts, self.labels.names)}
        if number <= _MAX_CONFUSION:
            table = metrics.confusion(predicted, true, number).tolist()
            names = self.labels.names
            tables["confusion"] = [
                {"true": name, **dict(zip(names, row, strict=True))} for name, row in zip(names, table, strict=True)
            ]
        right = metrics.shares((predicted == true).tolist())
        return Scores(metrics.class_figures(predicted, true, number), right, metrics.ratio, tables)

    def _score_several(self, predicted: Any, true: Any) -> Scores:
        counts = metrics.class_counts(predicted, true)
        figures = {
            "micro_f1": metrics.additive(counts, metrics.micro_f1),
            "macro_f1": metrics.additive(counts, metrics.macro_f1),
            "exact_match": metrics.mean((predicted == true).all(1).tolist()),
        }
        tables = {"classes": metrics.class_table(counts, self.labels.names)}
        return Scores(figures, counts, metrics.micro_f1, tables)

    def record(self, example: Example, prediction: Any) -> dict[str, Any]:
        right, names = label_of(example.row), self.labels.names
        if self.labels.problem == REGRESSION:
            return {**_read(example.row), "predicted": float(prediction[0]), "label": right}
        if self.labels.problem == MULTI:
            said: Any = [names[k] for k in np.flatnonzero(prediction > 0.5)]
            return {**_read(example.row), "predicted": said, "label": right}
        best = int(prediction.argmax())
        return {
            **_read(example.row), "predicted": names[best], "probability": float(prediction[best]), "label": right,
        }  # fmt: skip


def refuse_empty(labels: Labels, seen: Counter[int], sources: Sequence[str]) -> None:
    """Raises DataError for a class that no training example has."""
    empty = [name for number, name in enumerate(labels.names) if not seen[number]]
    if empty:
        raise DataError(
            f"{sources[0]} and the {len(sources):,} training rows with it hold no example of the class {empty[0]!r} "
            f"({len(empty)} of {len(labels.names)} classes; rows held out for evaluation are not trained on). Add rows "
            "of it, give a validation file, or remove the class."
        )


def _read(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.value.items() if key not in ("label", "score")}


def _numbers(target: Any, labels: Labels) -> list[int]:
    return np.flatnonzero(target).tolist() if labels.problem == MULTI else target.tolist()


def _one(labels: Labels, value: Any) -> Any:
    if value is None or isinstance(value, list):
        raise DataError(f"the label is {'missing' if value is None else 'a list'}; expected one class.")
    return np.array([labels.number(value)], dtype=np.int64)


def _several(labels: Labels, value: Any) -> Any:
    if not isinstance(value, list):
        raise DataError("the label is no list; expected the list of the classes that apply, which may be empty.")
    target = np.zeros(len(labels.names), dtype=np.float32)
    target[[labels.number(each) for each in value]] = 1
    return target


def _amount(labels: Labels, value: Any) -> Any:
    return np.array([as_number(value, "the label")], dtype=np.float32)


_TARGETS = {MULTI: _several, REGRESSION: _amount}
