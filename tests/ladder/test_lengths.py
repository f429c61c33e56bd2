"""What a ladder settles before it begins: its cost on every path it may take, its rows, its rungs."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladder.tiny_ladder import make_climb
from loratune.adapter.config import LoraConfig
from loratune.data.dataset import load_dataset
from loratune.data.encode import Encoder
from loratune.errors import ConfigError, DataError
from loratune.ladder import plan
from loratune.ladder.plan import Lengths
from loratune.train.config import LadderConfig
from oracles import Toy
from tiny_run import CONTEXT, copy_rows, tokenizer, write_rows


def paths(
    lengths: Lengths, num_rungs: int, rung: int = 0, left: int | None = None, again: bool = False
) -> Iterator[tuple[int, int, int]]:
    """Every way a climb may go from a look: (steps off the final path, evaluations beyond before and after, looks).

    A trial of two or three arms, as many as may still lose, each evaluated; the climb to the last of them, or none, or
    another look; one evaluation that confirms a climb, or takes it back and evaluates what is gone back to.
    """
    trial = lengths.trial
    left = num_rungs if left is None else left
    first = 1 if rung == 0 else 0  # the first rung is tested when its arm has ended
    most = min(num_rungs - 1 - rung, 2, left)
    yield (most * trial, most + 1 + first, 1)  # stays
    if left > most:
        for steps, more, looks in paths(lengths, num_rungs, rung, left - most, True):
            yield (most * trial + steps, most + 1 + first + more, 1 + looks)
    for up in range(1, most + 1):
        evaluations = up + 1 + first + (not again)
        if not again:
            yield (up * trial + lengths.rung - trial, evaluations + 1, 2)  # taken back
        if rung + up == num_rungs - 1 or left == up:
            yield (up * trial, evaluations, 2)
        else:
            for steps, more, looks in paths(lengths, num_rungs, rung + up, left - up, again):
                yield (up * trial + steps, evaluations + more, 1 + looks)


@given(st.integers(1, 100_000), st.integers(2, 6), st.floats(0, 50), st.integers(0, 5000))
def test_no_path_costs_more_than_one_run_and_three_tenths(
    num_steps: int, num_rungs: int, evaluation: float, warmup: int
) -> None:
    """In optimizer steps, evaluations included; a single run evaluates the decisive and the test rows twice."""
    try:
        lengths = plan.lengths(num_steps, num_rungs, evaluation, warmup)
    except ConfigError:
        return
    before_and_after = 2
    for steps, evaluations, looks in paths(lengths, num_rungs):
        ours = num_steps + steps + (before_and_after + evaluations + 2) * evaluation  # 2: base and result on test rows
        assert ours <= 1.3 * (num_steps + 4 * evaluation) + 1e-6
        assert lengths.rung * looks + lengths.trial < num_steps
    assert 0 <= lengths.warmup <= lengths.trial // 2


def test_a_long_run_has_long_trials_and_a_run_that_is_too_short_is_refused() -> None:
    assert plan.lengths(480, 3, 1.0, 24) == Lengths(rung=80, trial=40, warmup=20)
    assert plan.lengths(48, 3, 0.0, 2) == Lengths(rung=8, trial=4, warmup=2)
    with pytest.raises(ConfigError, match=r"47 steps are too few for a ladder of 3 rungs: on these rows it takes 48"):
        plan.lengths(47, 3, 0.0, 2)
    with pytest.raises(ConfigError, match="on these rows it takes 94"):
        plan.lengths(60, 3, 2.0, 2)


def test_the_steps_it_asks_for_are_enough() -> None:
    for evaluation in (0.0, 0.4, 2.0, 7.7):
        for num_rungs in range(2, 6):
            with pytest.raises(ConfigError) as error:
                plan.lengths(1, num_rungs, evaluation, 1)
            needed = int(str(error.value).split("it takes ")[1].split(".")[0])
            assert plan.lengths(needed, num_rungs, evaluation, 1).trial == plan.MIN_TRIAL
            with pytest.raises(ConfigError):
                plan.lengths(needed - 1, num_rungs, evaluation, 1)


def test_rows_are_halved_by_content_and_equal_rows_stay_together(tmp_path: Path) -> None:
    rows = copy_rows(60)
    held_out = load_dataset(write_rows(tmp_path / "a.jsonl", rows + rows[:9]), Encoder(tokenizer(), CONTEXT))
    halves = plan.split_held_out(held_out, 1000)
    keys = [set(each.keys.tolist()) for each in halves]
    assert not keys[0] & keys[1] and sum(map(len, halves)) == 69
    assert abs(len(keys[0]) - len(keys[1])) <= 1
    turned = load_dataset(write_rows(tmp_path / "b.jsonl", rows[::-1]), Encoder(tokenizer(), CONTEXT))
    assert [set(each.keys.tolist()) for each in plan.split_held_out(turned, 1000)] == keys
    fewer = plan.split_held_out(held_out, 22)
    assert all(set(few.keys.tolist()) <= all_ for few, all_ in zip(fewer, keys))
    assert [len(np.unique(each.keys)) for each in fewer] == [22, 22]


def test_too_few_rows_are_refused_with_what_to_do(tmp_path: Path) -> None:
    held_out = load_dataset(write_rows(tmp_path / "a.jsonl", copy_rows(30)), Encoder(tokenizer(), CONTEXT))
    with pytest.raises(
        DataError, match=r"there are 1\d and 1\d \(.*a\.jsonl:1, \.\.\.\)\. Give --validation FILE with 40"
    ):
        plan.split_held_out(held_out, 1000)


def test_many_rows_are_cut_to_what_a_tenth_of_the_steps_can_evaluate() -> None:
    assert plan.most_rows(1000, 3, 0.05) == 250  # 8 evaluations of 250 rows take 100 steps
    assert plan.most_rows(100, 3, 0.5) == plan.MIN_ROWS


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["fast", "fast:4"], r"rungs: fast to fast:4: layers\.0\.q_proj: an adapter cannot grow from r=8 to r=4"),
        (["fast", "quality", "fast"], r"rungs: fast, quality, fast: one is named twice"),
    ],
)
def test_rungs_that_do_not_grow_are_refused(names: list[str], reason: str) -> None:
    first = LoraConfig.preset("fast", target_modules=("q_proj", "v_proj"))
    with pytest.raises(ConfigError, match=reason):
        plan.rungs_of(Toy(), first, names)


def test_patience_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="patience ends a run where its loss stands still"):
        make_climb(tmp_path, patience=2)


def test_rungs_are_checked_by_name() -> None:
    assert LadderConfig().rungs == ["fast", "quality", "expert"]
    with pytest.raises(ValueError, match="rungs"):
        LadderConfig(rungs=["fast", "qualty"])
