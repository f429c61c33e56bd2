"""Which format the rows of a file have, and which of their keys is which of its columns."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any

from loratune.data.formats import FORMATS, Format, Value
from loratune.errors import ConfigError, DataError

# Columns that say where a row is from. They never reach the model, so every format may have them;
# the last two are the names that pandas gives its row numbers in CSV and Parquet.
NOTE_KEYS = frozenset({"id", "idx", "source", "metadata", "", "__index_level_0__"})

Options = dict[str, list[str]]  # for each column of a format, the keys that may be it


class Layout:
    """How the rows of one file are read: a format's name, and {column of the format: column of the file}.

    `lenient` names the other columns of the file that are left out; further ones are refused, row by row.
    None leaves out every one: the user said which columns to take.
    """

    def __init__(self, name: str, columns: Mapping[str, str], lenient: frozenset[str] | None) -> None:
        self.name = name
        self.columns = dict(columns)
        self._lenient = lenient
        self._format = FORMATS[name]
        self._accepted: tuple[str, ...] | None = None

    def convert(self, row: dict[str, Any]) -> Value:
        """Returns the canonical kind and value of a row; raises DataError with the reason where it has none."""
        keys = tuple(row)
        if keys != self._accepted:  # most rows have the columns of the row before
            self.check_keys(row)
            self._accepted = keys
        return self._format.convert({column: row[key] for column, key in self.columns.items() if key in row})

    def check_keys(self, row: Mapping[str, Any]) -> None:
        """Raises DataError for a row without a required column, or with one that nobody would read."""
        needed = [self.columns[column] for column in self._format.required]
        if any(key not in row for key in needed):
            raise DataError(self._missing(row, needed))
        known = self.columns.values()
        unknown = [] if self._lenient is None else [key for key in row if key not in known and key not in self._lenient]
        if unknown:
            near = _nearest(unknown, list(known))
            raise DataError(
                f"unknown key {unknown[0][:40]!r} in a {self.name} row; expected only {', '.join(known)}.{near} "
                "Rename it, remove it, or name the columns to take: all others are left out then."
            )

    def _missing(self, row: Mapping[str, Any], needed: list[str]) -> str:
        others = [name for name, format in FORMATS.items() if name != self.name and row.keys() >= set(format.required)]
        if others:
            return f"this row is {others[0]}, but the file's rows are {self.name}; use one format a file."
        return f"a {self.name} row needs {' and '.join(map(repr, needed))}.{_nearest(row, needed)}"


def find_layout(keys: Mapping[str, Any], name: str | None = None, columns: Mapping[str, str] | None = None) -> Layout:
    """Finds the format that the keys of a row fit, `name` or any, where `columns` says which key is which column.

    Of two formats that fit, the one that uses more of the row wins (text and label is no plain text); then the one
    whose own names stand there. Raises ConfigError where several formats or keys remain, and for unknown names;
    DataError where none fits.
    """
    mapping = dict(columns or {})
    check_names(name, mapping)
    names = [name] if name is not None else [each for each in FORMATS if mapping.keys() <= FORMATS[each].columns.keys()]
    fits = {each: options for each in names if (options := _options(FORMATS[each], keys, mapping)) is not None}
    ranks = {each: _rank(options, keys, mapping) for each, options in fits.items()}
    best = [each for each in fits if not any(_better(rank, ranks[each]) for rank in ranks.values())]
    if not best:
        raise DataError(_no_fit(keys, name, mapping))
    if len(best) > 1:
        raise ConfigError(
            f"the keys {_quoted(keys)} fit {len(best)} formats: {', '.join(best)}. Name the format, or the columns to "
            "take, such as columns: {prompt: ..., completion: ...}."
        )
    chosen = {column: _only(best[0], column, options) for column, options in fits[best[0]].items()}
    return Layout(best[0], chosen, _left_out(name, mapping))


def check_names(name: str | None, columns: Mapping[str, str]) -> None:
    """Raises ConfigError for an unknown format, and for a column that the format (or every format) lacks."""
    if name is not None and name not in FORMATS:
        raise ConfigError(f"unknown data format {name!r}; expected one of {', '.join(FORMATS)}.")
    known = {column for format in ([FORMATS[name]] if name else FORMATS.values()) for column in format.columns}
    for column in columns.keys() - known:
        near = get_close_matches(column, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Expected {', '.join(sorted(known))}."
        raise ConfigError(f"columns: {name or 'every format'} lacks a column {column!r}.{hint}")


def _options(format: Format, keys: Mapping[str, Any], mapping: Mapping[str, str]) -> Options | None:
    """Returns the keys that may be each column; None where a required one has none."""
    free = [key for key in keys if key not in mapping.values()]
    found: Options = {}
    for column, names in format.columns.items():
        if column in mapping:
            found[column] = [mapping[column]]
            missing = mapping[column] not in keys
        else:
            found[column] = [column] if column in free else [name for name in names if name in free]
            missing = not found[column]
        if missing and column in format.required:
            return None
        found[column] = found[column] or [column]  # optional: rows further on may have it
    return found


def _rank(options: Options, keys: Mapping[str, Any], mapping: Mapping[str, str]) -> tuple[set[str], bool]:
    """Returns the keys that a fit uses, and whether they are the format's own names or mapped."""
    taken = {column: names[0] for column, names in options.items() if names[0] in keys}
    return set(taken.values()), all(column == key or column in mapping for column, key in taken.items())


def _better(one: tuple[set[str], bool], other: tuple[set[str], bool]) -> bool:
    return one[0] > other[0] or (one[0] == other[0] and one[1] > other[1])


def _only(name: str, column: str, options: list[str]) -> str:
    if len(options) > 1:
        raise ConfigError(
            f"{name} rows have one {column}, but {' and '.join(map(repr, options))} may each be it. "
            f"Say which, as columns: {{{column}: {options[0]}}}."
        )
    return options[0]


def _left_out(name: str | None, mapping: Mapping[str, str]) -> frozenset[str] | None:
    if mapping:
        return None
    others = {column for format in FORMATS.values() for column in format.columns} if name else set[str]()
    return NOTE_KEYS | others


def _no_fit(keys: Mapping[str, Any], name: str | None, mapping: Mapping[str, str]) -> str:
    if absent := [key for key in mapping.values() if key not in keys]:
        return f"the column {absent[0]!r} is not there: found the keys {_quoted(keys)}.{_nearest(absent, list(keys))}"
    if name is not None:
        required = list(FORMATS[name].required)
        return f"a {name} row needs {' and '.join(map(repr, required))}.{_nearest(keys, required)}"
    expected = ", or ".join(" and ".join(format.required) for format in FORMATS.values())
    names = [column for format in FORMATS.values() for column in format.required]
    return f"unknown format: found the keys {_quoted(keys)}; expected {expected}.{_nearest(keys, names)}"


def _quoted(keys: Iterable[str]) -> str:
    shown = list(islice(keys, 13))
    return ", ".join(repr(key[:40]) for key in shown[:12]) + (" ..." if len(shown) > 12 else "") or "none"


def _nearest(keys: Iterable[str], known: list[str]) -> str:
    for key in islice(keys, 12):
        if key not in known and (near := get_close_matches(key[:40], known, n=1)):
            return f" Did you mean {near[0]!r} by {key[:40]!r}?"
    return ""
