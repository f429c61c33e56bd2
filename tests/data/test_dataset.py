"""Data becomes documents before anything is written, every row accounted for; what is held out depends on content."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizer import tokenizer_of

from loratune.data import tokenise
from loratune.data.dataset import Dataset, hold_out, load_dataset
from loratune.data.encode import Document, Encoder
from loratune.data.rows import read_rows
from loratune.data.store import Documents
from loratune.errors import ConfigError, DataError


def key_of(value: int) -> int:
    return int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:8], "big")


def dataset_of(contents: Sequence[int]) -> Dataset:
    documents = [Document(np.array([1, value, 2], np.int32), np.array([False, True, True])) for value in contents]
    sources = [f"rows.jsonl:{i}" for i in range(1, len(contents) + 1)]
    keys = np.array([key_of(value) for value in contents], np.uint64)
    return Dataset(Documents.of(documents), sources, "0" * 64, "text", keys)


def values(dataset: Dataset) -> list[int]:
    return [int(document.input_ids[1]) for document in dataset.documents]


def encoder(max_tokens: int | None = 64, **options: Any) -> Encoder:
    return Encoder(tokenizer_of("gemma"), max_tokens, **options)


def write(file: Path, rows: Iterable[Any]) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def texts(number: int, start: int = 0) -> list[dict[str, str]]:
    return [{"text": f"the answer is {i}"} for i in range(start, start + number)]


def test_load_dataset_knows_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": "the question", "completion": f" answer {i}"}) for i in range(5)]
    file.write_text("\n\n".join(lines))
    dataset = load_dataset(file, encoder())
    assert list(dataset.sources) == [f"{file}:{line}" for line in (1, 3, 5, 7, 9)]
    assert dataset.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (len(dataset), dataset.kind) == (5, "prompt_completion")
    expected = [document for row in read_rows(file) for document in encoder().encode(row)]
    for found, document in zip(dataset.documents, expected, strict=True):
        assert np.array_equal(found.input_ids, document.input_ids) and np.array_equal(found.trained, document.trained)
    assert dataset.lengths.tolist() == [document.num_tokens for document in expected]
    assert dataset.num_tokens == sum(document.num_tokens for document in expected)
    assert dataset.num_labels == sum(document.num_labels for document in expected)


def test_rows_that_cannot_be_trained_on_stop_the_load_or_stand_in_the_ledger(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [*texts(3), "{", {"text": "answer " * 400}, *texts(1, 9), {"text": " "}])
    with pytest.raises(DataError) as stop:
        load_dataset(file, encoder())
    first, second, third, fourth, advice = str(stop.value).splitlines()
    assert first == "3 of 7 rows cannot be trained on:"
    assert second.startswith(f"  {file}:4: not valid JSON")
    assert third.startswith(f"  {file}:5: the row is") and "the limit is 64" in third
    assert fourth.startswith(f"  {file}:7: text is empty")
    assert "--reject" in advice
    dataset = load_dataset(file, encoder(), reject=True)
    assert list(dataset.sources) == [f"{file}:{line}" for line in (1, 2, 3, 6)]
    ledger = dataset.ledger
    assert (ledger.rows_in, ledger.rows_trained, [each.line for each in ledger.rejects]) == (7, 4, [4, 5, 7])


def test_long_rows_are_dropped_or_split_by_choice_and_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [*texts(2), {"text": "answer " * 100}])
    dropped = load_dataset(file, encoder(long="drop"))
    assert len(dropped) == 2
    [reject] = dropped.ledger.rejects
    assert (reject.line, reject.reason.startswith("dropped: the row is")) == (3, True)
    split = load_dataset(file, encoder(long="split"))
    assert split.lengths.max() <= 64 and len(split) > 3 and not split.ledger.rejects
    assert split.ledger.notes["several documents"].examples == [f"{file}:3: {len(split) - 2} documents"]
    write(file, [*texts(1), {"text": "answer " * 100}, "{"])
    with pytest.raises(DataError, match=rf"1 of 3 rows .*\n  {file}:3: not valid JSON"):  # the dropped one is no cause
        load_dataset(file, encoder(long="drop"))


def test_data_without_a_row_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the file has no rows"):
        load_dataset(write(tmp_path / "none.jsonl", []), encoder())
    with pytest.raises(DataError, match=r"none of the 1 rows can be trained on; first: .*:1: the row is"):
        load_dataset(write(tmp_path / "long.jsonl", [{"text": "answer " * 100}]), encoder(), reject=True)


def test_several_sources_are_met_as_often_as_their_weights_say(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", texts(400)), write(tmp_path / "b.jsonl", texts(5, 1000))
    dataset = load_dataset({str(one): 1.5, str(two): 3}, encoder())
    places = list(dataset.sources)
    counts = {place: places.count(place) for place in places}
    assert [counts[f"{two}:{line}"] for line in range(1, 6)] == [3] * 5
    assert {counts[f"{one}:{line}"] for line in range(1, 401)} == {1, 2}
    assert 550 < len(places) - 15 < 650  # 600, give or take 5 standard deviations
    train, held = hold_out(dataset, 0.2)
    assert len(set(held.sources)) == len(held)  # each once
    assert not set(held.sources) & set(train.sources)
    assert dataset.digest != load_dataset({str(one): 2, str(two): 3}, encoder()).digest
    with pytest.raises(ConfigError, match=r"weight 0\.5 leaves rows out"):
        load_dataset({str(one): 0.5}, encoder())


def test_sources_may_be_of_several_kinds(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "the question"}, {"role": "assistant", "content": "answer"}]}
    one, two = write(tmp_path / "a.jsonl", texts(2)), write(tmp_path / "b.jsonl", [chat])
    dataset = load_dataset({str(one): 1, str(two): 1}, encoder())
    assert (dataset.kind, list(dataset.sources)) == ("messages", [f"{one}:1", f"{one}:2", f"{two}:1"])


def test_data_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", texts(3))
    reading = tokenise.Reading([str(file)], None, None)
    write(file, texts(4))
    with pytest.raises(DataError, match="changed while it was read"):
        tokenise.tokenise(reading, encoder(), None)


@given(st.lists(st.integers(0, 400), min_size=2, max_size=300), st.lists(st.integers(0, 400), max_size=100))
@settings(deadline=None)
def test_hold_out_is_a_partition_by_content_and_stable(contents: list[int], more: list[int]) -> None:
    if len(set(contents)) < 2:
        with pytest.raises(DataError, match=r"all [\d,]+ rows are the same|the only row cannot"):
            hold_out(dataset_of(contents))
        return
    train, held = hold_out(dataset_of(contents), fraction=0.2, max_rows=1000)
    assert sorted(values(train) + values(held)) == sorted(contents)
    assert not set(values(train)) & set(values(held))
    assert len(train) and len(held)
    assert values(train) == [value for value in contents if value in set(values(train))]  # in the file's order
    below = {value for value in contents if key_of(value) < 0.2 * 2**64}
    lowest, *_, highest = sorted(set(contents), key=key_of)
    assert set(values(held)) == ((below or {lowest}) - {highest})
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
    assert list(few.sources) == [f"rows.jsonl:{value + 1}" for value in values(few)]


def test_something_is_always_left_to_train_on() -> None:
    train, held = hold_out(dataset_of([1, 2, 2]), fraction=1.0)
    assert {len(train), len(held)} == {1, 2}


def test_the_documents_of_one_row_stay_together(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"text": f"answer {i} " * 40} for i in range(60)])
    train, held = hold_out(load_dataset(file, encoder(long="split")), 0.3)
    assert len(held) > len(set(held.sources)) > 1
    assert not set(held.sources) & set(train.sources)


def test_a_single_row_is_said_to_be_one(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"text": "answer " * 100}])
    dataset = load_dataset(file, encoder(long="split"))
    assert len(dataset) > 1
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the only row cannot be held out"):
        hold_out(dataset)
