"""Honest floors: the commonest class, and a linear probe of frozen features."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from loratune.data.examples import Example
from loratune.errors import ConfigError
from loratune.tasks.classify import Classify
from loratune.tasks.labels import MULTI, REGRESSION
from loratune.tasks.model import TaskModel
from loratune.tasks.tag import Tag

Floor = Callable[[TaskModel, Sequence[Example], Sequence[Example], int], list[Any]]
_ROUNDS = 200


def majority(runner: TaskModel, training: Sequence[Example], examples: Sequence[Example], max_tokens: int) -> list[Any]:
    """Says of every example what is commonest in the training rows: the class, each label, the mean, the tag."""
    task = runner.task
    if isinstance(task, Tag):
        counts = np.bincount(np.concatenate([each.target[each.extra] for each in training]))
        return [np.full(len(example.extra), counts.argmax()) for example in examples]
    if not isinstance(task, Classify):
        raise ConfigError("a majority is defined for classes and tags (SEQ_CLS, TOKEN_CLS) only.")
    return [_frequencies(task, training)] * len(examples)


def _frequencies(task: Classify, training: Sequence[Example]) -> NDArray[np.float64]:
    targets = np.stack([example.target for example in training])
    if task.labels.problem in (MULTI, REGRESSION):
        return targets.mean(0, dtype=np.float64)
    return np.bincount(targets[:, 0], minlength=len(task.labels.names)) / len(training)


def probe(runner: TaskModel, training: Sequence[Example], examples: Sequence[Example], max_tokens: int) -> list[Any]:
    """Says what a linear model on the mean of the frozen trunk's last states says, fitted to the training rows."""
    task = runner.task
    if not isinstance(task, Classify):
        raise ConfigError("a linear probe is defined for SEQ_CLS only.")
    known, unknown = (features(runner, rows, max_tokens) for rows in (training, examples))
    targets = torch.from_numpy(np.stack([example.target for example in training]))
    return list(fit_linear(known, targets, task.labels.problem or "", len(task.labels.names))(unknown).numpy())


@torch.no_grad()
def features(runner: TaskModel, examples: Sequence[Example], max_tokens: int) -> Tensor:
    """Returns the mean of the trunk's last hidden states of each example, float64 (D, H)."""
    trunk: Any = runner.model.base_model
    found: dict[int, Tensor] = {}
    for pack in runner.cut(examples, max_tokens):
        inputs = runner.batch([examples[i] for i in pack], pack).inputs
        states = trunk(**inputs).last_hidden_state.double().cpu()
        weights = inputs["attention_mask"].double().cpu()[..., None]
        found |= dict(zip(pack, (states * weights).sum(1) / weights.sum(1), strict=True))
    return torch.stack([found[position] for position in range(len(examples))])


def fit_linear(known: Tensor, targets: Tensor, problem: str, num_classes: int) -> Callable[[Tensor], Tensor]:
    """Returns what predicts from features, fitted with a penalty of |W|^2 / 2 to the sum of losses (C = 1).

    known (D, H); targets as `Classify` makes them. Softmax for one class, sigmoids for several, least squares for a
    number; the features are brought to mean 0 and deviation 1 first.
    """
    mean, spread = known.mean(0), known.std(0).clamp_min(1e-6)
    x = (known - mean) / spread
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        MULTI: lambda z: F.binary_cross_entropy_with_logits(z, targets.double(), reduction="sum"),
        REGRESSION: lambda z: 0.5 * (z - targets.double()).square().sum(),
    }
    loss_of = losses.get(problem, lambda z: F.cross_entropy(z, targets[:, 0], reduction="sum"))
    solver = torch.optim.LBFGS([weight, bias], max_iter=_ROUNDS, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = loss_of(x @ weight.T + bias) + 0.5 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)  # pyright: ignore[reportArgumentType]
    shaped: dict[str, Callable[[Tensor], Tensor]] = {MULTI: torch.sigmoid, REGRESSION: lambda z: z}
    shape = shaped.get(problem, lambda z: z.softmax(-1))
    return lambda rows: shape(((rows - mean) / spread) @ weight.detach().T + bias.detach())


FLOORS: dict[str, Floor] = {"majority": majority, "probe": probe}
