"""Parquet and Arrow files, a batch of rows at a time; numbers of labels that a file names are given as their names."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from loratune.data.strict_json import MAX_ROW_BYTES, TOO_LONG, parse_value
from loratune.errors import ConfigError, DataError

_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20


def read_arrow(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Yields the numbered rows of a Parquet or Arrow file; what cannot be read from some row on is one last DataError.

    Raises ConfigError for a file that is not of its kind, and for a column name that stands twice.
    """
    from pyarrow import ArrowException

    try:
        schema, batches = KINDS[path.suffix](path)
        names: list[str] = schema.names
        labels = _class_labels(schema.metadata)
    except (ArrowException, ValueError, DataError) as error:  # names of columns may not be UTF-8
        raise ConfigError(f"cannot read {path} as a {path.suffix} file: {spoken(error)}.") from error
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{path}: the column {min(twice)!r} stands twice; rename one of the two.")
    number = 0
    try:
        for batch in batches:
            for row in _batch_rows(batch):
                number += 1
                yield number, row if isinstance(row, DataError) or not labels else _named(row, labels)
    except (ArrowException, OSError, ValueError) as error:
        yield number + 1, DataError(f"from here on the file cannot be read: {spoken(error)}.")


def _class_labels(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Returns the names of the numbers in columns of labels, as the `datasets` library writes them into a schema."""
    stored = (metadata or {}).get(b"huggingface")
    features = _under(parse_value(stored.decode()) if stored else None, "info", "features")
    found: dict[str, list[str]] = {}
    for column, feature in features.items() if isinstance(features, dict) else ():
        while (inner := _under(feature, "feature")) is not None:  # a list's
            feature = inner
        if _under(feature, "_type") == "ClassLabel" and isinstance(names := _under(feature, "names"), list):
            found[column] = [str(name) for name in names]
    return found


def _under(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _named(row: dict[str, Any], labels: Mapping[str, list[str]]) -> dict[str, Any]:
    return {column: _name(value, labels[column]) if column in labels else value for column, value in row.items()}


def _name(value: Any, names: list[str]) -> Any:
    """Returns the names of numbers; of -1, which stands for no label, and others without a name, the number."""
    if isinstance(value, list):
        return [_name(each, names) for each in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def spoken(error: Exception) -> str:
    """Returns the first line of another library's message, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | DataError]:
    """A value that Python cannot hold (bytes that are not UTF-8, a date beyond the year 9999) spoils its row only."""
    rows = (_one_row(batch.slice(index, 1)) for index in range(batch.num_rows))
    if batch.nbytes <= MAX_ROW_BYTES:
        with suppress(ValueError, OverflowError):
            rows = batch.to_pylist()
    for row in rows:
        yield row if isinstance(row, DataError) else {name: _present(value) for name, value in row.items()}


def _one_row(batch: Any) -> dict[str, Any] | DataError:
    if batch.nbytes > MAX_ROW_BYTES:
        return DataError(TOO_LONG)
    try:
        return batch.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return DataError(f"a value of the row cannot be read: {spoken(error)}.")


def _present(value: Any) -> Any:
    """Arrow gives every struct the fields of all; a field that is null was not there."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in cast(dict[str, Any], value).items() if item is not None}
    if isinstance(value, list):
        return [_present(item) for item in cast(list[Any], value)]
    return value


def _parquet(path: Path) -> tuple[Any, Iterator[Any]]:
    from pyarrow import parquet

    # A buffer size makes it read page by page; a whole row group may be larger than memory.
    file = parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    return file.schema_arrow, file.iter_batches(_BATCH_ROWS)


def _arrow(path: Path) -> tuple[Any, Iterator[Any]]:
    """Arrow's file format, or its stream format, which the `datasets` library writes."""
    import pyarrow
    from pyarrow import ipc

    source = pyarrow.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        file = ipc.open_file(source)
        batches = (file.get_batch(index) for index in range(file.num_record_batches))
        return file.schema, _sliced(batches)
    source.seek(0)
    stream = ipc.open_stream(source)
    return stream.schema, _sliced(stream)


def _sliced(batches: Any) -> Iterator[Any]:
    for batch in batches:
        batch.validate(full=True)  # offsets that point outside the file would be read as they are
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield batch.slice(start, _BATCH_ROWS)


KINDS: dict[str, Callable[[Path], tuple[Any, Iterator[Any]]]] = {".parquet": _parquet, ".arrow": _arrow}
