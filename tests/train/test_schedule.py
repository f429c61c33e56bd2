"""Learning rates: their values, and that they are a pure function of the step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.train.config import TrainConfig
from loratune.train.schedule import peak_rate, rate, warmup_steps


def test_values_of_a_short_schedule() -> None:
    """Two steps up (half, whole), then down by an eighth a step; the step after the last would be zero."""
    found = [rate(step, 10, 2, 0.8) for step in range(11)]
    assert found == pytest.approx([0.4, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


def test_no_warmup_starts_at_the_peak() -> None:
    assert [rate(step, 4, 0, 1.0) for step in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


@given(st.integers(1, 500), st.integers(0, 600), st.floats(1e-6, 1.0))
def test_rises_then_falls_and_stays_within_the_peak(num_steps: int, warmup: int, peak: float) -> None:
    rates = [rate(step, num_steps, warmup, peak) for step in range(num_steps)]
    assert all(0 < each <= peak * (1 + 1e-12) for each in rates)
    top = min(warmup, num_steps)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize(("num_steps", "expected"), [(1, 1), (10, 1), (75, 4), (1000, 50)])
def test_warmup_is_five_percent_and_at_least_one(num_steps: int, expected: int) -> None:
    assert warmup_steps(TrainConfig(), num_steps) == expected


def test_what_is_given_wins() -> None:
    assert warmup_steps(TrainConfig(warmup_steps=0), 1000) == 0
    assert peak_rate(TrainConfig(learning_rate=0.01), 10**10) == 0.01


@pytest.mark.parametrize(("num_parameters", "expected"), [(270_000_000, 5e-4), (4 * 10**9, 5e-4), (7 * 10**9, 3e-4)])
def test_the_default_peak_goes_by_the_size_of_the_model(num_parameters: int, expected: float) -> None:
    assert peak_rate(TrainConfig(), num_parameters) == expected
