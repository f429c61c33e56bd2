"""A data file as documents, and the rows held out of it for evaluation."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from loratune.data.encode import Document, Encoder
from loratune.data.rows import read_rows
from loratune.errors import DataError


@dataclass(frozen=True, eq=False)
class Dataset:
    """The documents of a file, in its order.

    `sources` says `file:line` of each, `digest` is the sha256 of the file's bytes as they were read, `kind` its format.
    """

    documents: list[Document]
    sources: list[str]
    digest: str
    kind: str

    def __len__(self) -> int:
        return len(self.documents)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [document.num_tokens for document in self.documents]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def num_labels(self) -> int:
        """Trained tokens of all documents."""
        return sum(document.num_labels for document in self.documents)


def load_dataset(path: str | Path, encoder: Encoder, format: str | None = None) -> Dataset:
    """Reads and encodes a whole file before anything is trained or written.

    Raises DataError `file:line: reason` for the first row that cannot be trained on as it is, and for an empty file;
    ConfigError for a file that cannot be opened.
    """
    hasher = hashlib.sha256()
    rows = read_rows(path, format, hasher)
    documents = [encoder.encode(row) for row in rows]
    return Dataset(documents, [row.where for row in rows], hasher.hexdigest(), rows[0].kind)


def hold_out(dataset: Dataset, fraction: float = 0.05, max_rows: int = 500) -> tuple[Dataset, Dataset]:
    """Splits a dataset into (training, held out) by a hash of each document's token ids.

    A document is held out where its hash, as a fraction of 2^64, lies below `fraction`: identical rows stay on one
    side, and rows added later move no other row (unless `max_rows` is reached: then the lowest hashes stay). A set too
    small for that holds out the rows of its lowest hash. Raises DataError with fewer than two different rows.
    """
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for index, document in enumerate(dataset.documents):
        groups[_content_hash(document)].append(index)
    if len(groups) < 2:
        raise DataError(
            f"{dataset.sources[0]}: all {len(dataset)} rows are the same, so none can be held out for evaluation; "
            "add rows or give a validation file."
        )
    held: list[int] = []
    lowest_first = sorted(groups)
    for key in lowest_first[:-1]:
        if held and (key >= fraction * 2**64 or len(held) + len(groups[key]) > max_rows):
            break
        held += groups[key]
    kept = set(range(len(dataset))).difference(held)
    return _select(dataset, sorted(kept)), _select(dataset, sorted(held))


def _select(dataset: Dataset, indices: list[int]) -> Dataset:
    documents = [dataset.documents[index] for index in indices]
    return replace(dataset, documents=documents, sources=[dataset.sources[index] for index in indices])


def _content_hash(document: Document) -> int:
    ids = document.input_ids.astype("<i4").tobytes()
    return int.from_bytes(hashlib.sha256(ids).digest()[:8], "big")
