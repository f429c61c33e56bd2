"""From rows to tokens, once: read, tokenised and stored at the same time, and resumed where it was interrupted."""

import gc
import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from loratune import files
from loratune.data import sources, store
from loratune.data.deferred import special_tokens, tokenizer_digest
from loratune.data.encode import Document, Encoder, LongRow
from loratune.data.ledger import Ledger
from loratune.data.rows import Reject, Row, iter_rows
from loratune.data.store import Chunk, Tokens
from loratune.errors import ConfigError, DataError

Notify = Callable[[str], None]
Result = list[Document] | str  # a row's documents, or the reason why it has none

MIN_STORED_BYTES = 1 << 20  # tokenising less takes no longer than a moment
DROPPED = "dropped: "  # begins the reason of a row that the user chose to leave out
# One call of the tokenizer: enough rows for its threads, few enough for flat memory.
_BATCH_ROWS, _BATCH_CHARS, _BATCHES_AHEAD = 256, 1 << 20, 4
_CHUNK_BATCHES, _CHUNK_TOKENS = 64, 4 << 20  # 21 MB of tokens at most but for the last row


class Reading:
    """The rows of several specs, one after the other; counts them, and proves that the data is what its digest says."""

    def __init__(self, specs: list[str], format: str | None, columns: Mapping[str, str] | None) -> None:
        self.specs, self.format, self.columns = specs, format, columns
        self.digests = [sources.digest(spec) for spec in specs]
        self.files = [each for spec in specs for each in sources.resolve(spec).files]
        self.num_bytes = sum(path.stat().st_size for _, path in self.files)
        self.ledger = Ledger()
        self.counts: list[tuple[str, int]] = []  # kind and number of the rows of each spec

    def rows(self) -> Iterator[Row]:
        """Yields every row that could be read; DataError for data that is not what it was."""
        for spec, digest in zip(self.specs, self.digests, strict=True):
            hasher, kind, number = hashlib.sha256(), "", 0
            for row in self.ledger.take(iter_rows(spec, self.format, self.columns, hasher)):
                kind, number = row.kind, number + 1
                yield row
            if hasher.hexdigest() != digest:
                raise DataError(f"{spec} changed while it was read; start again when nothing writes to it.")
            self.counts.append((kind, number))


def stored(reading: Reading, encoder: Encoder, cache: Path, notify: Notify | None) -> Tokens:
    """Opens the tokens of this data in a folder of `cache`, or makes them; ConfigError where they cannot be stored."""
    data = [reading.digests, [name for name, _ in reading.files], reading.format, reading.columns]
    folder = cache / sha256_of([data, _encoder_key(encoder), _code_key()])
    found = store.open_store(folder)
    if found is not None:
        return found
    if notify is not None:
        notify(f"tokenising {', '.join(reading.specs)} once, into {folder}; later starts take seconds")
    try:
        files.make_directory(folder)
        return tokenise(reading, encoder, folder)
    except OSError as error:
        raise ConfigError(
            f"cannot store the tokens in {folder}: {error}. Set LORATUNE_CACHE to a folder with room that can be "
            "written, or `cache: false` under data to hold them in memory."
        ) from error


def tokenise(reading: Reading, encoder: Encoder, folder: Path | None) -> Tokens:
    """Tokenises all rows, in memory or into a folder, where chunks that are there already are not made again."""
    rows, ledger = reading.rows(), reading.ledger
    chunks: list[Chunk] = []
    first_row = 0
    for chunk in store.finished_chunks(folder) if folder else ():
        first_row += sum(1 for _ in islice(rows, chunk.num_rows))
        chunks.append(chunk)
    with _little_garbage():
        for results in _chunks(_batches(rows, encoder)):
            chunk = Chunk.of(results, first_row)
            first_row += chunk.num_rows
            chunks.append(store.write_chunk(folder, len(chunks), chunk) if folder else chunk)
    for chunk in chunks:
        _account(chunk, ledger)
    order = {name: number for number, (name, _) in enumerate(reading.files)}
    ledger.rejects.sort(key=lambda each: (order[each.source], each.line))
    ledger.close()
    tokens = Tokens(chunks, ledger, reading.counts)
    if folder:
        store.finish(folder, tokens)
    return tokens


@contextmanager
def _little_garbage() -> Generator[None]:
    """Keeps Python's collector off what is there already: to walk torch's objects again took an eighth of the time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _batches(rows: Iterator[Row], encoder: Encoder) -> Iterator[list[Result]]:
    """Yields what came of each batch: while one is tokenised, the next is rendered and the one after it read."""
    with ThreadPoolExecutor(1) as renderer, ThreadPoolExecutor(1) as tokenizer:
        begun: deque[Future[list[Result]]] = deque()
        while batch := _take(rows):
            prepared = renderer.submit(encoder.prepare, batch)
            begun.append(tokenizer.submit(_encode, batch, prepared, encoder))
            if len(begun) == _BATCHES_AHEAD:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def _take(rows: Iterator[Row]) -> list[Row]:
    batch: list[Row] = []
    size = 0
    while len(batch) < _BATCH_ROWS and size < _BATCH_CHARS and (row := next(rows, None)) is not None:
        batch.append(row)
        size += sum(len(value if isinstance(value, str) else str(value)) for value in row.value.values())
    return batch


def _encode(batch: list[Row], prepared: Future[Any], encoder: Encoder) -> list[Result]:
    results = encoder.finish(batch, prepared.result())
    return [
        _reason(row, result, encoder) if isinstance(result, DataError) else result
        for row, result in zip(batch, results, strict=True)
    ]


def _reason(row: Row, error: DataError, encoder: Encoder) -> str:
    chosen = DROPPED if isinstance(error, LongRow) and encoder.long == "drop" else ""
    return chosen + str(error).removeprefix(f"{row.where}: ")


def _chunks(batches: Iterator[list[Result]]) -> Iterator[list[Result]]:
    results: list[Result] = []
    num_batches = num_tokens = 0
    for batch in batches:
        results += batch
        num_batches += 1
        num_tokens += sum(each.num_tokens for result in batch if not isinstance(result, str) for each in result)
        if num_batches == _CHUNK_BATCHES or num_tokens >= _CHUNK_TOKENS:
            yield results
            results, num_batches, num_tokens = [], 0, 0
    if results:
        yield results


def _account(chunk: Chunk, ledger: Ledger) -> None:
    for row, reason in chunk.rejects:
        ledger.rejects.append(Reject(*ledger.place(row), reason))
    ledger.train(chunk.num_rows - len(chunk.rejects))
    rows, counts = np.unique(chunk.rows, return_counts=True)
    for row, number in zip(rows[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        ledger.note("several documents", ledger.where(row), f"{number} documents")


def _encoder_key(encoder: Encoder) -> list[Any]:
    """Returns everything of an encoder that decides which tokens a row becomes."""
    options = [encoder.max_tokens, encoder.num_ids, encoder.train_on, encoder.long, encoder.now.isoformat()]
    return [tokenizer_digest(encoder.tokenizer), special_tokens(encoder.tokenizer), *options]


def _code_key() -> list[str]:
    """Returns what decides the same in code: this package's own sources, and the versions of what they call."""
    own = [files.digest(path) for path in sorted(Path(__file__).parent.glob("*.py"))]
    return [*own, *map(version, ("loratune", "tokenizers", "transformers", "jinja2"))]


def sha256_of(value: Any) -> str:
    """Returns the sha256, in hexadecimal, of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=dict).encode()).hexdigest()
