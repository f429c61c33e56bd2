"""`loratune data`: what of a file would be trained, token by token; its ledger; conversions and splits of it."""

import json
import re
from collections.abc import Mapping
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratune.cli.options import AsJson, mapping
from loratune.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from loratune.data.encode import Encoder
    from loratune.data.ledger import Ledger

app = typer.Typer(help="See, check, convert and split training data.", invoke_without_command=True)


class Part(StrEnum):
    """What of a row can be trained."""

    completion = "completion"
    all = "all"
    last = "last"


class Beyond(Enum):  # not of str: it has a method `split`
    """What can be done with rows beyond the limit."""

    stop = "stop"
    drop = "drop"
    split = "split"


# Controls but for the line feed, and the marks that are invisible or turn the direction of writing.
UNPRINTABLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)

Spec = Annotated[
    str,
    typer.Argument(
        metavar="FILE", help="JSONL, JSON, CSV, Parquet ..., FILE#500, a folder, hub:NAME.", show_default=False
    ),
]
Specs = Annotated[
    list[str],
    typer.Argument(metavar="FILE...", help="As for train; several are read as one, in order.", show_default=False),
]
FormatName = Annotated[
    str | None, typer.Option("--format", metavar="NAME", help="The rows' format, where their keys do not tell.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="COLUMN=KEY", help="Which key is which column: prompt=question_text."),
]
TrainOn = Annotated[Part, typer.Option("--train-on", help="Completions and assistant turns, every token, or the last.")]
Long = Annotated[
    Beyond, typer.Option("--long", help="Rows beyond the limit stop a run, are dropped, or, texts, split.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", metavar="N", min=1, help="The longest row; left out, what the model takes."),
]
LeaveOut = Annotated[bool, typer.Option("--reject", help="Go on without the rows that cannot be used, and list them.")]


@app.callback()
def data(context: typer.Context) -> int:
    """See, check, convert and split training data."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    return 0


@app.command("show")
def show(
    specs: Specs,
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="The base model: its tokenizer is loaded.")],
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=0, help="How many rows to show.")] = 3,
    row: Annotated[
        list[str] | None, typer.Option("--row", metavar="LINE", help="Show this row: a line number, or FILE:LINE.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="PAGE", help="Write the same as one page that needs no network.")
    ] = None,
    format: FormatName = None,
    column: Columns = None,
    train_on: TrainOn = Part.completion,
    long: Long = Beyond.stop,
    max_tokens: MaxTokens = None,
    as_json: AsJson = False,
) -> int:
    """Show which tokens of your rows are trained, which rows are rejected and why, before anything trains."""
    columns = mapping(column, "--column", "prompt=question_text")
    from loratune.data.preview import preview

    encoder, options = _encoder(model, max_tokens, train_on, long), _cached()
    found = preview(specs, encoder, format=format, columns=columns, rows=rows, only=row or (), **options)
    if html is not None:
        from loratune.files import atomic_write
        from loratune.report.data_page import data_page

        atomic_write(html, data_page(found))
    if as_json:
        _print_json(found.to_json())
        return 0
    from loratune.cli.data_view import show_preview

    console = _console()
    show_preview(console, found)
    if html is not None:
        console.print(f"\nwrote {html}", markup=False, highlight=False, soft_wrap=True)
    return 0


@app.command("check")
def check(
    specs: Specs,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Check too that its tokenizer can encode every row."),
    ] = None,
    format: FormatName = None,
    column: Columns = None,
    train_on: TrainOn = Part.completion,
    long: Long = Beyond.stop,
    max_tokens: MaxTokens = None,
    as_json: AsJson = False,
) -> int:
    """Check every row and list the rejected ones with their reasons; exit code 2 if there are any."""
    columns = mapping(column, "--column", "prompt=question_text")
    from loratune.data import preview
    from loratune.data.tokenise import DROPPED

    if model is None:
        ledger = preview.read_ledger(specs, format, columns)
    else:
        encoder = _encoder(model, max_tokens, train_on, long)
        ledger = preview.read_tokens(specs, encoder, format, columns, **_cached()).ledger
    _show_ledger(", ".join(specs), ledger, as_json, "trained" if model else "sound")
    return 2 if any(not each.reason.startswith(DROPPED) for each in ledger.rejects) else 0


@app.command("convert")
def convert(
    spec: Spec,
    target: Annotated[Path, typer.Argument(metavar="NEW.jsonl", help="The file to write; it must not exist yet.")],
    kind: Annotated[
        str, typer.Option("--format", metavar="NAME", help="The format to write: messages, prompt_completion, text ...")
    ],
    format: Annotated[
        str | None, typer.Option("--from", metavar="NAME", help="The rows' format, where their keys do not tell.")
    ] = None,
    column: Columns = None,
    reject: LeaveOut = False,
    as_json: AsJson = False,
) -> int:
    """Write the rows as JSON Lines of another format, or of the plain form of their own."""
    columns = mapping(column, "--column", "prompt=question_text")
    from loratune.data import rewrite

    ledger = rewrite.convert(spec, target, kind, format=format, columns=columns, reject=reject)
    _show_ledger(spec, ledger, as_json, written={str(target): ledger.rows_trained})
    return 0


@app.command("split")
def split(
    spec: Spec,
    to: Annotated[
        str, typer.Option("--to", metavar="SHARES", help="Names and shares: train=0.9,validation=0.05,test=0.05.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="The folder to write; left out, the file's name.")
    ] = None,
    group: Annotated[
        str | None, typer.Option("--group", metavar="KEY", help="Keep rows with the same value of this key together.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Another number, another split.")] = 0,
    format: FormatName = None,
    column: Columns = None,
    reject: LeaveOut = False,
    as_json: AsJson = False,
) -> int:
    """Split the rows by a hash of their content: rows that are added later move no other row."""
    columns = mapping(column, "--column", "prompt=question_text")
    shares = {name: _share(text) for name, text in mapping(to.split(","), "--to", "train=0.9,test=0.1").items()}
    from loratune.data import rewrite

    folder = output or _beside(spec)
    options: dict[str, Any] = {"seed": seed, "group": group, "format": format, "columns": columns, "reject": reject}
    counts, ledger = rewrite.write_splits(spec, folder, shares, **options)
    _show_ledger(spec, ledger, as_json, written={str(folder / f"{name}.jsonl"): n for name, n in counts.items()})
    return 0


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"--to: the share {text!r} is not a number; expected such as train=0.9,test=0.1.") from error


def _beside(spec: str) -> Path:
    """Returns FILE without its endings; ConfigError where a spec is no file, so that a name must be given."""
    path = Path(spec)
    if not path.is_file():
        raise ConfigError(f"{spec} is not a file to name the splits after; give a folder to write with --output.")
    return path.with_name(path.name.split(".")[0] or "split")


def _encoder(model: str, max_tokens: int | None, train_on: Part, long: Beyond) -> "Encoder":
    """Loads a tokenizer and, where a model lies beside it, the longest row and the tokens it takes; never weights."""
    from loratune.data.encode import Encoder
    from loratune.model import load

    folder, num_ids = Path(model), None
    if folder.is_dir() and not (folder / "config.json").is_file():  # a tokenizer alone, as in a run's adapter/
        source = load.Source("folder", folder, str(folder))
    else:
        source = load.resolve(model, _notify)
        positions, num_ids = _sizes(source.path)
        max_tokens = max_tokens or positions
    tokenizer = load.tokenizer_of(source)
    return Encoder(tokenizer, max_tokens, train_on=train_on.value, long=long.value, num_ids=num_ids)


def _sizes(folder: Path) -> tuple[int | None, int | None]:
    """Returns how many tokens a model reads at once, and how many it knows."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"cannot read {folder / 'config.json'}: {reason} Give the limit with --max-tokens."
        ) from error
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None), getattr(text, "vocab_size", None)


def _cached() -> dict[str, Any]:
    """Returns where a run keeps its tokens, so that large data is tokenised once for both."""
    from loratune.model.gguf import cache_root

    return {"cache": cache_root() / "tokens", "notify": _notify}


def _notify(message: str) -> None:
    _console(stderr=True).print(message, style="dim", markup=False, highlight=False, soft_wrap=True)


def _show_ledger(
    spec: str, ledger: "Ledger", as_json: bool, word: str = "written", written: Mapping[str, int] | None = None
) -> None:
    if as_json:
        from loratune.data.preview import ledger_json

        _print_json({"source": spec, **({"written": written} if written else {}), **ledger_json(ledger)})
    else:
        from loratune.cli.data_view import show_ledger

        show_ledger(_console(), spec, ledger, word, written or {})


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)


def _print_json(value: Any) -> None:
    """Prints JSON whose controls and invisible characters are escaped, so that a terminal can take it."""
    text = json.dumps(value, ensure_ascii=False)
    typer.echo(UNPRINTABLE.sub(lambda match: json.dumps(match[0])[1:-1], text))
