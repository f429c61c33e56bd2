"""Tokens in chunks, in memory or memory-mapped: what is larger than memory trains as what is small.

A store on disk is a folder named by its key: chunk-00000, chunk-00001, ..., then `rows` (hash and line of each row)
and, last, `manifest`. Every file is written whole and begins with the digest of what follows. Without the manifest a
store is unfinished, and goes on behind its last whole chunk.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Self, overload

import numpy as np
import numpy.typing as npt

from loratune import files
from loratune.data.encode import Document
from loratune.data.ledger import Ledger

MANIFEST, ROWS = "manifest", "rows"
_DIGEST_BYTES = hashlib.sha256().digest_size

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Chunk:
    """The D documents of `num_rows` rows that follow each other, T tokens in all.

    offsets int64 (D+1,): where each document's tokens begin; rows int64 (D,): the row that each is of, counted from the
    data's first; ids int32 (T,), trained bool (T,); rejects: the rows that gave no document, and why. examples: the
    documents themselves where they are more than tokens (a task's): these are held in memory and never stored.
    """

    num_rows: int
    offsets: Indices
    rows: Indices
    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    rejects: list[tuple[int, str]]
    examples: list[Document] | None = None

    @classmethod
    def of(cls, results: Sequence[list[Document] | str], first_row: int = 0) -> Self:
        """Makes a chunk of what each row gave: its documents, or the reason why none."""
        documents = [document for result in results if not isinstance(result, str) for document in result]
        numbers = [0 if isinstance(result, str) else len(result) for result in results]
        lengths = np.array([document.num_tokens for document in documents], dtype=np.int64)
        return cls(
            num_rows=len(results),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            rows=np.repeat(np.arange(first_row, first_row + len(results)), numbers),
            ids=np.concatenate([np.zeros(0, np.int32), *(document.input_ids for document in documents)]),
            trained=np.concatenate([np.zeros(0, np.bool_), *(document.trained for document in documents)]),
            rejects=[(first_row + i, result) for i, result in enumerate(results) if isinstance(result, str)],
            examples=documents if any(type(document) is not Document for document in documents) else None,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def document(self, index: int) -> Document:
        """Returns a copy of one document, or the example itself."""
        if self.examples is not None:
            return self.examples[index]
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Document(self.ids[span].copy(), self.trained[span].copy())

    @property
    def labels(self) -> Indices:
        """Trained tokens (of examples: losses) of each document, (D,)."""
        if self.examples is not None:
            return np.array([each.num_labels for each in self.examples], dtype=np.int64)
        before = np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])
        return before[self.offsets[1:]] - before[self.offsets[:-1]]

    def to_bytes(self) -> bytes:
        """Returns the digest of what follows, the four sizes, the arrays and the rejects."""
        tail = json.dumps(self.rejects).encode()
        sizes = np.array([self.num_rows, len(self), len(self.ids), len(tail)], dtype="<i8")
        arrays = (sizes, self.offsets.astype("<i8"), self.rows.astype("<i8"), self.ids.astype("<i4"), self.trained)
        content = b"".join([*(array.tobytes() for array in arrays), tail])
        return _seal(content)

    @classmethod
    def from_file(cls, path: Path) -> Self | None:
        """Maps a chunk's file; None where it is missing, cut short or damaged, which its digest shows."""
        if not _is_whole(path):
            return None
        data = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)[_DIGEST_BYTES:]
        num_rows, num_documents, num_tokens, num_tail = data[:32].view("<i8").tolist()
        sizes = [32, 8 * (num_documents + 1), 8 * num_documents, 4 * num_tokens, num_tokens, num_tail]
        _, offsets, rows, ids, trained, tail = np.split(data, np.cumsum(sizes)[:-1])
        rejects = [(row, reason) for row, reason in json.loads(tail.tobytes())]
        return cls(num_rows, offsets.view("<i8"), rows.view("<i8"), ids.view("<i4"), trained.view("?"), rejects)


def _seal(content: bytes) -> bytes:
    return hashlib.sha256(content).digest() + content


def _is_whole(path: Path) -> bool:
    """Whether a file is there and begins with the digest of what follows."""
    if not path.is_file():
        return False
    state = hashlib.sha256()
    with path.open("rb") as file:
        digest = file.read(_DIGEST_BYTES)
        while block := file.read(1 << 20):
            state.update(block)
    return digest == state.digest()


class Documents(Sequence[Document]):
    """The documents of chunks, or a selection of them in an order of its own, made when they are asked for."""

    def __init__(self, chunks: Sequence[Chunk], chosen: Indices | None = None) -> None:
        self._chunks = chunks
        self._starts = np.cumsum([0, *map(len, chunks)]).tolist()
        # In the chunks, counted through.
        self.positions = np.arange(self._starts[-1]) if chosen is None else chosen

    @classmethod
    def of(cls, documents: Sequence[Document]) -> Self:
        """Holds documents that were made elsewhere."""
        return cls([Chunk.of([[document] for document in documents])])

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> "Documents": ...
    def __getitem__(self, index: int | slice) -> "Document | Documents":
        if isinstance(index, slice):
            return Documents(self._chunks, self.positions[index])
        position = int(self.positions[index])
        number = bisect_right(self._starts, position) - 1
        return self._chunks[number].document(position - self._starts[number])

    def select(self, indices: Indices) -> "Documents":
        """Returns the documents at these positions, in this order; one may stand there twice."""
        return Documents(self._chunks, self.positions[indices])

    @cached_property
    def lengths(self) -> Indices:
        """Tokens of each document."""
        return self._of_each([np.diff(chunk.offsets) for chunk in self._chunks])

    @cached_property
    def labels(self) -> Indices:
        """Trained tokens of each document."""
        return self._of_each([chunk.labels for chunk in self._chunks])

    @cached_property
    def rows(self) -> Indices:
        """The row that each document is of, counted from the data's first."""
        return self._of_each([chunk.rows for chunk in self._chunks])

    def first_beyond(self, num_ids: int) -> int | None:
        """Returns the first document that holds an id of `num_ids` or above; None where there is none."""
        if all(chunk.ids.max(initial=0) < num_ids for chunk in self._chunks):
            return None
        return next((i for i, document in enumerate(self) if document.input_ids.max() >= num_ids), None)

    def _of_each(self, parts: list[Indices]) -> Indices:
        return np.concatenate([np.zeros(0, np.int64), *parts])[self.positions]


@dataclass(frozen=True)
class Tokens:
    """Everything that tokenising data gave. sources: for each source of rows its kind and its number of rows."""

    chunks: list[Chunk]
    ledger: Ledger
    sources: list[tuple[str, int]]


def open_store(folder: Path) -> Tokens | None:
    """Opens a finished store, every byte of it checked; None where it is unfinished, damaged or not there."""
    if not (_is_whole(folder / MANIFEST) and _is_whole(folder / ROWS)):
        return None
    manifest = json.loads((folder / MANIFEST).read_bytes()[_DIGEST_BYTES:])
    chunks = list(finished_chunks(folder))
    if len(chunks) != manifest["chunks"]:
        return None
    ledger = Ledger.from_json_lines(manifest["ledger"])
    ledger.remember((folder / ROWS).read_bytes()[_DIGEST_BYTES:], [(first, name) for first, name in manifest["files"]])
    return Tokens(chunks, ledger, [(kind, num_rows) for kind, num_rows in manifest["sources"]])


def finished_chunks(folder: Path) -> Iterator[Chunk]:
    """Yields the chunks that a store has, up to the first that is missing or damaged."""
    for number in count():
        chunk = Chunk.from_file(_path(folder, number))
        if chunk is None:
            return
        yield chunk


def write_chunk(folder: Path, number: int, chunk: Chunk) -> Chunk:
    """Writes a chunk, and returns it mapped from its file, so that its memory is free; OSError for a bad disk."""
    path = _path(folder, number)
    files.atomic_write(path, chunk.to_bytes())
    mapped = Chunk.from_file(path)
    if mapped is None:
        raise OSError(f"{path.name} reads back as other bytes than were written")
    return mapped


def finish(folder: Path, tokens: Tokens) -> None:
    """Writes what belongs to the whole, the manifest last: from then on the store is finished."""
    rows, names = tokens.ledger.memory
    files.atomic_write(folder / ROWS, _seal(rows))
    manifest = {
        "chunks": len(tokens.chunks),
        "files": names,
        "ledger": tokens.ledger.to_json_lines(),
        "sources": tokens.sources,
    }
    files.atomic_write(folder / MANIFEST, _seal(json.dumps(manifest).encode()))


def _path(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:05}"
