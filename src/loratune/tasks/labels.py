"""The labels of a task: found in the training data before the model is loaded, then kept in the model's configuration.

An integer is a class with its number as its name; a number with a fraction is a value to be predicted.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from loratune.data.rows import Reject, Row, iter_rows
from loratune.errors import ConfigError, DataError

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
MAX_NAMES = 1000  # more different labels than this are texts or numbers in the wrong column


@dataclass(frozen=True)
class Labels:
    """names: the classes, in the order of their numbers; problem: what the head's outputs are, in transformers' words
    (one of the classes, any of them, a number); None for a task without labels."""

    names: tuple[str, ...] = ()
    problem: str | None = None

    @cached_property
    def numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def number(self, value: Any) -> int:
        """Returns the number of a label; raises DataError, with the nearest name, for one that training does not know.

        An integer is also taken for a class's number, as files have it whose names stand elsewhere (ClassLabel).
        """
        name = name_of(value)
        if name in self.numbers:
            return self.numbers[name]
        if isinstance(value, int) and 0 <= value < len(self.names) and not any(map(_is_whole, self.names)):
            return int(value)
        near = get_close_matches(name, self.names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        shown = ", ".join(self.names[:8]) + (" ..." if len(self.names) > 8 else "")
        raise DataError(f"the label {name!r} is not one of the {len(self.names)} that are trained: {shown}.{hint}")


def name_of(value: Any) -> str:
    """Returns a label as its name."""
    return value.strip() if isinstance(value, str) else str(value)


def label_of(row: Row) -> Any:
    """Returns what a classification row, or a pair with a label or a score, is labelled; None for no label."""
    return row.value.get("label", row.value.get("score"))


def labels_of(config: Any) -> Labels:
    """Returns the labels that a model's configuration holds."""
    names: Mapping[int, str] = config.id2label or {}
    return Labels(tuple(str(names[number]) for number in sorted(names)), config.problem_type)


Find = Callable[[Iterable[Row], str], Labels]  # the rows and what the data is called in errors


def rows_of(specs: Sequence[str], format: str | None, columns: Mapping[str, str] | None) -> Iterator[Row]:
    """Yields the rows that can be read of all specs; the others are told of, with their reasons, by the ledger."""
    for spec in specs:
        yield from (row for row in iter_rows(spec, format, columns) if not isinstance(row, Reject))


def no_labels(rows: Iterable[Row], data: str) -> Labels:
    """For tasks whose rows have none."""
    return Labels()


def find_classes(rows: Iterable[Row], data: str) -> Labels:
    """Finds what the labels of classification rows are: one class each, a list of classes, or a number.

    Raises DataError that names file and line: rows of several kinds, one class only, more names than labels have.
    """
    seen, kind, first = Counter[Any](), None, None
    numeric, fractions = True, False
    for row in rows:
        value = label_of(row)
        now = "list" if isinstance(value, list) else "text" if isinstance(value, str) else "number"
        if value is None or (kind is not None and kind != now):
            raise DataError(f"{row.where}: the label is {_told(value)}, but {first} has a {kind}; use one kind a file.")
        kind, first = now, first or row.where
        for each in value if isinstance(value, list) else [value]:
            seen[each] += 1
            numeric = numeric and _is_number(each)
            fractions = fractions or (_is_number(each) and not _is_whole(each))
    if kind is None:
        raise DataError(f"{data}: no row can be read, so there are no labels. See `loratune data check`.")
    if kind != "list" and numeric and fractions:
        return Labels(("value",), REGRESSION)
    return Labels(checked_names(seen, data, first or data), MULTI if kind == "list" else SINGLE)


def find_tags(rows: Iterable[Row], data: str) -> Labels:
    """Finds the tags of tagging rows; "O", the tag of what is nothing, is number 0. Raises as `find_classes`."""
    seen, first = Counter[Any](), None
    for row in rows:
        first = first or row.where
        seen.update(row.value.get("tags", ()))
    names = checked_names(seen, data, first or data)
    return Labels(tuple(sorted(names, key=lambda name: name != "O")))


def checked_names(seen: Mapping[Any, int], data: str, first: str) -> tuple[str, ...]:
    """Returns the names of labels in their order; raises DataError for a single one, and for more than labels have."""
    names = {name_of(each): each for each in seen}
    if len(names) < 2:
        raise DataError(
            f"{first}: every row has the same label, {next(iter(names), None)!r}, so there is nothing to learn from "
            f"{data}. Add rows of another class."
        )
    if len(names) > MAX_NAMES:
        raise DataError(f"{first}: the labels have {len(names):,} different names; is this the column of the labels?")
    whole = all(map(_is_whole, names))
    return tuple(sorted(names, key=lambda name: (int(name), name)) if whole else sorted(names))


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_whole(value: Any) -> bool:
    try:
        int(value if isinstance(value, str) else str(value))
    except ValueError:
        return False
    return True


def _told(value: Any) -> str:
    return "missing" if value is None else f"{str(value)[:40]!r}"


def fit(config: Any, found: Labels) -> None:
    """Gives labels found in data to the configuration of a model that was loaded without them.

    Raises ConfigError for a head of another size, or one that knows other names.
    """
    own = labels_of(config)
    if not found.names or set(own.names) == set(found.names):
        config.problem_type = found.problem or config.problem_type
        return
    generic = all(name == f"LABEL_{number}" for number, name in enumerate(own.names))
    if len(own.names) != len(found.names) or not generic:
        raise ConfigError(
            f"the model's head has the {len(own.names)} labels {', '.join(own.names[:8])}; the data has the "
            f"{len(found.names)} labels {', '.join(found.names[:8])}. Load the model with these: "
            "loratune.load_model(name, task_type=..., labels=[...])."
        )
    config.id2label, config.label2id = dict(enumerate(found.names)), dict(found.numbers)
    config.problem_type = found.problem
