"""Stable splits: a row's side depends on its content (or its group) and the seed alone."""

import math
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any, Protocol

from loratune.data.strict_json import content_hash
from loratune.errors import ConfigError, DataError


class Placed(Protocol):
    """A `Row`, or a `Record` whose value could be read."""

    @property
    def source(self) -> str: ...
    @property
    def line(self) -> int: ...
    @property
    def value(self) -> Any: ...


def split(rows: Iterable[Placed], shares: Mapping[str, float], seed: int, group: str | None = None) -> list[str]:
    """Returns the name of each row's split: `shares` cut [0, 1) in order, a row stands where its 64-bit hash falls.

    Rows that are added move no other row, equal rows stay together, and so do rows with the same value of the key
    `group`. The shares are met on average: n rows miss a share p by about sqrt(n p (1 - p)) rows.
    Raises ConfigError for shares that are not positive or do not sum to 1, DataError for a row without the group.
    """
    if not shares or not all(share > 0 for share in shares.values()) or not math.isclose(sum(shares.values()), 1):
        given = ", ".join(f"{name}={share}" for name, share in shares.items())
        raise ConfigError(f"the shares of a split must be positive and sum to 1; found {given or 'none'}.")
    names, bounds = list(shares), [bound * 2**64 for bound in accumulate(shares.values())]
    return [_name(content_hash(_subject(row, group), str(seed)), names, bounds) for row in rows]


def _subject(row: Placed, group: str | None) -> Any:
    if group is None:
        return row.value
    if group not in row.value:
        keys = ", ".join(map(repr, row.value))
        raise DataError(f"{row.source}:{row.line}: the row has no {group!r} to group by; it has {keys}.")
    return [row.value[group]]


def _name(key: int, names: list[str], bounds: list[float]) -> str:
    return next((name for name, bound in zip(names, bounds) if key < bound), names[-1])
