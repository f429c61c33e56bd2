"""FEATURE_EXTRACTION: a vector for a text, by pairs that belong together or pairs with a score of likeness.

Pairs: each first text is to be nearer to its own second than to every other of the step (in-batch negatives, Henderson
et al. 2017, arXiv 1705.00652; cosine times 20, as sentence-transformers has it). Scores: the squared error of the
cosine. Vectors are pooled as the model's own 1_Pooling/config.json says, else by the mean over the tokens.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from loratune.data.encode import Document
from loratune.data.examples import Example
from loratune.data.pack import length_groups
from loratune.data.rows import Row
from loratune.errors import ConfigError, DataError
from loratune.evaluate import metrics
from loratune.model.load import resolve
from loratune.tasks.labels import REGRESSION, Labels
from loratune.tasks.task import Scores, Task, TaskBatch, as_float, tokenized

SCALE = 20.0
POOLING = Path("1_Pooling", "config.json")
_MODES = ("cls_token", "lasttoken", "mean_tokens")


def find_scores(rows: Iterable[Row], data: str) -> Labels:
    """Finds whether the pairs have scores, all of them or none; raises DataError."""
    kinds: dict[bool, str] = {}
    for row in rows:
        kinds.setdefault("score" in row.value, row.where)
    if len(kinds) > 1:
        raise DataError(f"{kinds[False]}: this pair has no score, but {kinds[True]} has one; use one kind a file.")
    return Labels(problem=REGRESSION if True in kinds else None)


class Embed(Task):
    """Two rows of a batch for each pair. The negatives of a pair are those of its step, however memory is cut: pairs
    without scores always run as one micro-batch a step."""

    kinds = ("pair",)
    cuts_freely = False

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.pooling = pooling_of(self.model.name_or_path)
        self.scored = self.model.config.problem_type == REGRESSION

    def encode(self, row: Row) -> list[Example]:
        first, second = (
            list(self.fits(tokenized(self.tokenizer, row.value[key])["input_ids"]))
            for key in ("sentence1", "sentence2")
        )
        if self.scored and "score" not in row.value:
            raise DataError("the pair has no score, but the rows that are trained on have.")
        target = np.array([row.value["score"]] if self.scored else [], dtype=np.float32)
        return [Example.of([*first, *second], target, row, extra=len(first))]

    def rows(self, example: Example) -> list[dict[str, NDArray[np.int32]]]:
        return [{"input_ids": example.input_ids[: example.extra]}, {"input_ids": example.input_ids[example.extra :]}]

    def extent(self, example: Example) -> int:
        return max(example.extra, example.num_tokens - example.extra)

    def cut(self, documents: Sequence[Document], max_tokens: int) -> list[list[int]]:
        if self.scored:
            return length_groups([2 * self.extent(cast(Example, each)) for each in documents], max_tokens)
        size = max(2, self.batch_size)
        return [list(range(start, min(start + size, len(documents)))) for start in range(0, len(documents), size)]

    def vectors(self, outputs: Any, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Returns the first and the second texts' vectors, of length 1, (N, H) each."""
        pooled = _POOL[self.pooling](as_float(outputs.last_hidden_state), batch.inputs["attention_mask"])
        unit = F.normalize(pooled, dim=-1)
        return unit[::2], unit[1::2]

    def losses(self, outputs: Any, batch: TaskBatch) -> Tensor:
        first, second = self.vectors(outputs, batch)
        if self.scored:
            return ((first * second).sum(-1) - self.targets(batch)[:, 0]).square()
        return F.cross_entropy(
            SCALE * first @ second.T, torch.arange(len(first), device=first.device), reduction="none"
        )

    def own_labels(self, example: Example) -> None:
        return None

    def predict(self, outputs: Any, batch: TaskBatch) -> list[Any]:
        first, second = (each.double().cpu().numpy() for each in self.vectors(outputs, batch))
        return list(zip(first, second, strict=True))

    def score(self, examples: Sequence[Example], predictions: Sequence[Any]) -> Scores:
        first, second = (np.stack(side) for side in zip(*predictions, strict=True))
        if self.scored:
            pair = (first * second).sum(1), np.array([example.target[0] for example in examples], dtype=np.float64)
            return Scores(metrics.number_figures(*pair), metrics.moments(*pair), metrics.pearson)
        ranks = ranks_of(first, second, [example.row.value["sentence2"] for example in examples])
        figures = {"mrr": metrics.mean((1 / ranks).tolist())}
        figures |= {f"recall_at_{k}": metrics.mean((ranks <= k).tolist()) for k in (1, 5, 10)}
        return Scores(figures, metrics.shares((1 / ranks).tolist()), metrics.ratio)

    def record(self, example: Example, prediction: Any) -> dict[str, Any]:
        value = example.row.value
        return {
            "sentence1": value["sentence1"], "sentence2": value["sentence2"],
            "predicted": float(prediction[0] @ prediction[1]), "label": value.get("score"),
        }  # fmt: skip


def ranks_of(first: NDArray[Any], second: NDArray[Any], texts: Sequence[str]) -> NDArray[np.float64]:
    """Returns the rank of each first text's own second among all different ones, by cosine; 1 is the nearest."""
    _, chosen, own = np.unique(texts, return_index=True, return_inverse=True)
    likeness = first @ second[chosen].T
    return 1.0 + (likeness > likeness[np.arange(len(first)), own][:, None]).sum(1)


def pooling_of(name: str) -> str:
    """Returns how a model's vectors are made of its tokens'; raises ConfigError for a way that is not known here."""
    try:
        file = resolve(name).path / POOLING
    except ConfigError:  # a model that was made in memory
        return "mean_tokens"
    if not file.is_file():
        return "mean_tokens"
    modes = json.loads(file.read_text("utf-8"))
    chosen = [
        key.removeprefix("pooling_mode_") for key, on in modes.items() if key.startswith("pooling_mode_") and on is True
    ]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise ConfigError(
            f"{file} asks for pooling by {', '.join(chosen) or 'nothing'}; expected one of {', '.join(_MODES)}."
        )
    return chosen[0]


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def _last(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]


_POOL = {"mean_tokens": _mean, "cls_token": lambda states, _: states[:, 0], "lasttoken": _last}
