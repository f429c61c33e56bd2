"""Reads data files as rows of a canonical kind: every row of a file is a `Row`, or a `Reject` with the reason."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from loratune.data.formats import KINDS
from loratune.data.layouts import Layout, check_names, find_layout
from loratune.data.readers import Hasher
from loratune.data.sources import Record, first_records, read_records
from loratune.data.strict_json import strings as strings
from loratune.errors import ConfigError, DataError
from loratune.files import open_new, remove_directory, staged_directory, sync_directory

_HEAD_ROWS = 64  # rows by which a file's format is found
_REASON_CHARS = 320


@dataclass(frozen=True, slots=True)
class Row:
    """One row: where it stands (`source`:`line`), its canonical kind and its checked value."""

    source: str
    line: int
    kind: str
    value: dict[str, Any]

    @property
    def where(self) -> str:
        """`file:line`, as every message about this row begins."""
        return f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Reject:
    """One row that cannot be trained on: where it stands, and the reason in one line."""

    source: str
    line: int
    reason: str

    @property
    def where(self) -> str:
        """`file:line`, as every message about this row begins."""
        return f"{self.source}:{self.line}"


def iter_rows(
    spec: str | Path,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    hasher: Hasher | None = None,
) -> Iterator[Row | Reject]:
    """Yields every row of a spec (see `sources`) in order, holding one at a time; blank lines are no rows.

    `format` names the format instead of finding it by the keys; `columns` is {column of the format: key in the file},
    and leaves out all other keys. Raises what `detect` raises, at once; bad rows are yielded as `Reject`.
    """
    layout = detect(spec, format, columns)
    return _convert(layout, read_records(spec, hasher))


def read_rows(path: str | Path, format: str | None = None, hasher: Hasher | None = None) -> list[Row]:
    """Reads all rows of a spec; raises DataError `file:line: reason` for the first bad one, and where there is none."""
    rows: list[Row] = []
    for row in iter_rows(path, format, hasher=hasher):
        if isinstance(row, Reject):
            raise DataError(f"{row.where}: {row.reason}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: the file has no rows; expected one JSON object a line.")
    return rows


def detect(spec: str | Path, format: str | None = None, columns: Mapping[str, str] | None = None) -> Layout | None:
    """Finds the format of a spec by the first of its 64 first rows that fits one; None where every row is broken.

    Raises DataError `file:line: reason` where no row fits a format; ConfigError where rows fit several (it lists
    them), for an unknown format or column, and for a file that cannot be opened.
    """
    check_names(format, columns or {})
    misfit: ConfigError | DataError | None = None
    broken: list[str] = []
    for record in islice(first_records(spec), _HEAD_ROWS):
        if isinstance(record.value, DataError):
            broken.append(f"{record.source}:{record.line}: {record.value}")
            continue
        try:
            layout = find_layout(record.value, format, columns)
            layout.check_keys(record.value)
            return layout
        except (ConfigError, DataError) as error:
            misfit = misfit or type(error)(f"{record.source}:{record.line}: {error}")
    if misfit is not None:
        raise misfit
    if len(broken) == _HEAD_ROWS:
        raise DataError(f"{broken[0]} (and so on: none of the first {_HEAD_ROWS} rows can be read.)")
    return None


def write_rows(path: Path, rows: Iterable[Row], format: str | None = None) -> int:
    """Writes rows as JSON Lines, whole or not at all, and returns their number; `format` is the kind to write.

    None leaves each row's kind as it is. Raises DataError for a row that has no such form (see `CONVERSIONS`);
    ConfigError for an unknown kind and where `path` exists or is no .jsonl.
    """
    if format is not None and format not in KINDS:
        raise ConfigError(f"cannot write rows as {format!r}; expected one of {', '.join(KINDS)}.")
    if path.suffix != ".jsonl" or path.exists():
        found = "exists already" if path.exists() else "does not end with .jsonl"
        raise ConfigError(f"cannot write rows to {path}: it {found}. Choose another name.")
    aside, count = path.with_name(f".{path.name}.parts"), 0
    with staged_directory(aside, replace=True) as folder, open_new(folder / path.name) as file:
        for row in rows:
            count += 1
            file.write((json.dumps(_as_kind(row, format), ensure_ascii=False, allow_nan=False) + "\n").encode())
    os.replace(aside / path.name, path)
    sync_directory(path.parent)
    remove_directory(aside)
    return count


def _as_kind(row: Row, kind: str | None) -> dict[str, Any]:
    if kind in (None, row.kind):
        return row.value
    convert = CONVERSIONS.get((row.kind, kind))
    if convert is None:
        raise DataError(f"{row.where}: a {row.kind} row cannot be written as {kind} without a loss.")
    return convert(row.value)


def _convert(layout: Layout | None, records: Iterable[Record]) -> Iterator[Row | Reject]:
    first: Row | None = None
    for source, line, value in records:
        try:
            if isinstance(value, DataError):
                raise value
            assert layout is not None, "a row that detection did not see"
            row = Row(source, line, *layout.convert(value))
            first = first or row
            if row.kind != first.kind:
                raise DataError(f"this row is {row.kind}, but {first.where} is {first.kind}; use one kind a file.")
        except DataError as error:
            yield Reject(source, line, _short(str(error)))
        else:
            yield row


def _short(reason: str) -> str:
    """A reason may quote a key or a role of any length."""
    return reason if len(reason) <= _REASON_CHARS else f"{reason[:_REASON_CHARS]} ..."


def _said(prompt: str, completion: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}


CONVERSIONS: dict[tuple[str, str | None], Callable[[dict[str, Any]], dict[str, Any]]] = {
    ("prompt_completion", "messages"): lambda value: _said(value["prompt"], value["completion"]),
    ("source_target", "messages"): lambda value: _said(value["source"], value["target"]),
    ("source_target", "prompt_completion"): lambda value: {"prompt": value["source"], "completion": value["target"]},
}
