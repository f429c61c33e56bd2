"""A split is a function of each row's content: rows that are added move no other."""

import pytest

from loratune.data.rows import Row
from loratune.data.splits import split
from loratune.errors import ConfigError, DataError

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def rows(numbers: range) -> list[Row]:
    return [Row("a.jsonl", n, "text", {"text": f"row {n}", "book": n // 7}) for n in numbers]


def test_the_shares_are_met_on_average_and_depend_on_the_seed() -> None:
    names = split(rows(range(5000)), SHARES, seed=1)
    for name, share in SHARES.items():
        spread = (5000 * share * (1 - share)) ** 0.5
        assert abs(names.count(name) - 5000 * share) < 4 * spread
    assert names == split(rows(range(5000)), SHARES, seed=1) != split(rows(range(5000)), SHARES, seed=2)


def test_known_rows_keep_their_side_for_ever() -> None:
    assert split(rows(range(12)), {"a": 0.5, "b": 0.5}, seed=0) == list("abaaaabbabbb")


def test_added_rows_move_no_other_row() -> None:
    names = split(rows(range(300)), SHARES, seed=3)
    assert split(rows(range(1000)), SHARES, seed=3)[:300] == names
    backwards = [Row("b.jsonl", 1, row.kind, dict(reversed(row.value.items()))) for row in reversed(rows(range(300)))]
    assert split(backwards, SHARES, seed=3) == names[::-1]


def test_groups_stay_together() -> None:
    names = split(rows(range(700)), SHARES, seed=0, group="book")
    assert all(len(set(names[start : start + 7])) == 1 for start in range(0, 700, 7))
    assert len(set(names)) == 3


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}])
def test_shares_that_are_no_whole_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be positive and sum to 1"):
        split(rows(range(3)), shares, seed=0)


def test_a_row_without_its_group_is_refused() -> None:
    with pytest.raises(DataError, match=r"a.jsonl:0: the row has no 'author' to group by; it has 'text', 'book'\."):
        split(rows(range(3)), SHARES, seed=0, group="author")
