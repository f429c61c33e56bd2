"""YAML read with the line of every key, by the core schema of YAML 1.2: `no` is text and 5e-4 is a number."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from loratune.errors import ConfigError

KeyPath = tuple[str, ...]

_yaml: Any = yaml  # PyYAML's functions carry no types
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Composes nodes only. PyYAML's own rules are YAML 1.1: `no` is false, 010 is 8 and 5e-4 is text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # the name PyYAML reads

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = cast(Any, self).peek_event()
        if isinstance(event, yaml.AliasEvent):  # a few aliases can stand for gigabytes, or for themselves
            raise _refusal(event, f"alias *{event.anchor} is not allowed here; write the value out")
        if getattr(event, "tag", None) is not None:
            raise _refusal(event, f"tag {event.tag!r} is not allowed here; write the value alone")
        return super().compose_node(parent, index)


def _refusal(event: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


_SCHEMA: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]{1,18}", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
)
for _name, _pattern, _first in _SCHEMA:
    _firsts = [*_first, ""] if _name == "null" else list(_first)
    cast(Any, _Loader).add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _firsts)

_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "null": lambda text: None,
    _TAG + "bool": lambda text: text.lower() == "true",
    _TAG + "int": int,
    _TAG + "float": float,
    _TAG + "str": str,
}


@dataclass(frozen=True)
class Located:
    """A mapping read from a file, and the line (from 1) on which each key stands, by its path of keys."""

    values: dict[str, Any]
    lines: dict[KeyPath, int]


def read_mapping(path: Path) -> Located:
    """Reads a YAML file that holds one mapping; an empty file is an empty mapping.

    Raises ConfigError, with file and line, for a file that cannot be read, is not UTF-8, is not YAML, has a key
    twice, or holds something else than a mapping.
    """
    text = _decode(path)
    try:
        root = _yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        line, problem = _explain(error, text)
        raise ConfigError(f"{path}:{line}: not valid YAML: {problem}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply; expected sections of settings, two levels deep.") from error
    if root is None:
        return Located({}, {})
    walk = _Walk(path)
    values = walk.value(root, ())
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{path}:{_line(root)}: found {kind(values)}, expected settings such as 'model: google/gemma-3-270m'."
        )
    return Located(values, walk.lines)


def kind(value: Any) -> str:
    """Returns a value as a message shows it: in YAML's words, cut where it is long."""
    words: dict[Any, str] = {None: "nothing (null)", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return f"the {'mapping' if isinstance(value, dict) else 'list'} {text}" if isinstance(value, dict | list) else text


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}. Give the path of a run's YAML file.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8. Save the file as UTF-8."
        ) from error


def _line(node: Any) -> int:
    return node.start_mark.line + 1


def _explain(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """Returns the line and the problem of an error that PyYAML found; a forbidden character comes as a position."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return error.problem_mark.line + 1, str(error.problem)
    position = int(getattr(error, "position", 0))
    return text.count("\n", 0, position) + 1, f"character {text[position : position + 1]!r} is not allowed"


@dataclass
class _Walk:
    """Turns nodes into values and notes the line of each key on the way."""

    path: Path
    lines: dict[KeyPath, int] = field(default_factory=dict[KeyPath, int])

    def value(self, node: Any, prefix: KeyPath) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, prefix)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, prefix) for item in node.value]
        return _SCALARS[node.tag](node.value)

    def _mapping(self, node: Any, prefix: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key in values:
                first = self.lines[(*prefix, key)]
                raise ConfigError(f"{self.path}:{_line(key_node)}: key {key!r} is given twice, first on line {first}.")
            self.lines[(*prefix, key)] = _line(key_node)
            values[key] = self.value(value_node, (*prefix, key))
        return values

    def _key(self, node: Any) -> str:
        if isinstance(node, yaml.ScalarNode):
            return str(node.value)
        raise ConfigError(f"{self.path}:{_line(node)}: found a list or mapping as a key, expected a name.")
