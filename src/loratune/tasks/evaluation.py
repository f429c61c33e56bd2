"""The held-out loss and figures of a task, from one pass over its examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from loratune.data.encode import Document
from loratune.data.examples import Example
from loratune.evaluate.interval import Interval
from loratune.evaluate.loss import Evaluation, evaluation_of
from loratune.evaluate.metrics import defined
from loratune.evaluate.samples import NUM_SAMPLES, Sample
from loratune.tasks.model import TaskModel
from loratune.tasks.task import Scores


@dataclass(frozen=True)
class TaskEvaluation(Evaluation):
    """The loss, and beside it the task's figures and tables; predictions: what was said of each example."""

    scores: Scores
    predictions: tuple[Any, ...]

    def to_json(self) -> dict[str, Any]:
        figures = {name: _told(each) for name, each in self.scores.figures.items()}
        loss = {name: getattr(self, name) for name in ("loss", "low", "high", "num_rows")}
        return loss | {"num_label_tokens": self.num_labels, "figures": figures, "tables": self.scores.tables}


def _told(figure: Interval) -> dict[str, float | None]:
    return {name: defined(value) for name, value in figure._asdict().items()}


@torch.no_grad()
def evaluate_task(runner: TaskModel, documents: Sequence[Document], max_tokens: int) -> TaskEvaluation:
    """Returns the loss and the figures of the model as it stands on examples; raises as `evaluate`."""
    sums = torch.zeros(len(documents), dtype=torch.float64)
    predictions: list[Any] = [None] * len(documents)
    for pack in runner.cut(documents, max_tokens):
        batch = runner.batch([documents[i] for i in pack], pack)
        losses, said = runner.results(batch)
        sums.index_add_(0, torch.tensor(pack)[batch.owners.cpu()], losses.double().cpu())
        for position, each in zip(pack, said, strict=True):
            predictions[position] = each
    examples = cast(Sequence[Example], list(documents))
    plain = evaluation_of(sums, [document.num_labels for document in documents])
    return TaskEvaluation(
        **vars(plain), scores=runner.task.score(examples, predictions), predictions=tuple(predictions)
    )


@torch.no_grad()
def task_samples(
    runner: TaskModel, documents: Sequence[Document], num_samples: int = NUM_SAMPLES
) -> tuple[Sample, ...]:
    """Returns what the model says of the first examples, beside what is right."""
    batch = runner.batch(list(documents[:num_samples]), range(min(num_samples, len(documents))))
    _, said = runner.results(batch)
    return runner.task.samples(batch.examples, said)
