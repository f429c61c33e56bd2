"""Held-out loss and perplexity with a 95% interval over documents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loratune.data.encode import Document
from loratune.evaluate.interval import Interval, bootstrap_ratio
from loratune.evaluate.protocol import Runner


@dataclass(frozen=True)
class Evaluation:
    """Mean loss per label token, in nats, with its 95% interval; what each document added, for paired tests."""

    loss: float
    low: float
    high: float
    num_rows: int
    num_labels: int
    document_losses: tuple[float, ...]
    document_labels: tuple[int, ...]

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def to_json(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "low": self.low,
            "high": self.high,
            "perplexity": self.perplexity,
            "num_rows": self.num_rows,
            "num_label_tokens": self.num_labels,
        }


@torch.no_grad()
def evaluate(causal: Runner, documents: Sequence[Document], max_tokens: int) -> Evaluation:
    """Returns the loss of the model as it stands on documents: the sum of label losses over the number of labels.

    All three figures are NaN where a document's loss is not finite. Raises DataError for fewer than two documents: an
    interval needs them.
    """
    sums = torch.zeros(len(documents), dtype=torch.float64)
    for pack in causal.cut(documents, max_tokens):
        batch = causal.batch([documents[i] for i in pack], pack)
        _, losses = causal.losses(batch)
        sums.index_add_(0, torch.tensor(pack)[batch.owners.cpu()], losses.double().cpu())
    return evaluation_of(sums, [document.num_labels for document in documents])


def evaluation_of(sums: Tensor, labels: Sequence[int]) -> Evaluation:
    """Returns the evaluation of documents from the sum of each one's losses (D,) and how many they are."""
    losses = sums.tolist()
    finite = bool(sums.isfinite().all())
    interval = bootstrap_ratio(losses, labels) if finite else Interval(math.nan, math.nan, math.nan)
    return Evaluation(
        interval.value, interval.low, interval.high, len(labels), sum(labels), tuple(losses), tuple(labels)
    )
