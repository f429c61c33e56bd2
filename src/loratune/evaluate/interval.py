"""Intervals for shares and means by resampling whole documents (Efron 1979; percentile bootstrap).

Sentences of one document resemble each other, so a document, not a sentence, is what is drawn again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loratune.errors import DataError

_MAX_DRAWS = 1 << 20  # drawn indices held at once: 8 MB


class Interval(NamedTuple):
    """A figure and the bounds that its true value lies between with the level's probability."""

    value: float
    low: float
    high: float


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    seed: int = 0,
    num_resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Returns sum(numerators) / sum(denominators), one entry a document, with its percentile interval.

    For two models on the same documents, differences as numerators give the interval of the paired difference.
    Raises DataError for fewer than two documents, a denominator that is not positive or a figure that is not finite.
    """
    over = _column("numerators", numerators)
    under = _column("denominators", denominators)
    if len(over) != len(under):
        raise DataError(f"{len(over)} numerators for {len(under)} denominators: expected one of each per document.")
    if (under <= 0).any():
        i = int(np.argmax(under <= 0))
        raise DataError(f"the denominator of document {i} is {under[i]:g}: expected above 0. Leave that document out.")
    if not 0 < level < 1 or num_resamples < 1:
        raise DataError(f"level {level} with {num_resamples} resamples: expected a level in (0, 1) and 1 or more.")
    ratios = _resampled_ratios(over, under, np.random.default_rng(seed), num_resamples)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(over.sum() / under.sum()), float(low), float(high))


def bootstrap_mean(values: Sequence[float], seed: int = 0, num_resamples: int = 2000, level: float = 0.95) -> Interval:
    """Returns the mean of one value a document with its percentile interval; raises DataError as `bootstrap_ratio`."""
    return bootstrap_ratio(values, [1.0] * len(values), seed, num_resamples, level)


def _column(what: str, values: Sequence[float]) -> NDArray[np.float64]:
    column = np.asarray(values, dtype=np.float64)
    if len(column) < 2:
        raise DataError(f"{len(column)} {what}: an interval needs at least two documents.")
    if not np.isfinite(column).all():
        i = int(np.argmin(np.isfinite(column)))
        raise DataError(f"{what} of document {i} is {column[i]}: expected a finite number.")
    return column


def _resampled_ratios(
    over: NDArray[np.float64], under: NDArray[np.float64], generator: np.random.Generator, num_resamples: int
) -> NDArray[np.float64]:
    """Returns num_resamples ratios, each of as many documents as there are, drawn with replacement."""
    ratios = np.empty(num_resamples)
    step = max(1, _MAX_DRAWS // len(over))
    for start in range(0, num_resamples, step):
        chunk = ratios[start : start + step]
        drawn = generator.integers(len(over), size=(len(chunk), len(over)))
        chunk[:] = over[drawn].sum(axis=1) / under[drawn].sum(axis=1)
    return ratios
