"""Order and packing are pure functions: a partition, within the budget, the same every time."""

import json
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.data.pack import epoch_order, length_groups, micro_batches, step_rows

lengths_and_budget = st.tuples(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 400))


@given(st.integers(0, 300), st.integers(0, 2**32), st.integers(0, 50))
def test_epoch_order_is_a_permutation_and_pure(num_documents: int, seed: int, epoch: int) -> None:
    order = epoch_order(num_documents, seed, epoch)
    assert sorted(order.tolist()) == list(range(num_documents))
    again = epoch_order.__wrapped__(num_documents, seed, epoch)  # not the one that is kept
    assert np.array_equal(order, again) and not order.flags.writeable


def test_epochs_and_seeds_differ_and_the_stream_is_pinned() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert epoch_order(10, seed=0, epoch=0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]


def test_first_places_are_uniform() -> None:
    counts = np.bincount([epoch_order(8, seed=1, epoch=e)[0] for e in range(4000)], minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


@given(st.integers(1, 100), st.integers(1, 12), st.integers(0, 9), st.integers(0, 9))
def test_step_rows_cut_the_order(num_documents: int, batch_size: int, seed: int, epoch: int) -> None:
    num_steps = -(-num_documents // batch_size)
    batches = [step_rows(num_documents, batch_size, seed, epoch, position) for position in range(num_steps)]
    assert [row for batch in batches for row in batch] == epoch_order(num_documents, seed, epoch).tolist()
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


@given(lengths_and_budget)
@settings(max_examples=200)
def test_micro_batches_partition_within_the_budget(case: tuple[list[int], int]) -> None:
    lengths, max_tokens = case
    packs = micro_batches(lengths, max_tokens)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(pack == sorted(pack) for pack in packs)
    assert all(len(pack) == 1 or sum(lengths[i] for i in pack) <= max_tokens for pack in packs)
    assert packs == micro_batches(lengths, max_tokens)
    loads = [sum(lengths[i] for i in pack) for pack in packs]
    assert all(a + b > max_tokens for a, b in combinations(loads, 2))  # else two packs could have been one


def test_micro_batches_golden() -> None:
    assert micro_batches([5, 7, 3, 2, 8, 10, 30], 10) == [[0], [1, 2], [3, 4], [5], [6]]
    assert micro_batches([6, 6, 4, 4], 10) == [[0, 2], [1, 3]]  # in order of arrival this would take three
    assert micro_batches([], 10) == []


@given(lengths_and_budget)
@settings(max_examples=200)
def test_length_groups_partition_within_the_padded_budget(case: tuple[list[int], int]) -> None:
    lengths, max_tokens = case
    groups = length_groups(lengths, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= max_tokens for group in groups)
    ranges = sorted((min(lengths[i] for i in group), max(lengths[i] for i in group)) for group in groups)
    assert all(low >= high for (_, high), (low, _) in pairwise(ranges))  # similar lengths together


TRL = json.loads((Path(__file__).parents[1] / "golden" / "templates" / "trl_packs.json").read_text("utf-8"))


@pytest.mark.parametrize("case", TRL)
def test_packs_are_as_full_as_those_of_trl(case: dict[str, Any]) -> None:
    def loads(packs: list[list[int]]) -> list[int]:
        return sorted(sum(case["lengths"][i] for i in pack) for pack in packs)

    assert loads(micro_batches(case["lengths"], case["max_tokens"])) == loads(case["packs"])
