"""Writes the rows of a spec to new files: as another kind, or split; whole or not at all, every row accounted for."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from datetime import date, time
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from loratune.data.ledger import Ledger
from loratune.data.rows import Reject, Row, iter_rows, write_rows
from loratune.data.sources import Record, read_records
from loratune.data.splits import split
from loratune.errors import DataError
from loratune.files import open_new, safe_name, staged_directory

_BATCH_ROWS = 1024


def convert(
    spec: str | Path,
    target: Path,
    kind: str | None,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    reject: bool = False,
) -> Ledger:
    """Writes a spec as JSON Lines of one canonical kind (None: the one it has), and returns the ledger.

    Raises what `iter_rows` and `write_rows` raise, and DataError where rows are rejected and `reject` is not given.
    """
    ledger = Ledger()
    write_rows(target, _sound(iter_rows(spec, format, columns), ledger, reject), kind)
    return ledger


def write_splits(
    spec: str | Path,
    folder: Path,
    shares: Mapping[str, float],
    *,
    seed: int = 0,
    group: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    reject: bool = False,
) -> tuple[dict[str, int], Ledger]:
    """Writes FOLDER/NAME.jsonl for each share, rows as they stand in the source; returns their numbers and the ledger.

    A row's side is that of `splits.split`: by its checked value, or by its key `group`. Raises ConfigError for names,
    shares and folders that cannot be used; DataError where rows are rejected and `reject` is not given, where a row
    lacks the group, and where a split would be empty.
    """
    ledger, counts = Ledger(), {safe_name(name, "the split"): 0 for name in shares}
    pairs = _with_records(spec, _sound(iter_rows(spec, format, columns), ledger, reject))
    with staged_directory(folder) as staging, ExitStack() as stack:
        files = {name: stack.enter_context(open_new(staging / f"{name}.jsonl")) for name in shares}
        while batch := list(islice(pairs, _BATCH_ROWS)):
            names = split([record if group else row for row, record in batch], shares, seed, group)
            for name, (_, record) in zip(names, batch, strict=True):
                counts[name] += 1
                files[name].write(_line(record))
        _check_filled(spec, counts, shares)
    return counts, ledger


def _sound(items: Iterable[Row | Reject], ledger: Ledger, reject: bool) -> Iterator[Row]:
    for row in ledger.take(items):
        ledger.train()
        yield row
    if ledger.rejects and not reject:
        found = ledger.message().rpartition("\n")[0]  # its last line is for a run
        raise DataError(f"{found}\nNothing was written. Mend or remove them, or leave them out with --reject.")
    if not ledger.rows_trained:
        raise DataError(f"none of the {ledger.rows_in:,} rows can be used, so nothing was written.")
    ledger.close()


def _with_records(spec: str | Path, rows: Iterable[Row]) -> Iterator[tuple[Row, Record]]:
    """Yields each row with what stands in the source, the columns that no format knows included."""
    records = read_records(spec)
    for row in rows:
        place = (row.source, row.line)
        found = next((record for record in records if (record.source, record.line) == place), None)
        if found is None:
            raise DataError(f"{spec} changed while it was read; start again when nothing writes to it.")
        yield row, found


def _line(record: Record) -> bytes:
    """Returns a row as a line of JSON, dates and decimals of tables as text; DataError for what JSON cannot hold."""
    try:
        return (json.dumps(record.value, ensure_ascii=False, allow_nan=False, default=_as_text) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{record.source}:{record.line}: JSON cannot hold the row: {error}.") from error


def _as_text(value: Any) -> str:
    if isinstance(value, date | time | Decimal):  # a datetime is a date
        return str(value)
    raise TypeError(f"it has a value of the type {type(value).__name__}")


def _check_filled(spec: str | Path, counts: Mapping[str, int], shares: Mapping[str, float]) -> None:
    for name, count in counts.items():
        if not count:
            raise DataError(
                f"{spec}: the split {name!r} would be empty: {shares[name]:g} of {sum(counts.values()):,} rows. "
                "Nothing was written. Give it a larger share, or leave it out."
            )
