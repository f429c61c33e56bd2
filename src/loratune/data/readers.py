"""The file types: each reader yields (line, row or DataError) and never holds more than one row, chunk or batch.

`line` is the line where a row starts in JSON Lines, CSV and TSV, and the number of the row in the others.
What no reader can step over (a cut gzip, broken JSON inside an array) is one last DataError.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from loratune.data import arrow_files
from loratune.data.json_array import BLOCK_BYTES, read_array
from loratune.data.strict_json import MAX_ROW_BYTES, TOO_LONG, not_utf8, parse_object
from loratune.errors import ConfigError, DataError

_BOM = b"\xef\xbb\xbf"
_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)

Read = tuple[int, dict[str, Any] | DataError]


class Hasher(Protocol):
    """What `hashlib.sha256()` returns: takes the bytes of a file as they are read."""

    def update(self, data: bytes, /) -> None: ...


class _Tee(io.RawIOBase):
    """A file that shows every byte it gives to a hasher."""

    def __init__(self, file: io.FileIO, hasher: Hasher) -> None:
        self._file, self._hasher = file, hasher

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._file.readinto(buffer)
        self._hasher.update(buffer[:count])
        return count


def read_file(path: Path, hasher: Hasher | None = None) -> Iterator[Read]:
    """Yields the rows of one file; `hasher` receives all its bytes, in order, by the time the last row is read.

    Raises ConfigError for a file that cannot be opened or whose name tells no file type.
    """
    kind = file_kind(path)
    if kind is None:
        raise ConfigError(
            f"{path}: the name does not say what kind of file it is; expected it to end with {', '.join(KINDS)}, "
            "or with .gz after one of the text kinds."
        )
    try:
        if kind in _TEXT:
            yield from _read_text(path, _TEXT[kind], hasher)
        else:
            if hasher is not None:
                feed(path, hasher)
            yield from arrow_files.read_arrow(path)
    except OSError as error:
        raise ConfigError(f"cannot read the data file {path}: {error.strerror or error}. Check the path.") from error


def file_kind(path: Path) -> str | None:
    """Returns the ending that says a file's type, without .gz; None where it says none."""
    if path.suffix == ".gz":
        return path.with_suffix("").suffix if path.with_suffix("").suffix in _TEXT else None
    return path.suffix if path.suffix in KINDS else None


def feed(path: Path, hasher: Hasher) -> None:
    """Gives a file's bytes to a hasher, the same that `read_file` gives; OSError where it cannot be read."""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            hasher.update(block)


def _read_text(path: Path, reader: "_Reader", hasher: Hasher | None) -> Iterator[Read]:
    with path.open("rb", buffering=0) as file:
        raw: Any = file if hasher is None else _Tee(file, hasher)
        stored = cast(io.BufferedReader, io.BufferedReader(raw, BLOCK_BYTES))
        # No buffer around GzipFile, which has one: it would lose what stands before the cut of a file.
        plain = cast(io.BufferedReader, gzip.GzipFile(fileobj=stored)) if path.suffix == ".gz" else stored
        yield from reader(plain)
        while hasher is not None and stored.read(BLOCK_BYTES):
            pass  # what follows a damaged place belongs to the digest all the same


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | DataError]]:
    """Yields numbered lines, which end at a line feed only; a damaged compressed file ends in a DataError."""
    number = 0
    try:
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(BLOCK_BYTES)
                yield number, DataError(TOO_LONG)
            else:
                yield number, line.removeprefix(_BOM) if number == 1 else line
    except _DAMAGE as error:
        yield number + 1, _damaged(error)


def _damaged(error: Exception) -> DataError:
    return DataError(f"from here on the compressed file cannot be read: {arrow_files.spoken(error)}. Copy it again.")


def _json_lines(file: BinaryIO) -> Iterator[Read]:
    for number, line in _lines(file):
        if isinstance(line, DataError):
            yield number, line
        elif line and not line.isspace():
            try:
                row = parse_object(line)
            except DataError as error:
                yield number, error
            else:
                yield number, row


def _json(file: io.BufferedReader) -> Iterator[Read]:
    """A .json file holds one array of rows, or is JSON Lines by another name."""
    number = 0
    try:
        array = file.peek(BLOCK_BYTES).removeprefix(_BOM).lstrip()[:1] == b"["
        for number, row in read_array(file) if array else _json_lines(file):
            yield number, row
    except _DAMAGE as error:
        yield number + 1, _damaged(error)


class _CsvLines:
    """Feeds `csv.reader`, which calls for one more line while a quoted field is open."""

    def __init__(self, file: BinaryIO) -> None:
        self._lines = _lines(file)
        self.number = self.start = self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        self.start = self.start or self.number
        if isinstance(line, DataError):
            raise line
        self.num_bytes += len(line)
        if self.num_bytes > MAX_ROW_BYTES:
            raise DataError(TOO_LONG)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise DataError(not_utf8(line, error.start)) from error


def _delimited(file: BinaryIO, delimiter: str) -> Iterator[Read]:
    rows = _cells(file, delimiter)
    line, header = next(rows, (0, DataError("")))
    if not line:
        return
    try:
        names = _header(header)
    except DataError as error:
        yield line, DataError(f"the header cannot be read, so no row can: {error}")
        return
    for line, cells in rows:
        yield line, cells if isinstance(cells, DataError) else _named(names, cells)


def _cells(file: BinaryIO, delimiter: str) -> Iterator[tuple[int, list[str] | DataError]]:
    csv.field_size_limit(MAX_ROW_BYTES)  # its default, 128 KiB, is shorter than a long document
    lines = _CsvLines(file)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.start = lines.num_bytes = 0
        try:
            if cells := next(reader):
                yield lines.start, cells
        except StopIteration:
            return
        except DataError as error:
            yield lines.start, error
        except csv.Error as error:
            span = "" if lines.number == lines.start else f" (the row goes on to line {lines.number})"
            yield lines.start, DataError(f'not valid CSV: {error}{span}; a quote inside a quoted cell is written "".')


def _header(cells: list[str] | DataError) -> list[str]:
    if isinstance(cells, DataError):
        raise cells
    if twice := [name for number, name in enumerate(cells) if name in cells[:number]]:
        raise DataError(f"the column {twice[0]!r} stands twice; rename one of the two.")
    if len(cells) == 1 and (other := next((mark for mark in ";\t|," if mark in cells[0]), None)):
        raise DataError(
            f"it is one column, {cells[0][:40]!r}; separate columns by ',' (.csv) or tabs (.tsv), not {other!r}."
        )
    return cells


def _named(names: list[str], cells: list[str]) -> dict[str, Any] | DataError:
    if len(cells) != len(names):
        return DataError(f"the row has {len(cells)} cells, the header {len(names)}; quote cells that hold a separator.")
    return dict(zip(names, cells))


def _csv(file: io.BufferedReader) -> Iterator[Read]:
    return _delimited(file, ",")


def _tsv(file: io.BufferedReader) -> Iterator[Read]:
    return _delimited(file, "\t")


_Reader = Callable[[io.BufferedReader], Iterator[Read]]
_TEXT: dict[str, _Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
}
KINDS = (*_TEXT, *arrow_files.KINDS)
