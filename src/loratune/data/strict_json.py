"""JSON read strictly: no key twice, no NaN, no half characters, no bottomless nesting; and hashes of JSON values."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

from loratune.errors import DataError

MAX_DEPTH = 64  # JSON schemas of tools stay well under 20
# The longest contexts (10 million tokens) hold about 40 MB of text, usual ones under 1 MB: a longer row is a file
# without line ends, and to read it whole would take several times its size.
MAX_ROW_BYTES = 16 << 20
TOO_LONG = f"the row is longer than {MAX_ROW_BYTES >> 20} MiB; split it, or check that each row ends with a line feed."
_EXAMPLE = '{"prompt": "2+2=", "completion": "4"}'
_TYPE_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def strings(value: Any, depth: int = 0) -> Iterator[str]:
    """Yields every string in a JSON value, keys included; DataError beyond 64 levels."""
    if depth > MAX_DEPTH:
        raise DataError(f"the row is nested more than {MAX_DEPTH} levels deep.")
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in cast(dict[str, Any], value).items():
            yield key
            yield from strings(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in cast(Sequence[Any], value):
            yield from strings(item, depth + 1)


def parse_object(line: bytes) -> dict[str, Any]:
    """Returns the JSON object that a line of UTF-8 spells; DataError with the reason for anything else."""
    try:
        row = DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(line, error.start)) from error
    except (ValueError, RecursionError) as error:
        raise DataError(json_reason(error)) from error
    # Only an escape can spell a lone surrogate, and only brackets can nest: other rows need no walk.
    if b"\\u" in line or line.count(b"[") + line.count(b"{") > MAX_DEPTH:
        check_strings(row)
    return as_object(row)


def parse_value(text: str) -> Any:
    """Returns any JSON value that a string spells, such as a list in a CSV cell; DataError where it is not JSON."""
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise DataError(json_reason(error)) from error
    check_strings(value)
    return value


def as_object(row: Any) -> dict[str, Any]:
    """Returns the row if it is a JSON object; DataError otherwise."""
    if not isinstance(row, dict):
        raise DataError(f"the row is {describe(row)}; expected one JSON object a line, such as {_EXAMPLE}.")
    return cast(dict[str, Any], row)


def check_strings(value: Any) -> None:
    """Refuses lone surrogates: legal in JSON ("\\ud800"), but no characters, and no tokenizer takes them."""
    for text in strings(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])
            raise DataError(f"a string holds {half}, half of a surrogate pair, which is no character.") from error


def not_utf8(line: bytes, position: int) -> str:
    """Returns the reason to refuse a line whose byte at `position` is not UTF-8."""
    return (
        f"byte {position + 1} of the line, 0x{line[position]:02x}, is not UTF-8; save the file as UTF-8 text "
        "(not compressed, not UTF-16)."
    )


def json_reason(error: Exception) -> str:
    """Returns why a text is not JSON, as a reason to refuse its row."""
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply to be a row."
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON at column {error.colno}: {error.msg}; expected one object a line."
    return f"not valid JSON: {error}."  # an integer of more than 4300 digits


def describe(value: Any) -> str:
    """Returns a value's type and its first 40 characters, for messages."""
    head = cast(Any, value[:48] if isinstance(value, str | list) else value)
    shown = json.dumps(head, ensure_ascii=False, default=repr).encode("utf-8", "backslashreplace").decode()
    name = _TYPE_NAMES.get(type(value), f"of the type {type(value).__name__}")
    return f"{name}, {shown[:40]}{'...' if len(shown) > 40 else ''}"


def canonical(value: Any) -> str:
    """Returns the one JSON text of a value: keys sorted, no spaces, characters as they are."""
    return _ENCODER.encode(value)


def text_hash(text: str, salt: str = "") -> int:
    """Returns 64 bits that depend on a text and `salt` alone, the same in every process."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=salt.encode()).digest(), "big")


def content_hash(value: Any, salt: str = "") -> int:
    """Returns 64 bits that depend on a JSON value and `salt` alone, not on the order of keys."""
    return text_hash(canonical(value), salt)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise DataError(f"the key {twice!r} stands twice in one object; remove one of the two.")
    return result


def _refuse_constant(text: str) -> Any:
    raise DataError(f"{text} is not JSON; remove the value or write it as a string.")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise DataError(f"{text[:40]} is beyond the range of a number; write it as a string.")
    return number


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite)
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=repr)
