"""What several verbs share: options with one meaning, where an adapter lies, and how a report is shown."""

import inspect
import json
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratune.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
BaseModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="The base model, where the adapter's own record does not serve."),
]
RunOrAdapter = Annotated[
    Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run directory, or an adapter's folder.", show_default=False)
]


class Language(StrEnum):
    """The languages that texts are written in."""

    en = "en"
    uk = "uk"


Lang = Annotated[Language | None, typer.Option("--lang", help="en or uk (default: your locale's).")]
ADAPTER_FILE = "adapter_config.json"


def adapter_folder(path: Path) -> Path:
    """Returns the adapter's folder: PATH/adapter of a run, or PATH itself; raises ConfigError if neither is one."""
    for folder in (path / "adapter", path):
        if (folder / ADAPTER_FILE).is_file():
            return folder
    if not path.exists():
        raise ConfigError(f"{path} does not exist. Give a run directory (runs/NAME) or an adapter's folder.")
    if any(path.glob("checkpoints/step-*")):
        raise ConfigError(f"{path} has checkpoints but no adapter yet: the run has not ended. Resume it, or give one.")
    raise ConfigError(f"{path} holds no adapter: found neither adapter/{ADAPTER_FILE} nor {ADAPTER_FILE} in it.")


def base_model_of(folder: Path, given: str | None) -> str:
    """Returns the base model's name: the one given, else the one the adapter records; raises ConfigError without."""
    name = given or read_record(folder / ADAPTER_FILE).get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"{folder / ADAPTER_FILE} names no base model. Give it with --model.")
    return str(name)


def read_record(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a small file that we or PEFT wrote; raises AdapterError if it is not one."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot read {path}: {error}. The adapter was not loaded.") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} is not a JSON object. The adapter was not loaded.")
    return value


def mapping(pairs: list[str] | None, option: str, example: str) -> dict[str, str]:
    """Returns {NAME: VALUE} of NAME=VALUE texts; ConfigError for anything else."""
    found: dict[str, str] = {}
    for pair in pairs or ():
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not (name and equals and value) or name in found:
            raise ConfigError(f"{option}: {pair!r} is not one NAME=VALUE for each name; expected such as {example}.")
        found[name] = value
    return found


def print_json(value: Any) -> None:
    """Prints one JSON value on a line of its own; paths and other plain objects as their text."""
    typer.echo(json.dumps(value, ensure_ascii=False, default=str))


def show_report(console: "Console", title: str, report: Mapping[str, Any]) -> None:
    """Shows a report of plain values: one table of its scalars, then one per mapping and per list of mappings."""
    parts = {name: value for name, value in report.items() if _is_part(value)}
    console.print(_pairs(title, {name: value for name, value in report.items() if name not in parts}))
    for name, part in parts.items():
        console.print()
        heading = name.replace("_", " ")
        console.print(_pairs(heading, part) if isinstance(part, Mapping) else _rows(heading, part))


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and bool(value) and isinstance(value[0], Mapping))


def _table(title: str) -> Any:
    from rich import box
    from rich.table import Table

    return Table(title=shown(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _pairs(title: str, values: Mapping[str, Any]) -> Any:
    table = _table(title)
    table.show_header = False
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in values.items():
        table.add_row(shown(name), shown(value))
    return table


def _rows(title: str, rows: list[Mapping[str, Any]]) -> Any:
    table = _table(title)
    for name in rows[0]:
        number = all(isinstance(row.get(name), int | float) for row in rows)
        table.add_column(
            shown(name), justify="right" if number else "left", header_style="dim", no_wrap=number, overflow="fold"
        )
    for row in rows:
        table.add_row(*(shown(row.get(name)) for name in rows[0]))
    return table


def shown(value: Any) -> Any:
    """Returns a value as people read it: 1,234 and 0.0123, `-` for nothing, lists with commas; never as markup."""
    from rich.text import Text

    return Text(_words(value))


def _words(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(_words(item) for item in value) or "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_words(item)}" for key, item in value.items()) or "-"
    return str(value)


def borrow_options(verb: Callable[..., Any], lender: Callable[..., Any], without: Collection[str] = ()) -> None:
    """Gives a verb, beside its own options, those of another that mean the same there: they are the same objects.

    The verb takes `context` and `config` as the lender declares them, and what it does not name itself as **kwargs.
    """
    own = inspect.signature(verb).parameters
    lent = {name: each for name, each in inspect.signature(lender).parameters.items() if name not in without}
    named = {name: each for name, each in own.items() if each.kind is not inspect.Parameter.VAR_KEYWORD}
    both = lent | {name: each for name, each in named.items() if name not in ("context", "config")}
    verb.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
        [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in both.values()], return_annotation=int
    )
    verb.__annotations__ = {name: each.annotation for name, each in both.items()} | {"return": int}
