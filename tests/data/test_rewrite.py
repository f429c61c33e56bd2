"""Conversions and splits: every row in one place, whole or not at all, the same place when rows are added."""

import json
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loratune.data.rewrite import convert, write_splits
from loratune.data.rows import read_rows
from loratune.errors import ConfigError, DataError

SHARES = {"train": 0.8, "test": 0.2}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def pairs(count: int) -> list[dict[str, str]]:
    return [{"id": f"row {n}", "prompt": f"prompt {n}", "completion": f"answer {n}"} for n in range(count)]


def read(folder: Path) -> dict[str, list[Any]]:
    return {path.stem: [json.loads(line) for line in path.open()] for path in sorted(folder.iterdir())}


def side_of(split: dict[str, list[Any]]) -> dict[str, str]:
    return {row["id"]: name for name, rows in split.items() for row in rows}


def test_a_split_holds_every_row_as_it_stood_in_the_source(tmp_path: Path) -> None:
    rows = pairs(300)
    counts, ledger = write_splits(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", SHARES)
    split = read(tmp_path / "out")
    assert {name: len(split[name]) for name in SHARES} == counts and sum(counts.values()) == 300
    assert sorted(split["train"] + split["test"], key=rows.index) == rows
    assert [rows.index(row) for row in split["train"]] == sorted(rows.index(row) for row in split["train"])
    assert abs(counts["test"] - 60) < 4 * (300 * 0.8 * 0.2) ** 0.5
    assert (ledger.rows_in, ledger.rows_trained) == (300, 300)


def test_added_rows_move_no_other_row_and_equal_rows_stay_together(tmp_path: Path) -> None:
    rows = pairs(100)
    write_splits(write(tmp_path / "rows.jsonl", rows), tmp_path / "before", SHARES)
    copies = [{**row, "id": f"copy of {row['id']}"} for row in rows]
    write_splits(write(tmp_path / "more.jsonl", copies + rows[::-1]), tmp_path / "after", SHARES)
    before, after = side_of(read(tmp_path / "before")), side_of(read(tmp_path / "after"))
    assert before == {name: after[name] for name in before} == {name: after[f"copy of {name}"] for name in before}
    write_splits(tmp_path / "rows.jsonl", tmp_path / "other", SHARES, seed=1)
    assert side_of(read(tmp_path / "other")) != before


def test_a_group_stays_together(tmp_path: Path) -> None:
    rows = [{**row, "source": f"document {n % 12}"} for n, row in enumerate(pairs(120))]
    write_splits(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", {"a": 0.5, "b": 0.5}, group="source")
    split = {name: {row["source"] for row in rows} for name, rows in read(tmp_path / "out").items()}
    assert not split["a"] & split["b"] and len(split["a"] | split["b"]) == 12
    with pytest.raises(DataError, match=r"rows.jsonl:1: the row has no 'author' to group by; it has 'id'"):
        write_splits(tmp_path / "rows.jsonl", tmp_path / "out2", SHARES, group="author")
    assert not (tmp_path / "out2").exists()


def test_a_table_is_split_too(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(pairs(60)), tmp_path / "rows.parquet")
    write_splits(tmp_path / "rows.parquet", tmp_path / "out", SHARES)
    write_splits(write(tmp_path / "rows.jsonl", pairs(60)), tmp_path / "same", SHARES)
    assert read(tmp_path / "out") == read(tmp_path / "same")


@pytest.mark.parametrize(
    ("value", "message"),
    [(b"\xff", "it has a value of the type bytes"), (float("nan"), "Out of range float values are not JSON compliant")],
)
def test_what_json_cannot_hold_is_not_written_as_something_else(tmp_path: Path, value: Any, message: str) -> None:
    rows = [{"text": f"row {n}", "metadata": {"value": value}} for n in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=rf"rows.parquet:1: JSON cannot hold the row: {message}"):
        write_splits(tmp_path / "rows.parquet", tmp_path / "out", SHARES)
    assert not (tmp_path / "out").exists()


def test_dates_and_decimals_are_written_as_text(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}", "metadata": {"on": date(2024, 1, 31), "at": Decimal("1.50")}} for n in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write_splits(tmp_path / "rows.parquet", tmp_path / "out", SHARES)
    written = [row["metadata"] for split in read(tmp_path / "out").values() for row in split]
    assert written == [{"on": "2024-01-31", "at": "1.50"}] * 40


def test_what_comes_out_can_be_trained_on(tmp_path: Path) -> None:
    write_splits(write(tmp_path / "rows.jsonl", pairs(80)), tmp_path / "out", {"train": 0.7, "validation": 0.3})
    assert len(read_rows(tmp_path / "out")) + len(read_rows(f"{tmp_path / 'out'}/validation")) == 80


Write = Callable[..., Any]
WRITERS: list[Write] = [
    lambda spec, target, **options: write_splits(spec, target, SHARES, **options),
    lambda spec, target, **options: convert(spec, target, "messages", **options),
]


@pytest.mark.parametrize("writer", WRITERS, ids=["split", "convert"])
def test_rejected_rows_stop_it_unless_they_are_left_out(tmp_path: Path, writer: Write) -> None:
    spec = write(tmp_path / "rows.jsonl", [*pairs(40), "{", {"prompt": "x", "completion": ""}])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        DataError, match=r"2 of 42 rows cannot be trained on:\n  .*rows.jsonl:41: not valid JSON"
    ) as error:
        writer(spec, tmp_path / "out.jsonl")
    assert str(error.value).endswith("\nNothing was written. Mend or remove them, or leave them out with --reject.")
    assert sorted(tmp_path.iterdir()) == before
    result = writer(spec, tmp_path / "out.jsonl", reject=True)
    ledger = result[1] if isinstance(result, tuple) else result
    assert (ledger.rows_in, ledger.rows_trained, len(ledger.rejects)) == (42, 40, 2)
    assert (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("writer", WRITERS, ids=["split", "convert"])
@pytest.mark.parametrize("rows", [[], ["{"]], ids=["no rows", "no good rows"])
def test_nothing_to_write_is_an_error(tmp_path: Path, writer: Write, rows: list[str]) -> None:
    with pytest.raises(DataError, match=f"none of the {len(rows)} rows can be used, so nothing was written"):
        writer(write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl", reject=True)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"train": 0.9, "test": 0.2}, "must be positive and sum to 1; found train=0.9, test=0.2"),
        ({"../train": 1.0}, "the split '../train' cannot be used as a name"),
    ],
)
def test_shares_that_cannot_be_used(tmp_path: Path, shares: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_splits(write(tmp_path / "rows.jsonl", pairs(9)), tmp_path / "out", shares)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the split 'test' would be empty: 0.001 of 9 rows"):
        write_splits(write(tmp_path / "rows.jsonl", pairs(9)), tmp_path / "out", {"train": 0.999, "test": 0.001})
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_conversion(tmp_path: Path) -> None:
    convert(write(tmp_path / "rows.jsonl", pairs(2)), tmp_path / "chat.jsonl", "messages")
    assert [json.loads(line) for line in (tmp_path / "chat.jsonl").open()] == [
        {
            "messages": [
                {"role": "user", "content": f"prompt {n}"},
                {"role": "assistant", "content": f"answer {n}"},
            ]
        }
        for n in range(2)
    ]
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: a prompt_completion row cannot be written as text without a loss"
    ):
        convert(tmp_path / "rows.jsonl", tmp_path / "text.jsonl", "text")
    assert not (tmp_path / "text.jsonl").exists()
