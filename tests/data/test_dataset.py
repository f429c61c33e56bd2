"""A file becomes documents before anything is written; what is held out depends on the content alone."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizer import tokenizer_of

from loratune.data.dataset import Dataset, hold_out, load_dataset
from loratune.data.encode import Document, Encoder
from loratune.errors import DataError


def dataset_of(contents: list[int]) -> Dataset:
    documents = [Document(np.array([1, value, 2], np.int32), np.array([False, True, True])) for value in contents]
    return Dataset(documents, [f"rows.jsonl:{i}" for i in range(1, len(contents) + 1)], "0" * 64, "text")


def values(dataset: Dataset) -> list[int]:
    return [int(document.input_ids[1]) for document in dataset.documents]


def test_load_dataset_knows_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": "the question", "completion": f" answer {i}"}) for i in range(5)]
    file.write_text("\n\n".join(lines))
    dataset = load_dataset(file, Encoder(tokenizer_of("gemma"), 64))
    assert dataset.sources == [f"{file}:{line}" for line in (1, 3, 5, 7, 9)]
    assert dataset.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (len(dataset), dataset.kind) == (5, "prompt_completion")
    assert dataset.lengths == [len(document.input_ids) for document in dataset.documents]
    assert dataset.num_tokens == sum(dataset.lengths)
    assert dataset.num_labels == sum(int(document.trained.sum()) for document in dataset.documents)


def test_a_long_row_stops_the_load_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": "answer " * n}) for n in (2, 3, 400)))
    with pytest.raises(DataError, match=rf"^{file}:3: the row is \d{{3,}} tokens long, the limit is 64"):
        load_dataset(file, Encoder(tokenizer_of("gemma"), 64))


@given(st.lists(st.integers(0, 400), min_size=2, max_size=300), st.lists(st.integers(0, 400), max_size=100))
@settings(deadline=None)
def test_hold_out_is_a_partition_by_content_and_stable(contents: list[int], more: list[int]) -> None:
    if len(set(contents)) < 2:
        with pytest.raises(DataError, match=r"all .* rows are the same"):
            hold_out(dataset_of(contents))
        return
    train, held = hold_out(dataset_of(contents), fraction=0.2, max_rows=1000)
    assert sorted(values(train) + values(held)) == sorted(contents)
    assert not set(values(train)) & set(values(held))
    assert len(train) and len(held)
    assert values(train) == [value for value in contents if value in set(values(train))]  # in the file's order
    grown_train, _ = hold_out(dataset_of(contents + more), fraction=0.2, max_rows=1000)
    if len(set(values(held))) > 1:  # more than the one row that a small set must hold out
        assert not set(values(held)) & set(values(grown_train))
    assert len(set(values(train)) - set(values(grown_train))) <= 1  # the last different row may have been kept back


def test_hold_out_takes_its_share_and_at_most_max_rows() -> None:
    contents = list(range(4000))
    train, held = hold_out(dataset_of(contents))
    assert 150 < len(held) < 250
    assert len(train) + len(held) == 4000
    _, few = hold_out(dataset_of(contents), max_rows=30)
    assert len(few) == 30 and set(values(few)) <= set(values(held))
    assert few.sources == [f"rows.jsonl:{value + 1}" for value in values(few)]


def test_something_is_always_left_to_train_on() -> None:
    train, held = hold_out(dataset_of([1, 2, 2]), fraction=1.0)
    assert {len(train), len(held)} == {1, 2}
