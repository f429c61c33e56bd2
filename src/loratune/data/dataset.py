"""Data files as documents, every row accounted for; and the rows held out of them for evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
import numpy.typing as npt

from loratune.data.encode import Encoder
from loratune.data.ledger import Ledger
from loratune.data.store import Documents, Indices, Tokens
from loratune.data.tokenise import DROPPED, MIN_STORED_BYTES, Notify, Reading, sha256_of, stored, tokenise
from loratune.errors import ConfigError, DataError

Spec = str | Path
Weighted = Mapping[str, float]  # how often an epoch meets the rows of each spec

_T = TypeVar("_T")


class Chosen(Sequence[_T]):
    """Some items of a sequence, in an order of its own, looked up when they are asked for."""

    def __init__(self, items: Sequence[_T], indices: Indices) -> None:
        self._items, self._indices = items, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> "Chosen[_T]": ...
    def __getitem__(self, index: int | slice) -> "_T | Chosen[_T]":
        if isinstance(index, slice):
            return Chosen(self._items, self._indices[index])
        return self._items[int(self._indices[index])]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Documents in the order of their rows.

    `sources` says `file:line` of each, `keys` is the hash of its row's content (D,), `digest` the sha256 of the data as
    it was read, `kind` what the rows are ("messages" where they are of several kinds, chats among them). The ledger
    counts the rows of all the data, also where this is a part of it.
    """

    documents: Documents
    sources: Sequence[str]
    digest: str
    kind: str
    keys: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    ledger: Ledger = field(default_factory=Ledger)

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def lengths(self) -> Indices:
        """Tokens of each document, int64 (D,)."""
        return self.documents.lengths

    @cached_property
    def num_tokens(self) -> int:
        return int(self.documents.lengths.sum())

    @cached_property
    def num_labels(self) -> int:
        """Trained tokens of all documents."""
        return int(self.documents.labels.sum())

    def select(self, indices: Indices) -> "Dataset":
        """Returns the documents at these positions, in this order."""
        documents, places = self.documents.select(indices), Chosen(self.sources, indices)
        return replace(self, documents=documents, sources=places, keys=self.keys[indices])


def load_dataset(
    spec: Spec | Weighted,
    encoder: Encoder,
    format: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    reject: bool = False,
    cache: Path | None = None,
    notify: Notify | None = None,
) -> Dataset:
    """Reads and tokenises data before anything is trained; what is over 1 MB once, into a folder of `cache`, if given.

    `spec` is one (see `sources`), or {spec: weight}: with the weight 2.5 an epoch meets each row of a spec twice, and
    half of them, chosen by content, once more. Raises DataError for data without rows, for rows that cannot be trained
    on (all of them counted; with `reject` they are left out and stand in the ledger) and for data that changes while
    it is read; ConfigError for what cannot be opened or stored and as `rows.detect` does.
    """
    weights = spec if isinstance(spec, Mapping) else {spec: 1.0}
    reading = Reading([str(each) for each in weights], format, columns)
    if cache is not None and reading.num_bytes >= MIN_STORED_BYTES:
        tokens = stored(reading, encoder, cache, notify)
    else:
        tokens = tokenise(reading, encoder, None)
    _check(tokens.ledger, reject, ", ".join(reading.specs))
    documents = Documents(tokens.chunks)
    kinds = [kind for kind, num_rows in tokens.sources if num_rows]
    whole = Dataset(
        documents=documents,
        sources=Chosen(_Places(tokens.ledger), documents.rows),
        digest=sha256_of([reading.digests, weights]) if isinstance(spec, Mapping) else reading.digests[0],
        kind="messages" if "messages" in kinds else kinds[0],
        keys=tokens.ledger.hashes[documents.rows],
        ledger=tokens.ledger,
    )
    copies = _copies(whole, tokens, list(weights.values()))
    return whole if (copies == 1).all() else whole.select(np.repeat(np.arange(len(whole)), copies))


def _copies(whole: Dataset, tokens: Tokens, weights: list[float]) -> Indices:
    """Returns how often an epoch meets each document; the part of a weight behind the point is a share of the rows."""
    if low := [weight for weight in weights if weight < 1]:
        raise ConfigError(f"the weight {low[0]} leaves rows out; expected at least 1. For fewer rows take FILE#500.")
    ends = np.cumsum([num_rows for _, num_rows in tokens.sources])
    weight = np.array(weights)[np.searchsorted(ends, whole.documents.rows, side="right")]
    again = (whole.keys * np.uint64(0x9E3779B97F4A7C15)) / 2**64 < weight % 1  # other rows than `hold_out` takes
    return np.floor(weight).astype(np.int64) + again


class _Places(Sequence[str]):
    """`file:line` of every row of a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __len__(self) -> int:
        return len(self._ledger.hashes)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._ledger.where(each) for each in range(len(self))[index]]
        return self._ledger.where(index)


def _check(ledger: Ledger, reject: bool, name: str) -> None:
    """Stops before anything is trained where rows were rejected that the user did not choose to leave out."""
    if not ledger.rows_in:
        raise DataError(f"{name}: the file has no rows; expected one JSON object a line.")
    if not ledger.rows_trained:
        first = ledger.rejects[0]
        raise DataError(f"none of the {ledger.rows_in:,} rows can be trained on; first: {first.where}: {first.reason}")
    stopping = [each for each in ledger.rejects if not each.reason.startswith(DROPPED)]
    if stopping and not reject:
        shown = Ledger()
        shown.rows_in, shown.rejects = ledger.rows_in, stopping
        raise DataError(shown.message())


def hold_out(dataset: Dataset, fraction: float = 0.05, max_rows: int = 500) -> tuple[Dataset, Dataset]:
    """Splits a dataset into (training, held out) by a hash of each row's content.

    A document is held out where its row's hash, as a fraction of 2^64, lies below `fraction`: identical rows and the
    documents of one row stay on one side, and rows added later move no other row (unless `max_rows` documents are
    reached: then the lowest hashes stay). A set too small for that holds out the rows of its lowest hash; a document
    that an epoch meets twice is held out once. Raises DataError with fewer than two different rows.
    """
    lowest_first, counts = np.unique(dataset.keys, return_counts=True)
    if len(lowest_first) < 2:
        rows = len(np.unique(dataset.documents.rows))
        what = "the only row cannot" if rows == 1 else f"all {rows:,} rows are the same, so none can"
        raise DataError(f"{dataset.sources[0]}: {what} be held out for evaluation; add rows or give a validation file.")
    number = int(np.searchsorted(lowest_first, np.uint64(min(fraction * 2**64, 2**64 - 1))))
    number = min(number, int(np.searchsorted(np.cumsum(counts), max_rows, side="right")), len(lowest_first) - 1)
    is_held = np.isin(dataset.keys, lowest_first[: max(1, number)])
    held = np.flatnonzero(is_held)
    _, first = np.unique(dataset.documents.positions[held], return_index=True)
    return dataset.select(np.flatnonzero(~is_held)), dataset.select(held[np.sort(first)])
