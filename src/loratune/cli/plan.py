"""`loratune plan`: what a run will take on this machine, before it runs; takes the flags of `loratune train`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratune.cli.options import borrow_options, mapping, print_json
from loratune.cli.train import KEYS, targets_of, train
from loratune.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from loratune.plan.plan import Plan
    from loratune.plan.verdict import Change

DOES_NOT_FIT = 1
_OF_RUNS = ("resume", "allow_changed", "verify_resume")  # flags of train that go on with a run
_YAML = (".yaml", ".yml")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def plan(
    context: typer.Context,
    config: Path | None,
    output: Annotated[
        str | None,
        typer.Option(
            help="FILE.yaml: write the plan there, for train. Else the run directory.",
            metavar="FILE.YAML|DIR",
            show_default=False,
        ),
    ] = None,
    no_measure: Annotated[bool, typer.Option("--no-measure", help="Estimate only: the model is not loaded.")] = False,
    memory: Annotated[
        str | None,
        typer.Option(help="Plan for so much memory, not what is free now.", metavar="8GB", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that --output names.")] = False,
    **shared: Any,
) -> int:
    """Tell memory, time and disk of a run before it runs, measured on its own rows; exit code 1 if it does not fit."""
    given = {key: shared[name] for name, key in KEYS.items() if name != "output" and shared[name] is not None}
    if shared["column"]:
        given["data.columns"] = mapping(shared["column"], "--column", "prompt=question_text")
    if shared["target_modules"] is not None:
        given["adapter.target_modules"] = targets_of(shared["target_modules"])
    file = Path(output) if output is not None and output.lower().endswith(_YAML) else None
    if file is None and output is not None:
        given["output"] = output
    elif config is None:
        given["output"] = str(Path("runs", file.stem if file else "plan"))
    limit = None if memory is None else parse_bytes(memory)
    from loratune.train.config import load_run_config

    resolved = load_run_config(config, given)
    from rich.console import Console

    from loratune import api
    from loratune.plan import plan as planning

    if file is not None:
        planning.check_new(file, force)
    notes = Console(stderr=True)
    made = api.plan(
        resolved, measure=not no_measure, memory=limit, on_event=lambda event: _note(notes, event["message"])
    )
    if shared["as_json"]:
        print_json(made.to_json())
    else:
        _show(Console(), made)
    if file is not None and made.fits:
        planning.write(made, resolved, file, force=force)
        _note(notes, f"written: {file}; start it with: loratune train {file}")
    elif file is not None:
        _note(notes, f"{file} was not written: the run does not fit.")
    return 0 if made.fits else DOES_NOT_FIT


borrow_options(plan, train, without=_OF_RUNS)


def parse_bytes(text: str) -> int:
    """Returns the bytes that a size means: 8GB, 8 GiB, 500M; raises ConfigError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    num_bytes = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if num_bytes <= 0:
        raise ConfigError(f"--memory is {text!r}; expected a size such as 8GB or 500MB.")
    return num_bytes


def _note(console: "Console", message: str) -> None:
    console.print(message, style="dim", markup=False, highlight=False, soft_wrap=True)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _show(console: "Console", made: "Plan") -> None:
    from rich.padding import Padding
    from rich.text import Text

    console.print(Text(verdict(made), style="bold green" if made.fits else "bold red"))
    console.print()
    console.print(_figures(made))
    console.print(Text(f"\n{basis(made)}", style="dim"))
    for heading, lines in _sections(made):
        console.print(Text(f"\n{heading}", style="bold cyan"))
        for line in lines:
            text = line.lstrip()
            console.print(Padding(Text(text), (0, 0, 0, 2 + len(line) - len(text)), expand=False))


def verdict(made: "Plan") -> str:
    """Returns the first line: fits or not, and by which figures."""
    from loratune.plan.plan import gigabytes, span

    source = "estimated" if made.measured is None else "measured"
    memory = f"{gigabytes(made.memory)} of memory at the peak ({source})"
    if made.fits:
        tight = " It is tight: an estimate may be 10% off." if made.is_tight else ""
        return f"Fits: {memory}, of {gigabytes(made.limits.memory)}; {span(made.seconds)}.{tight}"
    if made.memory > made.limits.memory:
        return f"Does not fit: it takes {memory}; there are {gigabytes(made.limits.memory)}."
    disk = gigabytes(made.estimate.disk.most)
    return f"Does not fit: it takes {disk} of disk while it saves; {gigabytes(made.limits.disk)} are free."


def basis(made: "Plan") -> str:
    """Returns what the estimate of the time rests on."""
    from loratune.plan.estimate import EFFICIENCY

    return (
        f"Estimated time: operations at {made.flops / 1e9:,.0f} GFLOP/s, measured here on this model's matrices, of "
        f"which training reaches {EFFICIENCY:.0%} (bench/results/train.md)."
    )


def _figures(made: "Plan") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    table.add_column("estimated", justify="right", header_style="dim", no_wrap=True)
    table.add_column("measured", justify="right", header_style="dim", no_wrap=True)
    for name, *values in _rows(made):
        style = "dim" if name.startswith(" ") else ""
        table.add_row(Text(name, style), *(Text(value, style) for value in values))
    return table


def _rows(made: "Plan") -> Iterator[tuple[str, ...]]:
    """Yields name, estimate and, where there is one, measurement; parts are indented under what they add up to."""
    from loratune.plan.plan import duration, gigabytes, span

    found, measured = made.estimate, made.measured
    parts, times, work = found.memory, found.seconds, found.work
    low, high = made.step_seconds
    yield "memory at the peak", gigabytes(parts.total), gigabytes(measured.peak_bytes) if measured else ""
    yield "  Python, libraries, tokenizer, rows", gigabytes(parts.held)
    yield "  base model", gigabytes(parts.weights)
    yield f"  {found.num_trained:,} trained numbers", gigabytes(parts.trained)
    yield f"  largest micro-batch, {work.largest.tokens:,} tokens", gigabytes(parts.step)
    yield "time to finish", span(made.estimated_seconds), span(made.seconds) if measured else ""
    yield "  start", duration(times.start), duration(measured.start_seconds) if measured else ""
    yield f"  {work.num_steps:,} steps", duration(times.steps)
    step = f"{low:.3g} to {high:.3g} s" if measured else ""
    yield f"    one step, {work.typical.tokens:,} tokens", f"{times.step:.3g} s", step
    yield f"  {found.num_evaluations:,} evaluations", duration(times.evaluations)
    yield "  samples, at most", duration(times.samples), duration(measured.samples_seconds) if measured else ""
    yield "disk while it saves", gigabytes(found.disk.most)
    yield "disk afterwards", gigabytes(found.disk.left)


def _sections(made: "Plan") -> Iterator[tuple[str, list[str]]]:
    """Yields headings with their lines."""
    if made.advice is not None:
        yield _HEADINGS[made.advice.kind], [_change(each) for each in made.advice.changes]
        yield "What each change gives", [_change(each) for each in made.advice.tried]
    yield (
        "Who will load the adapter",
        [
            line
            for each in made.consumers
            for line in (f"{each.name}: {each.verdict}", *(f"  {x}" for x in each.findings))
        ],
    )
    if made.warnings:
        yield "Before you start", list(made.warnings)


def _change(change: "Change") -> str:
    from loratune.plan.plan import duration, gigabytes

    fits = ", fits" if change.fits else ""
    return f"{change.what}: {gigabytes(change.memory)}, {duration(change.seconds)}{fits}"


_HEADINGS = {
    "either": "Change one of these",
    "both": "Change both of these",
    "none": "No two changes are enough; the least that two give",
}
