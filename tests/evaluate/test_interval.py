"""The bootstrap against the analytic standard error, its coverage, and its edges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.errors import DataError
from loratune.evaluate import interval
from loratune.evaluate.interval import bootstrap_mean, bootstrap_ratio


def test_width_is_that_of_the_analytic_standard_error() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    found = bootstrap_mean(values.tolist(), num_resamples=4000)
    error = values.std() / np.sqrt(len(values))
    assert found.value == pytest.approx(values.mean(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error
    )


def test_ratio_width_is_that_of_the_delta_method() -> None:
    """Cochran 1977, eq. 6.4: the error of sum(y)/sum(x) is that of the mean of y - ratio x, over the mean of x."""
    generator = np.random.default_rng(2)
    under = generator.integers(5, 60, size=500).astype(float)
    over = generator.binomial(under.astype(int), generator.beta(4, 2, size=500)).astype(float)
    found = bootstrap_ratio(over.tolist(), under.tolist(), num_resamples=4000, level=0.9)
    ratio = over.sum() / under.sum()
    error = (over - ratio * under).std() / np.sqrt(500) / under.mean()
    assert found.value == pytest.approx(ratio, abs=1e-12)
    assert found.high - found.low == pytest.approx(2 * 1.645 * error, rel=0.06)


def test_coverage_is_near_the_level() -> None:
    """400 data sets of 60 documents: the true ratio 2/3 lies inside about 95 times in 100 (binomial s.d. 1.1)."""
    generator = np.random.default_rng(3)
    inside = 0
    for _ in range(400):
        under = generator.integers(5, 60, size=60)
        over = generator.binomial(under, generator.beta(4, 2, size=60))
        found = bootstrap_ratio(over.tolist(), under.tolist(), seed=5, num_resamples=500)
        inside += found.low <= 2 / 3 <= found.high
    assert 0.91 <= inside / 400 <= 0.98


def test_resampling_documents_is_wider_than_resampling_their_sentences() -> None:
    """10 equal sentences a document say no more than one: the interval must be sqrt(10) times wider."""
    values = np.random.default_rng(4).normal(size=100)
    by_document = bootstrap_ratio((values * 10).tolist(), [10.0] * 100)
    by_sentence = bootstrap_mean(np.repeat(values, 10).tolist())
    ratio = (by_document.high - by_document.low) / (by_sentence.high - by_sentence.low)
    assert ratio == pytest.approx(np.sqrt(10), rel=0.1)


def test_small_chunks_draw_the_same_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(6).normal(size=30).tolist()
    whole = bootstrap_mean(values)
    monkeypatch.setattr(interval, "_MAX_DRAWS", 100)
    assert bootstrap_mean(values) == whole


@settings(max_examples=30)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20), st.integers(0, 2**32))
def test_bounds_hold_the_resampled_range_and_repeat_for_the_same_seed(values: list[float], seed: int) -> None:
    found = bootstrap_mean(values, seed, num_resamples=200)
    assert found == bootstrap_mean(values, seed, num_resamples=200)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9


def test_equal_documents_leave_no_doubt() -> None:
    assert bootstrap_ratio([3, 3, 3], [4, 4, 4]) == (0.75, 0.75, 0.75)


@pytest.mark.parametrize(
    ("over", "under", "level", "message"),
    [
        ([1.0], [2.0], 0.95, "at least two documents"),
        ([1.0, 1.0], [2.0, 0.0], 0.95, "denominator of document 1 is 0"),
        ([1.0, 1.0], [2.0, 1.0, 1.0], 0.95, "2 numerators for 3 denominators"),
        ([1.0, float("nan")], [2.0, 1.0], 0.95, "numerators of document 1 is nan"),
        ([1.0, 1.0], [2.0, 1.0], 95, r"expected a level in \(0, 1\)"),
    ],
)
def test_figures_without_an_interval_are_errors(
    over: list[float], under: list[float], level: float, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        bootstrap_ratio(over, under, level=level)
