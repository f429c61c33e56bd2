"""`loratune runs`: what was trained here, one run looked at, several held against each other, and room made."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loratune.cli.options import AsJson, Lang, print_json, show_report
from loratune.errors import ConfigError
from loratune.language import language

app = typer.Typer(no_args_is_help=True, help="List, show, compare and clean up runs.")
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]


def _open(folders: list[Path]) -> list[Any]:
    from loratune.report.run_files import RunFiles

    return [RunFiles.open(folder) for folder in folders]


def _line(run: Any) -> dict[str, Any]:
    from loratune.report.run_page import verdict

    before, kept = run.before, run.kept
    return {
        "run": str(run.folder),
        "steps": run.steps[-1]["step"] if run.steps else 0,
        "state": "ended" if run.has_ended else "not ended",
        "model": run.setting("model"),
        "preset": run.setting("adapter.preset"),
        "r": run.setting("adapter.r"),
        "before": before and round(before["loss"], 4),
        "after": kept and round(kept["loss"], 4),
        "verdict": verdict(run),
    }


@app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="Where runs are kept.")] = Path("runs"), as_json: AsJson = False
) -> int:
    """List the runs of a folder, with the held-out loss before and after."""
    found = sorted(path.parent for path in folder.glob("*/run.yaml"))
    if not found and not as_json:
        raise ConfigError(f"{folder} holds no runs (no {folder}/*/run.yaml). Train one, or name another folder.")
    return _show("runs", {"runs": [_line(run) for run in _open(found)]}, as_json)


@app.command()
def show(run: Run, lang: Lang = None, as_json: AsJson = False) -> int:
    """Show one run in short, and write its page, report.html."""
    from loratune.api import write_report

    opened = _open([run])[0]
    page = write_report(run, lang and lang.value)
    return _show(opened.name, {**_line(opened), "page": str(page)}, as_json)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Two or more run directories.")],
    output: Annotated[Path | None, typer.Option("--output", help="Write the comparison as a page of its own.")] = None,
    lang: Lang = None,
    as_json: AsJson = False,
) -> int:
    """Compare runs: settings that differ, and a paired test on the held-out rows; curves together on the page."""
    if len(runs) < 2:
        raise ConfigError(f"{runs[0]} alone cannot be compared. Give two runs or more.")
    from loratune.report.run_page import compare_page, differences, paired_test

    opened = _open(runs)
    report: dict[str, Any] = {
        "runs": [_line(each) for each in opened],
        "differences": [dict(zip(["setting", *map(str, runs)], row)) for row in differences(opened)],
        "paired": [paired_test(opened[0], other) for other in opened[1:]],
    }
    if output is not None:
        from loratune import files

        files.atomic_write(output, compare_page(runs, lang.value if lang else language()))
        report["page"] = str(output)
    return _show("comparison", report, as_json)


@app.command()
def tensorboard(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run, the only one, has ended.")] = False,
    as_json: AsJson = False,
) -> int:
    """Write the curves of runs for TensorBoard, into RUN/tensorboard."""
    from loratune.report.tensorboard import export

    if follow and len(runs) > 1:
        raise ConfigError(f"--follow goes with one run; {len(runs)} are given. Use a terminal for each.")
    report = {"written": [str(export(run, follow=follow)) for run in runs], "look": f"tensorboard --logdir {runs[0]}"}
    return _show("for TensorBoard", report, as_json)


@app.command()
def clean(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it they are only named.")] = False,
    as_json: AsJson = False,
) -> int:
    """Remove the checkpoints of runs that have ended; adapters, metrics and pages stay."""
    from loratune import files

    folders = [run.folder / "checkpoints" for run in _open(runs) if run.has_ended]
    found = [folder for folder in folders if folder.is_dir()]
    size = sum(path.stat().st_size for folder in found for path in folder.rglob("*") if path.is_file())
    for folder in found if yes else []:
        files.remove_directory(folder)
    key = "removed" if yes else "would remove (--yes does it)"
    return _show("checkpoints of ended runs", {key: [str(folder) for folder in found], "bytes": size}, as_json)


def _show(title: str, report: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print_json(report)
        return 0
    from rich.console import Console

    show_report(Console(), title, report)
    return 0
