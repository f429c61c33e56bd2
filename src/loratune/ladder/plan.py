"""What a ladder settles before its first step: its rungs, how long it stays on each, and which rows decide."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import nn

from loratune.adapter.config import LoraConfig
from loratune.adapter.grow import check_growth
from loratune.data.dataset import Dataset
from loratune.errors import ConfigError, DataError
from loratune.train.rungs import rung_settings

MIN_ROWS = 20  # on either side: an interval over fewer is too wide to decide anything
MIN_TRIAL = 4  # steps
OVERHEAD = 0.3  # of the steps of one run, at most, for what is not on the final path
STEPS_BETWEEN = 2  # looks are that many trials apart, so that a climb can be confirmed after one more
EVALUATIONS = 0.1  # of the steps of one run, at most, for evaluations, where fewer rows will do
EVALUATION_COST = 0.5  # of training on as many tokens: 0.48 measured on Gemma 3 270M (bench/results/evaluate.md)


@dataclass(frozen=True)
class Rung:
    """One rung: its name and the adapter's settings on it."""

    name: str
    config: LoraConfig


@dataclass(frozen=True)
class Lengths:
    """In steps: from beginning a rung to looking further, of a trial's arm, and of the warm-up of what a climb adds."""

    rung: int
    trial: int
    warmup: int


def rungs_of(model: nn.Module, first: LoraConfig, names: Sequence[str]) -> tuple[Rung, ...]:
    """Returns the rungs, the first being what is attached; raises ConfigError where one is not a growth of the last.

    The model is one without active adapters.
    """
    if len(set(names)) < len(names):
        raise ConfigError(f"rungs: {', '.join(names)}: one is named twice. Leave it out.")
    rest = [Rung(name, first.with_(**rung_settings(name))) for name in names[1:]]
    rungs = (Rung(names[0], first), *rest)
    for lower, upper in pairwise(rungs):
        try:
            check_growth(model, lower.config, upper.config)
        except ConfigError as error:
            raise ConfigError(f"rungs: {lower.name} to {upper.name}: {error}") from error
    return rungs


def lengths(num_steps: int, num_rungs: int, evaluation: float, warmup: int) -> Lengths:
    """Returns how long a ladder of K rungs stays where, so that it costs at most 1.3 times as many steps as one run.

    `evaluation` is the cost, in steps, of evaluating the rows that decide (or the as many that test); `warmup` the
    run's, which that of a climb does not exceed. Off the final path are at most K arms of trials, counting a step back
    as one: it loses the steps of one trial. A step of a lower rung counts as much as one of the top rung. Raises
    ConfigError for too few steps.
    """
    evaluations = num_evaluations(num_rungs) * evaluation
    room = (OVERHEAD * num_steps - evaluations) / num_rungs
    trial = min(num_steps // (4 * num_rungs), math.floor(room + 1e-9))
    if trial < MIN_TRIAL:
        needed = max(4 * num_rungs * MIN_TRIAL, math.ceil((num_rungs * MIN_TRIAL + evaluations) / OVERHEAD))
        raise ConfigError(
            f"{num_steps} steps are too few for a ladder of {num_rungs} rungs: on these rows it takes {needed}. Train "
            "longer (--epochs), or give fewer --rungs."
        )
    # Over before the trial is: no later state, gone back to or taken up again, is in the middle of it.
    return Lengths(STEPS_BETWEEN * trial, trial, min(warmup, trial // 2))


def num_evaluations(num_rungs: int) -> int:
    """Returns how many evaluations of half the held-out rows a ladder of K rungs does at most beyond a single run's
    four (all the rows, before and after): two arms and a confirmation for each climb, the state gone back to, the tests
    of base, first rung and result."""
    return 3 * num_rungs - 1


def row_cost(rows: Dataset, train: Dataset, batch_size: int) -> float:
    """Returns what evaluating one row costs, in optimizer steps."""
    return EVALUATION_COST * (rows.num_tokens / len(rows)) / (batch_size * train.num_tokens / len(train))


def most_rows(num_steps: int, num_rungs: int, cost: float) -> int:
    """Returns how many rows may decide, and as many test, so that most of what a ladder costs is left to its trials."""
    return max(MIN_ROWS, math.floor(EVALUATIONS * num_steps / (num_evaluations(num_rungs) * cost)))


def split_held_out(held_out: Dataset, most: int) -> tuple[Dataset, Dataset]:
    """Returns (validation, test): held-out rows that decide, and others that no decision sees, `most` each.

    Which they are depends on the hash of their content: the half of the lower hashes decides, and equal rows stay
    together. Raises DataError for too few.
    """
    hashes = np.unique(held_out.keys)
    middle = len(hashes) // 2
    halves = [np.isin(held_out.keys, each) for each in (hashes[:middle][:most], hashes[middle:][:most])]
    validation, test = (held_out.select(np.flatnonzero(each)) for each in halves)
    if min(len(validation), len(test)) < MIN_ROWS:
        raise DataError(
            f"a ladder needs {MIN_ROWS} held-out rows to decide on and {MIN_ROWS} others to test with; there are "
            f"{len(validation)} and {len(test)} ({held_out.sources[0]}, ...). Give --validation FILE with "
            f"{2 * MIN_ROWS} rows or more, or more training rows, of which 5% are held out."
        )
    return validation, test
