"""Figures of tasks, each with a 95% interval by resampling documents (Efron 1979; percentile bootstrap).

Most figures depend on the documents through sums of counts only (correct ones, pairs of classes, n-grams, products), so
a resample is a weighted sum: D documents, K counts of each, R resamples: (R, D) draws @ (D, K) counts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune.evaluate.interval import Interval

NUM_RESAMPLES, LEVEL = 1000, 0.95
_CHUNK = 100  # resamples at once: (100, D) draws

Counts = NDArray[np.float64]
Statistic = Callable[[Counts], NDArray[np.float64]]  # (..., K) -> (...)


def additive(counts: NDArray[Any], statistic: Statistic, seed: int = 0) -> Interval:
    """Returns a statistic of the sum of counts (D, K) over documents, with its interval."""
    counts = np.asarray(counts, dtype=np.float64)
    values = [statistic((draws @ counts).astype(np.float64)) for draws in _draws(len(counts), seed)]
    return _interval(float(statistic(counts.sum(0))), np.concatenate(values))


def resampled(statistic: Callable[[NDArray[np.int64]], float], num_documents: int, seed: int = 0) -> Interval:
    """Returns a statistic of chosen documents, given as positions, with its interval: for what is no sum of counts."""
    values = [
        statistic(np.repeat(np.arange(num_documents), row)) for draws in _draws(num_documents, seed) for row in draws
    ]
    return _interval(statistic(np.arange(num_documents)), np.array(values))


def mean(values: Sequence[float], seed: int = 0) -> Interval:
    """Returns the mean of one value a document."""
    return additive(shares(values), ratio, seed)


def shares(values: Sequence[float]) -> Counts:
    """Returns (D, 2): each value, and one; `ratio` of their sums is the mean."""
    return np.stack([np.asarray(values, np.float64), np.ones(len(values))], 1)


def _draws(num_documents: int, seed: int) -> Sequence[NDArray[np.int64]]:
    """Returns how often each resample drew each document, (R, D) in chunks."""
    generator = np.random.default_rng(seed)
    return [
        generator.multinomial(num_documents, np.full(num_documents, 1 / num_documents), size=_CHUNK)
        for _ in range(NUM_RESAMPLES // _CHUNK)
    ]


def _interval(value: float, values: NDArray[np.float64]) -> Interval:
    """Resamples in which the statistic is not defined (a constant column) are left out."""
    defined = values[np.isfinite(values)]
    if not len(defined) or not math.isfinite(value):
        return Interval(math.nan, math.nan, math.nan)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def paired(one: NDArray[Any], other: NDArray[Any], statistic: Statistic, seed: int = 0) -> Interval:
    """Returns the difference of a statistic of two models on the same documents, other less one, with its interval."""
    counts = np.concatenate([one, other], axis=1).astype(np.float64)
    width = one.shape[1]
    return additive(counts, lambda sums: statistic(sums[..., width:]) - statistic(sums[..., :width]), seed)


def ratio(sums: Counts) -> NDArray[np.float64]:
    """(numerator, denominator) -> their ratio; 0 where nothing was counted."""
    return _divide(sums[..., 0], sums[..., 1])


def _divide(over: NDArray[np.float64], under: NDArray[np.float64], empty: float = 0.0) -> NDArray[np.float64]:
    return np.divide(over, under, out=np.full_like(over, empty), where=under != 0)


# ---- classes: K = 3 C counts (of each class: both, predicted, true) -------------------------------------------------


def class_counts(predicted: NDArray[np.bool_], true: NDArray[np.bool_]) -> Counts:
    """Returns (D, 3 C) of decisions (D, C), one-hot for single labels: for each class both, predicted, true."""
    return np.concatenate([predicted & true, predicted, true], axis=1).astype(np.float64)


def _split(sums: Counts) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    both, predicted, true = np.split(sums, 3, axis=-1)
    return both, predicted, true


def class_f1(sums: Counts) -> NDArray[np.float64]:
    """F1 of each class, 2 both / (predicted + true), (..., C); NaN for one that is neither predicted nor there."""
    both, predicted, true = _split(sums)
    return _divide(2 * both, predicted + true, math.nan)


def macro_f1(sums: Counts) -> NDArray[np.float64]:
    """The mean F1 of the classes that are predicted or there, as scikit-learn has it."""
    return _mean_where_defined(class_f1(sums))


def _mean_where_defined(each: NDArray[np.float64]) -> NDArray[np.float64]:
    there = np.isfinite(each)
    return _divide(np.where(there, each, 0).sum(-1), there.sum(-1).astype(np.float64))


def micro_f1(sums: Counts) -> NDArray[np.float64]:
    """F1 of all decisions together."""
    both, predicted, true = (each.sum(-1) for each in _split(sums))
    return _divide(2 * both, predicted + true)


def micro_precision(sums: Counts) -> NDArray[np.float64]:
    """The share of what is predicted that is right."""
    both, predicted, _ = (each.sum(-1) for each in _split(sums))
    return _divide(both, predicted)


def micro_recall(sums: Counts) -> NDArray[np.float64]:
    """The share of what is there that is predicted."""
    both, _, true = (each.sum(-1) for each in _split(sums))
    return _divide(both, true)


def matthews(sums: Counts) -> NDArray[np.float64]:
    """Matthews' correlation for any number of classes (Gorodkin 2004), of single labels; 0 where one side is constant.

    (c s - sum p t) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)): c right of s, p and t predicted and true of each class.
    """
    both, predicted, true = _split(sums)
    total = true.sum(-1)
    over = both.sum(-1) * total - (predicted * true).sum(-1)
    spread = (total**2 - (predicted**2).sum(-1)) * (total**2 - (true**2).sum(-1))
    return _divide(over, np.sqrt(np.maximum(spread, 0)))


def class_figures(predicted: NDArray[np.int64], true: NDArray[np.int64], num_classes: int) -> dict[str, Interval]:
    """Returns the figures of single labels (D,): accuracy, macro and micro F1, Matthews' correlation."""
    counts = class_counts(one_hot(predicted, num_classes), one_hot(true, num_classes))
    return {
        "accuracy": mean((predicted == true).tolist()),
        "macro_f1": additive(counts, macro_f1),
        "micro_f1": additive(counts, micro_f1),
        "matthews": additive(counts, matthews),
    }


def one_hot(classes: NDArray[np.int64], num_classes: int) -> NDArray[np.bool_]:
    """(D,) -> (D, C)."""
    return classes[:, None] == np.arange(num_classes)


def confusion(predicted: NDArray[np.int64], true: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Returns how often each true class (row) was predicted as each class (column), (C, C)."""
    return np.bincount(true * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_table(counts: Counts, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns for each class its rows, precision, recall and F1; None where there is nothing to divide by."""
    both, predicted, true = _split(counts.sum(0))
    precision, recall, f1 = (
        _divide(both, predicted, math.nan), _divide(both, true, math.nan), class_f1(counts.sum(0)),
    )  # fmt: skip
    return [
        {"class": name, "rows": int(true[k]), "predicted": int(predicted[k])}
        | {key: defined(float(each[k])) for key, each in (("precision", precision), ("recall", recall), ("f1", f1))}
        for k, name in enumerate(names)
    ]


def defined(value: float) -> float | None:
    """Returns a figure, or None for one that is not defined: JSON has no NaN."""
    return value if math.isfinite(value) else None


def pixel_counts(predicted: NDArray[np.integer[Any]], true: NDArray[np.integer[Any]], num_classes: int) -> Counts:
    """Returns (3 C,) of the pixels (P,) of an image: of each class both, predicted, true."""
    parts = (true[predicted == true], predicted, true)
    return np.concatenate([np.bincount(each, minlength=num_classes) for each in parts]).astype(np.float64)


def class_iou(sums: Counts) -> NDArray[np.float64]:
    """Intersection over union of each class, both / (predicted + true - both), (..., C); NaN for one that is nowhere
    (Everingham et al. 2010)."""
    both, predicted, true = _split(sums)
    return _divide(both, predicted + true - both, math.nan)


def mean_iou(sums: Counts) -> NDArray[np.float64]:
    """The mean intersection over union of the classes that are predicted or there."""
    return _mean_where_defined(class_iou(sums))


def iou_table(counts: Counts, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns for each class its pixels, intersection over union and accuracy; None where there is nothing to divide
    by."""
    both, predicted, true = _split(counts.sum(0))
    shares = {"iou": class_iou(counts.sum(0)), "accuracy": _divide(both, true, math.nan)}
    return [
        {"class": name, "pixels": int(true[k]), "predicted": int(predicted[k])}
        | {key: defined(float(each[k])) for key, each in shares.items()}
        for k, name in enumerate(names)
    ]


# ---- numbers --------------------------------------------------------------------------------------------------------


def moments(x: NDArray[np.float64], y: NDArray[np.float64]) -> Counts:
    """Returns (D, 6): 1, x, y, x^2, y^2, x y, of columns less their means, which keeps the sums exact."""
    x, y = x - x.mean(), y - y.mean()
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def pearson(sums: Counts) -> NDArray[np.float64]:
    """Pearson's correlation of the sums of `moments`; NaN where a column is constant."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = np.maximum(n * xx - x * x, 0) * np.maximum(n * yy - y * y, 0)
    return _divide(n * xy - x * y, np.sqrt(spread), math.nan)


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the rank of each value, equal ones sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def number_figures(predicted: NDArray[np.float64], true: NDArray[np.float64]) -> dict[str, Interval]:
    """Returns the figures of numbers (D,): Pearson's and Spearman's correlation, mean absolute and squared error."""

    def spearman(chosen: NDArray[np.int64]) -> float:
        return float(pearson(moments(ranks(predicted[chosen]), ranks(true[chosen])).sum(0)))

    return {
        "pearson": additive(moments(predicted, true), pearson),
        "spearman": resampled(spearman, len(true)),
        "mean_absolute_error": mean(np.abs(predicted - true).tolist()),
        "mean_squared_error": mean(np.square(predicted - true).tolist()),
    }


# ---- what is found and what should be: K = 3 counts (both, found, asked for) ----------------------------------------


def f_beta(beta: float) -> Statistic:
    """Returns F of sums (both, found, asked): (1 + b^2) both / (found + b^2 asked); 1 where there is nothing at all."""

    def statistic(sums: Counts) -> NDArray[np.float64]:
        both, found, asked = np.moveaxis(sums, -1, 0)
        return _divide((1 + beta**2) * both, found + beta**2 * asked, 1.0)

    return statistic


def found_figures(counts: NDArray[Any], betas: Mapping[str, float]) -> dict[str, Interval]:
    """Returns precision, recall, and F under each name of `betas`, of counts (D, 3): both, found, asked for."""
    wide = np.asarray(counts, dtype=np.float64)
    figures = {
        "precision": additive(wide[:, [0, 1]], ratio),
        "recall": additive(wide[:, [0, 2]], ratio),
    }
    return figures | {name: additive(wide, f_beta(beta)) for name, beta in betas.items()}
