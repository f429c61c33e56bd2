"""Checks of single values of a row: the value comes back as its type, or a DataError says what stands there."""

import math
from typing import Any, cast

from loratune.data.strict_json import describe, parse_value
from loratune.errors import DataError


def as_dict(value: Any, name: str, expected: str) -> dict[str, Any]:
    """Returns an object; one that is spelled as JSON in a string, as tables hold them, is read."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _spelled(value, name)
    if not isinstance(value, dict):
        raise DataError(f"{name} is {describe(value)}; expected {expected}.")
    return cast(dict[str, Any], value)


def as_list(value: Any, name: str, expected: str) -> list[Any]:
    """Returns a list; one that is spelled as JSON in a string, as tables hold them, is read."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _spelled(value, name)
    if not isinstance(value, list):
        raise DataError(f"{name} is {describe(value)}; expected {expected}.")
    return cast(list[Any], value)


def as_string(value: Any, name: str) -> str:
    """Returns a string, which may be empty."""
    if not isinstance(value, str):
        raise DataError(f"{name} is {describe(value)}; expected a string.")
    return value


def as_text(value: Any, name: str) -> str:
    """Returns a string with more than white space in it."""
    if not as_string(value, name).strip():
        raise DataError(f"{name} is empty, so nothing could be learnt from it; remove the row or fill it in.")
    return value


def as_number(value: Any, name: str) -> float:
    """Returns a finite number; one in a string, as CSV holds them, is read."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{name} is {describe(value)}; expected a finite number.")
    return number


def as_label(value: Any, name: str) -> str | int | float:
    """Returns a label: a string that is not empty, or a finite number."""
    if isinstance(value, str):
        return as_text(value, name)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{name} is {describe(value)}; expected a label, a string or a number.")
    return value


def _spelled(text: str, name: str) -> Any:
    try:
        return parse_value(text)
    except DataError as error:
        raise DataError(f"{name} is a string that is not JSON: {error}") from error
