"""Figures against scikit-learn and brute force; intervals against the formula of a mean."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.evaluate import metrics

sklearn = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")

LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=60)


def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    true, predicted = np.array(pairs).T
    return true, predicted


@settings(max_examples=40, deadline=None)
@given(LABELS)
def test_figures_of_classes_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    true, predicted = columns(pairs)
    found = metrics.class_figures(predicted, true, 4)
    assert found["accuracy"].value == pytest.approx(sklearn.accuracy_score(true, predicted))
    assert found["macro_f1"].value == pytest.approx(sklearn.f1_score(true, predicted, average="macro"))
    assert found["micro_f1"].value == pytest.approx(sklearn.f1_score(true, predicted, average="micro"))
    assert found["matthews"].value == pytest.approx(sklearn.matthews_corrcoef(true, predicted))
    np.testing.assert_array_equal(
        metrics.confusion(predicted, true, 4), sklearn.confusion_matrix(true, predicted, labels=range(4))
    )


def test_the_table_of_classes_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    true, predicted = generator.integers(0, 4, 50), generator.integers(0, 3, 50)  # class 3 is never predicted
    counts = metrics.class_counts(metrics.one_hot(predicted, 4), metrics.one_hot(true, 4))
    table = metrics.class_table(counts, "abcd")
    expected = sklearn.precision_recall_fscore_support(true, predicted, labels=range(4), zero_division=np.nan)
    for row, precision, recall, f1, support in zip(table, *expected, strict=True):
        assert row["rows"] == support and row["recall"] == pytest.approx(recall)
        assert row["f1"] == pytest.approx(f1)
        assert row["precision"] == (None if math.isnan(precision) else pytest.approx(precision))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 6), st.integers(2, 40))
def test_figures_of_several_labels_are_those_of_scikit_learn(seed: int, num_classes: int, num_rows: int) -> None:
    generator = np.random.default_rng(seed)
    true, predicted = (generator.random((num_rows, num_classes)) < 0.4 for _ in range(2))
    counts = metrics.class_counts(predicted, true)
    micro = sklearn.f1_score(true, predicted, average="micro", zero_division=0)
    assert metrics.additive(counts, metrics.micro_f1).value == pytest.approx(micro)
    there = (true | predicted).any(0)
    if there.any():
        named = {"labels": np.flatnonzero(there), "average": "macro", "zero_division": 0}
        macro = sklearn.f1_score(true, predicted, **named)
        assert metrics.additive(counts, metrics.macro_f1).value == pytest.approx(macro)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-1e6, 1e6))
def test_correlations_are_those_of_scipy(seed: int, offset: float) -> None:
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 6, 30) / 2 + offset  # ties, and a mean far from zero
    y = x + generator.normal(size=30)
    found = metrics.number_figures(x, y)
    assert found["pearson"].value == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-6)
    assert found["spearman"].value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


def test_a_correlation_with_a_constant_is_not_defined() -> None:
    found = metrics.number_figures(np.ones(10), np.arange(10.0))
    assert math.isnan(found["pearson"].value) and metrics.defined(found["pearson"].value) is None


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = metrics.mean(values.tolist())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=half / 4)
    assert found.high == pytest.approx(values.mean() + half, abs=half / 4)


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    generator = np.random.default_rng(0)
    hard = generator.random(300)
    one, other = (hard < 0.6).astype(float), (hard < 0.65).astype(float)
    found = metrics.paired(*(np.stack([each, np.ones(300)], 1) for each in (one, other)), metrics.ratio)
    assert found.value == pytest.approx(other.mean() - one.mean()) and found.low > 0
    assert metrics.mean(one.tolist()).high > metrics.mean(other.tolist()).low


def test_f_beta_weighs_precision() -> None:
    counts = np.array([[2, 4, 2], [1, 1, 3]])
    found = metrics.found_figures(counts, {"f1": 1.0, "f0_5": 0.5})
    precision, recall = 3 / 5, 3 / 5
    assert (found["precision"].value, found["recall"].value) == (precision, recall)
    assert found["f0_5"].value == pytest.approx(1.25 * precision * recall / (0.25 * precision + recall))
    assert metrics.found_figures(np.zeros((2, 3)), {"f1": 1.0})["f1"].value == 1  # nothing to find, nothing found
