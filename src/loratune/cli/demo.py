"""`loratune demo`: the whole tool on a small real model, in one command."""

from pathlib import Path
from typing import Annotated

import typer

from loratune.cli.options import AsJson


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and sentences: to see that it works.")] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Another base model: folder, hub id or GGUF file."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="The run directory to write; left out, runs/demo or the next free number."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Teach Gemma 3 270M to restore punctuation and capitals in Ukrainian, and show before and after."""
    from loratune.cli.panel import Panel, exit_code
    from loratune.demo.run import next_free, run_demo

    with Panel("loratune demo", as_json=as_json) as panel:
        result = run_demo(
            model=model, output=output or next_free(Path("runs/demo")), quick=quick, on_event=panel, say=panel.say
        )
    return exit_code(result)
