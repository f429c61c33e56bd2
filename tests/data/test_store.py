"""Tokens on disk are the tokens in memory, made once; an interruption or a damaged file costs what it lost, no more."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizer import tokenizer_of

from loratune.data import store, tokenise
from loratune.data.dataset import Dataset, load_dataset
from loratune.data.encode import Document, Encoder
from loratune.data.rows import Row
from loratune.data.store import Chunk, Documents
from loratune.errors import ConfigError, DataError

ROWS_OF_A_CHUNK = 32


class Counting(Encoder):
    """An encoder that counts its rows, and stops as a killed process does once it has seen `limit`."""

    def __init__(self, limit: int | None = None, **options: Any) -> None:
        super().__init__(tokenizer_of("gemma"), 64, **options)
        self.rows, self.limit = 0, limit

    def finish(self, rows: Sequence[Row], prepared: Any) -> list[list[Document] | DataError]:
        if self.limit is not None and self.rows + len(rows) > self.limit:
            raise KeyboardInterrupt
        self.rows += len(rows)
        return super().finish(rows, prepared)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is stored, in chunks of 32 rows, 8 at a time."""
    monkeypatch.setattr(tokenise, "MIN_STORED_BYTES", 0)
    monkeypatch.setattr("loratune.data.dataset.MIN_STORED_BYTES", 0)
    monkeypatch.setattr(tokenise, "_BATCH_ROWS", 8)
    monkeypatch.setattr(tokenise, "_CHUNK_BATCHES", ROWS_OF_A_CHUNK // 8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """200 rows; one is no JSON, one too long, one stands there twice."""
    lines = [json.dumps({"text": f"the answer is {i} {'a b ' * (i % 7)}"}) for i in range(200)]
    lines[40], lines[90], lines[150] = "{", json.dumps({"text": "answer " * 300}), lines[149]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def load(file: Path, cache: Path | None, encoder: Encoder, **options: Any) -> Dataset:
    return load_dataset(file, encoder, reject=True, cache=cache, **options)


def contents(dataset: Dataset) -> Any:
    """Everything that a dataset says, as plain values."""
    documents = [(document.input_ids.tolist(), document.trained.tolist()) for document in dataset.documents]
    facts = (dataset.digest, dataset.kind, dataset.keys.tolist(), dataset.ledger.to_json_lines())
    return documents, list(dataset.sources), dataset.lengths.tolist(), dataset.num_labels, facts


def folder_of(cache: Path) -> Path:
    [folder] = cache.iterdir()
    return folder


def test_a_store_says_what_memory_says_and_is_made_once(tmp_path: Path, file: Path) -> None:
    in_memory, told = contents(load(file, None, Counting())), list[str]()
    first, second = Counting(), Counting()
    assert contents(load(file, tmp_path / "cache", first, notify=told.append)) == in_memory
    assert first.rows == 199 and [message.split(" once")[0] for message in told] == [f"tokenising {file}"]
    names = sorted(path.name for path in folder_of(tmp_path / "cache").iterdir())
    assert names == [*(f"chunk-{number:05}" for number in range(7)), "manifest", "rows"]
    assert contents(load(file, tmp_path / "cache", second, notify=told.append)) == in_memory
    assert second.rows == 0 and len(told) == 1


def test_ledgers_of_stores_know_their_rows(tmp_path: Path, file: Path) -> None:
    other = tmp_path / "validation.jsonl"
    other.write_text(file.read_text().splitlines()[7] + "\n")
    load(file, tmp_path / "cache", Counting())
    training, validation = load(file, tmp_path / "cache", Counting()), load(other, None, Counting())
    validation.ledger.note_overlap(training.ledger)
    assert validation.ledger.notes["overlap"].examples == [f"{other}:1: also at {file}:8"]
    assert training.ledger.notes["duplicates"].examples == [f"{file}:151: the same as {file}:150"]


@pytest.mark.parametrize("limit", [0, 8, 100, 190])
def test_an_interrupted_store_goes_on_behind_its_last_whole_chunk(tmp_path: Path, file: Path, limit: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        load(file, tmp_path / "cache", Counting(limit))
    rest = Counting()
    found = contents(load(file, tmp_path / "cache", rest))
    assert found == contents(load(file, None, Counting()))
    # What is written runs up to two batches behind what is encoded.
    assert rest.rows <= 199 - (limit - limit % 8 - 16) // ROWS_OF_A_CHUNK * ROWS_OF_A_CHUNK
    assert limit < 100 or rest.rows < 199
    assert contents(load(file, tmp_path / "cache", Counting(0))) == found  # now it is finished


def damage_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [damage_middle, cut_short, empty, Path.unlink])
@pytest.mark.parametrize("name", ["chunk-00000", "chunk-00004", "rows", "manifest"])
def test_a_damaged_file_is_made_again(tmp_path: Path, file: Path, name: str, harm: Any) -> None:
    expected = contents(load(file, tmp_path / "cache", Counting()))
    harm(folder_of(tmp_path / "cache") / name)
    again = Counting()
    assert contents(load(file, tmp_path / "cache", again)) == expected
    assert (again.rows > 0) == name.startswith("chunk")
    assert contents(load(file, tmp_path / "cache", Counting(0))) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_text(file.read_text() + json.dumps({"text": "one more"}) + "\n") and {},
        lambda file: {"train_on": "all"},
        lambda file: {"long": "drop"},
        lambda file: {"columns": {"text": "text"}},
        lambda file: {"format": "text"},
    ],
)
def test_what_decides_the_tokens_decides_the_store(tmp_path: Path, file: Path, change: Any) -> None:
    load(file, tmp_path / "cache", Counting())
    options = change(file)
    of_encoder = {name: options.pop(name) for name in ("train_on", "long") if name in options}
    again = Counting(**of_encoder)
    load(file, tmp_path / "cache", again, **options)
    assert again.rows >= 199 and len(list((tmp_path / "cache").iterdir())) == 2


def test_tokenizer_and_template_decide_the_store(tmp_path: Path, file: Path) -> None:
    keys = {json.dumps(tokenise._encoder_key(Encoder(tokenizer_of(name), None))) for name in ("gemma", "llama3")}
    tokenizer = tokenizer_of("gemma")
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template + " "
        keys.add(json.dumps(tokenise._encoder_key(Encoder(tokenizer, None))))
    finally:
        tokenizer.chat_template = template
    assert len(keys) == 3


def test_a_cache_that_cannot_be_written_is_said(file: Path) -> None:
    with pytest.raises(ConfigError, match="cannot create the directory"):
        load(file, file / "cache", Counting())


def test_a_full_disk_is_said(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.files, "atomic_write", full)
    with pytest.raises(ConfigError, match=r"cannot store the tokens in .*No space left.*`cache: false`"):
        load(file, tmp_path / "cache", Counting())


arrays = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20)
rows_of_documents = st.lists(st.lists(arrays, max_size=3) | st.text(max_size=10), max_size=12)


@given(st.lists(rows_of_documents, max_size=4), st.data())
@settings(deadline=None)
def test_documents_come_back_as_they_went_in(tmp_path_factory: Any, parts: list[Any], data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("chunks")
    chunks, expected, owners, row = list[Chunk](), list[Document](), list[int](), 0
    for number, part in enumerate(parts):
        made = [
            each
            if isinstance(each, str)
            else [Document(np.array(ids, np.int32), np.array(ids, np.int32) % 2 == 1) for ids in each]
            for each in part
        ]
        chunks.append(store.write_chunk(folder, number, Chunk.of(made, row)))
        expected += [document for each in made if not isinstance(each, str) for document in each]
        owners += [row + i for i, each in enumerate(made) if not isinstance(each, str) for _ in each]
        assert chunks[-1].rejects == [(row + i, each) for i, each in enumerate(made) if isinstance(each, str)]
        row += len(part)
    chosen = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=10)) if expected else []
    whole = Documents(chunks)
    for documents, indices in ((whole, range(len(expected))), (whole.select(np.array(chosen, np.int64)), chosen)):
        wanted = [expected[i] for i in indices]
        assert [document.input_ids.tolist() for document in documents] == [d.input_ids.tolist() for d in wanted]
        assert [document.trained.tolist() for document in documents] == [d.trained.tolist() for d in wanted]
        assert documents.lengths.tolist() == [d.num_tokens for d in wanted]
        assert documents.labels.tolist() == [d.num_labels for d in wanted]
        assert documents.rows.tolist() == [owners[i] for i in indices]
        for limit in (1, 2**15, 2**31 - 1):
            beyond = [i for i, d in enumerate(wanted) if d.input_ids.max() >= limit]
            assert documents.first_beyond(limit) == (beyond[0] if beyond else None)


def test_a_document_may_be_written_to() -> None:
    documents = Documents.of([Document(np.array([1, 2], np.int32), np.array([False, True]))])
    documents[0].input_ids[0] = 7
    assert documents[0].input_ids.tolist() == [1, 2]
    assert [each.num_tokens for each in documents[-1:]] == [2] and documents[-1].num_labels == 1
    with pytest.raises(IndexError):
        documents[1]
