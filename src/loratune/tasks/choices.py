"""Classification by a model that continues text: each label's name as the completion, judged by its likelihood."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loratune.data.encode import Document, Encoder
from loratune.data.rows import Row
from loratune.errors import DataError
from loratune.model.causal import CausalModel
from loratune.tasks.labels import SINGLE, Labels


@torch.no_grad()
def likeliest(
    model: Any, encoder: Encoder, rows: Sequence[Row], labels: Labels, max_tokens: int
) -> list[NDArray[np.float64]]:
    """Returns for each row the probability of each label (C,), a softmax over the log-likelihoods of their names.

    The prompt is the row's text, the completion " NAME" and the end token, as a row of prompt and completion would be
    trained. Raises DataError for rows that have no single label.
    """
    if labels.problem != SINGLE:
        raise DataError("choices are made between labels: rows of one label each are expected.")
    documents = [each for row in rows for name in labels.names for each in encoder.encode(_asked(row, name))]
    sums = _log_likelihoods(model, documents, max_tokens).view(len(rows), len(labels.names))
    return list(sums.softmax(-1).numpy())


def _asked(row: Row, name: str) -> Row:
    text = "\n".join(row.value[key] for key in ("text", "text_pair") if key in row.value)
    return replace(row, kind="prompt_completion", value={"prompt": text, "completion": f" {name}"})


def _log_likelihoods(model: Any, documents: Sequence[Document], max_tokens: int) -> torch.Tensor:
    sums = torch.zeros(len(documents), dtype=torch.float64)
    runner = CausalModel(model)
    try:
        for pack in runner.cut(documents, max_tokens):
            batch = runner.batch([documents[i] for i in pack], pack)
            _, losses = runner.losses(batch)
            sums.index_add_(0, torch.tensor(pack)[batch.owners.cpu()], losses.double().cpu())
    finally:
        runner.close()
    return -sums
