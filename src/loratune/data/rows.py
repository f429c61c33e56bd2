"""Reads JSON Lines strictly: every line is a row of a known format, or the run stops and names file, line and reason.

A format is one entry of `FORMATS`. A file holds rows of one format only.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, cast

from loratune.errors import ConfigError, DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
# Columns that say where a row is from. They never reach the model, so they are the only extra keys a row may have.
NOTE_KEYS = frozenset({"id", "source", "metadata"})
_MAX_DEPTH = 64  # JSON schemas of tools stay well under 20
_BOM = b"\xef\xbb\xbf"


class Hasher(Protocol):
    """What `hashlib.sha256()` returns: takes the bytes of a file as they are read."""

    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True)
class Row:
    """One row of a data file: where it stands (`source`:`line`), its format (`kind`) and its checked value."""

    source: str
    line: int
    kind: str
    value: dict[str, Any]

    @property
    def where(self) -> str:
        """`file:line`, as every message about this row begins."""
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Format:
    """A row format: the keys that make it, the keys it may have besides, and the check of their values."""

    required: tuple[str, ...]
    check: Callable[[dict[str, Any]], None]
    optional: tuple[str, ...] = ()


def strings(value: Any, depth: int = 0) -> Iterator[str]:
    """Yields every string in a JSON value, keys included; DataError beyond 64 levels."""
    if depth > _MAX_DEPTH:
        raise DataError(f"the row is nested more than {_MAX_DEPTH} levels deep.")
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in cast(dict[str, Any], value).items():
            yield key
            yield from strings(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in cast(Sequence[Any], value):
            yield from strings(item, depth + 1)


def read_rows(path: str | Path, format: str | None = None, hasher: Hasher | None = None) -> list[Row]:
    """Reads a whole JSON Lines file; blank lines are skipped, a byte-order mark at the start is tolerated.

    `format` names the format instead of finding it by the keys; keys of other formats are then left out.
    `hasher` receives every byte in order, so that its digest is that of exactly what was read.
    Raises DataError `file:line: reason` for the first bad line, and for a file without rows;
    ConfigError for a file that cannot be opened and an unknown format.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"unknown data format {format!r}; expected one of {', '.join(FORMATS)}.")
    rows: list[Row] = []
    for number, line in _lines(Path(path), hasher):
        try:
            kind, value = _parse(line, format)
            if rows and kind != rows[0].kind:
                raise DataError(
                    f"this row is {kind}, but line {rows[0].line} is {rows[0].kind}; use one format a file."
                )
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        except RecursionError as error:
            raise DataError(f"{path}:{number}: the JSON is nested too deeply to be a row.") from error
        rows.append(Row(str(path), number, kind, value))
    if not rows:
        raise DataError(f"{path}: the file has no rows; expected one JSON object a line.")
    return rows


def _lines(path: Path, hasher: Hasher | None) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if hasher is not None:
                    hasher.update(line)
                content = line.removeprefix(_BOM) if number == 1 else line
                if content.strip():
                    yield number, content
    except OSError as error:
        raise ConfigError(f"cannot read the data file {path}: {error.strerror}. Check the path.") from error


def _parse(line: bytes, format: str | None) -> tuple[str, dict[str, Any]]:
    row = _json_object(line)
    kind = format or _find_format(row)
    value = _select(row, kind, explicit=format is not None)
    _check_unicode(value)
    FORMATS[kind].check(value)
    return kind, value


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8; save the file as UTF-8 JSON "
            "Lines (not compressed, not UTF-16)."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON at column {error.colno}: {error.msg}; expected one object a line.") from error
    except ValueError as error:  # an integer of more than 4300 digits
        raise DataError(f"not valid JSON: {error}.") from error
    return _object(row, "the row", f"one JSON object a line, such as {_EXAMPLE}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise DataError(f"the key {key!r} stands twice in one object; remove one of the two.")
        result[key] = value
    return result


def _refuse_constant(text: str) -> Any:
    raise DataError(f"{text} is not JSON; remove the value or write it as a string.")


def _find_format(row: dict[str, Any]) -> str:
    kinds = [kind for kind, format in FORMATS.items() if row.keys() >= set(format.required)]
    if len(kinds) == 1:
        return kinds[0]
    found = ", ".join(map(repr, row)) or "none"
    if kinds:
        raise DataError(f"the keys {found} fit two formats, {' and '.join(kinds)}; remove the keys of one of them.")
    expected = ", or ".join(" and ".join(format.required) for format in FORMATS.values())
    raise DataError(f"unknown format: found the keys {found}; expected {expected}.{_nearest(row)}")


def _select(row: dict[str, Any], kind: str, explicit: bool) -> dict[str, Any]:
    format = FORMATS[kind]
    if missing := [key for key in format.required if key not in row]:
        raise DataError(f"a {kind} row needs {' and '.join(map(repr, missing))}.{_nearest(row)}")
    known = format.required + format.optional
    ignored = {*NOTE_KEYS, *(_all_keys() if explicit else ())}
    if unknown := [key for key in row if key not in known and key not in ignored]:
        raise DataError(
            f"unknown key {unknown[0]!r} in a {kind} row; expected only {', '.join(known)} (and the notes "
            f"{', '.join(sorted(NOTE_KEYS))}, which are not trained on). Remove or rename it."
        )
    return {key: row[key] for key in row if key in known}


def _all_keys() -> list[str]:
    return [key for format in FORMATS.values() for key in format.required + format.optional]


def _nearest(row: dict[str, Any]) -> str:
    known = _all_keys()
    for key in row:
        if key not in known and (near := get_close_matches(key, known, n=1)):
            return f" Did you mean {near[0]!r} by {key!r}?"
    return ""


def _check_unicode(value: dict[str, Any]) -> None:
    """A lone surrogate is legal in JSON ("\\ud800") but is no character, and no tokenizer takes it."""
    for text in strings(value):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])
            raise DataError(f"a string holds {half}, half of a surrogate pair, which is no character.") from error


def _check_prompt_completion(value: dict[str, Any]) -> None:
    _check_string(value["prompt"], "prompt")
    _check_text(value["completion"], "completion")


def _check_plain_text(value: dict[str, Any]) -> None:
    _check_text(value["text"], "text")


def _check_messages(value: dict[str, Any]) -> None:
    messages = _list(value["messages"], "messages", "a list of {role, content} objects")
    if not messages:
        raise DataError("messages is an empty list; expected a list of {role, content} objects.")
    for number, message in enumerate(messages, 1):
        _check_message(message, f"message {number}")
    roles = [str(message["role"]) for message in messages]
    if "assistant" not in roles:
        raise DataError(f"no message is from the assistant (roles: {', '.join(roles)}), so nothing could be trained.")
    first = next(role for role in roles if role not in ("system", "developer"))
    if first != "user":
        raise DataError(f"the first message after the system's is from {first}; expected user.")
    for number, tool in enumerate(_list(value.get("tools", []), "tools", "a list of objects"), 1):
        _object(tool, f"tool {number}", "an object (a JSON schema)")


def _check_message(value: Any, name: str) -> None:
    message = _object(value, name, "an object with role and content")
    if message.keys() != {"role", "content"}:
        raise DataError(f"{name} has the keys {', '.join(map(repr, message)) or 'none'}; expected role and content.")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        near = get_close_matches(str(role), ROLES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{name} has the role {role!r}; expected one of {', '.join(ROLES)}.{hint}")
    check = _check_text if role == "assistant" else _check_string
    check(content, f"{name} ({role})")


def _object(value: Any, name: str, expected: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{name} is {_describe(value)}; expected {expected}.")
    return cast(dict[str, Any], value)


def _list(value: Any, name: str, expected: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name} is {_describe(value)}; expected {expected}.")
    return cast(list[Any], value)


def _check_string(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{name} is {_describe(value)}; expected a string.")


def _check_text(value: Any, name: str) -> None:
    _check_string(value, name)
    if not value.strip():
        raise DataError(f"{name} is empty, so nothing could be learnt from it; remove the row or fill it in.")


def _describe(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    return f"{_TYPE_NAMES[type(value)]}, {shown[:40]}{'...' if len(shown) > 40 else ''}"


_TYPE_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_EXAMPLE = '{"prompt": "2+2=", "completion": "4"}'

FORMATS: dict[str, Format] = {
    "prompt_completion": Format(("prompt", "completion"), _check_prompt_completion),
    "messages": Format(("messages",), _check_messages, optional=("tools",)),
    "text": Format(("text",), _check_plain_text),
}
