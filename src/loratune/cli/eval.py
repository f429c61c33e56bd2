"""`loratune eval`: adapters, the base and honest floors on any rows, with paired tests and every prediction."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loratune.cli.options import AsJson, BaseModelName, adapter_folder, mapping, print_json
from loratune.errors import ConfigError


def _option(help_text: str, metavar: str | None = None) -> Any:
    return typer.Option(help=help_text, metavar=metavar, show_default=False)


def evaluate(
    what: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN_OR_ADAPTER...", help="Runs, or adapters' folders.")
    ] = None,
    data: Annotated[str | None, _option("The rows to evaluate on: a file, FILE#500, a folder.", "FILE")] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model too, without an adapter.")] = False,
    baseline: Annotated[list[str] | None, _option("A floor too: majority, or probe (may be repeated).", "NAME")] = None,
    train: Annotated[str | None, _option("Rows that a baseline learns from (default: the run's).", "FILE")] = None,
    model: BaseModelName = None,
    task: Annotated[str | None, _option("The task, where no adapter names it, such as SEQ_CLS.", "TASK")] = None,
    predictions: Annotated[Path | None, _option("Write every prediction as JSON Lines.", "FILE")] = None,
    format: Annotated[str | None, _option("The rows' format, where their keys do not tell.", "NAME")] = None,
    column: Annotated[list[str] | None, _option("Which key is which column: text=body.", "COLUMN=KEY")] = None,
    reject: Annotated[bool, typer.Option("--reject", help="Go on without rows that cannot be used.")] = False,
    answers: Annotated[
        int, typer.Option(help="Rows that a model which continues text answers, greedily.", metavar="N", min=0)
    ] = 100,
    as_json: AsJson = False,
) -> int:
    """Measure runs and floors on any rows: figures with 95% intervals, and a paired test of each with the first."""
    if data is None:
        raise ConfigError("no rows are given: --data FILE.")
    if predictions is not None and predictions.exists():
        raise ConfigError(f"{predictions} exists already. Choose another name for --predictions.")
    folders = {str(path): adapter_folder(path) for path in what or ()}
    if not folders and not (base or baseline):
        raise ConfigError("nothing to evaluate: give a run, an adapter's folder, --base or --baseline.")
    from loratune.tasks.judge import Question, judge

    asked = Question(
        data, model, task, base, tuple(baseline or ()), train or (_train_of(what or []) if baseline else None), format,
        mapping(column, "--column", "text=body") if column else None, reject, answers,
    )  # fmt: skip
    judged, tests = judge(folders, asked, None if as_json else _note)
    if predictions is not None:
        _write(predictions, judged)
    if as_json:
        print_json({"results": [each.to_json() for each in judged], "paired": [each.to_json() for each in tests]})
    else:
        _show(judged, tests, predictions)
    return 0


def _note(text: str) -> None:
    typer.secho(f"note: {text}", dim=True)


def _train_of(runs: list[Path]) -> str | None:
    """Returns what the first run among these was trained on."""
    from loratune.report.run_files import RUN_FILE, RunFiles

    return next((RunFiles(run).setting("data.train") for run in runs if (run / RUN_FILE).is_file()), None)


def _write(path: Path, judged: list[Any]) -> None:
    import json

    from loratune.files import atomic_write

    lines = [
        json.dumps({"model": each.name, **record}, ensure_ascii=False) for each in judged for record in each.records
    ]
    atomic_write(path, "\n".join(lines) + "\n")


def _show(judged: list[Any], tests: list[Any], predictions: Path | None) -> None:
    from loratune.cli.panel import text_table

    rows: list[dict[str, Any]] = []
    for each in judged:
        figures = {name: told(value) for name, value in each.to_json()["figures"].items()}
        rows.append({"model": each.name, **figures})
    names = list(dict.fromkeys(key for row in rows for key in row))
    typer.echo(text_table([{name.replace("_", " "): row.get(name, "-") for name in names} for row in rows]))
    for title, table in judged[0].scores.tables.items():
        typer.echo(f"{title} of {judged[0].name}\n{text_table(table)}")
    for test in tests:
        low, high = test.difference.low, test.difference.high
        clear = "a clear difference" if low > 0 or high < 0 else "no clear difference"
        typer.echo(
            f"{test.figure.replace('_', ' ')} of {test.other} less {test.one}: {test.difference.value:+.4f} "
            f"(95%: {low:+.4f} to {high:+.4f}), paired: {clear}"
        )
    if predictions is not None:
        typer.echo(f"predictions: {predictions}")


def told(figure: dict[str, float | None]) -> str:
    """Returns a figure with its interval, or a dash where it is not defined."""
    if figure["value"] is None:
        return "-"
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
