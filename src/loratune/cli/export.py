"""`loratune export`: a tuned model for others to load."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from loratune.cli.options import AsJson, BaseModelName, RunOrAdapter, adapter_folder, print_json, show_report


class Target(StrEnum):
    """What can be exported to."""

    merged = "merged"


def export(
    source: RunOrAdapter,
    output: Annotated[Path, typer.Option("--output", help="The folder to write; it must not exist yet.")],
    to: Annotated[Target, typer.Option("--to", help="merged: a plain model, the adapter added into its weights.")],
    model: BaseModelName = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16; left out, weights keep the type they have."),
    ] = None,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Write it although rounding loses over 5% of the update.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    as_json: AsJson = False,
) -> int:
    """Write the tuned model as a plain one that needs no adapter."""
    folder = adapter_folder(source)
    from rich.console import Console

    from loratune import api

    console = Console(stderr=as_json)
    write = {Target.merged: api.export_merged}[to]

    def notify(message: str) -> None:
        console.print(message, style="dim", markup=False, highlight=False, soft_wrap=True)

    report = write(folder, output, model=model, dtype=dtype, accept_loss=accept_loss, dry_run=dry_run, notify=notify)
    if as_json:
        print_json(report)
    else:
        show_report(console, f"{'would write' if dry_run else 'wrote'} {output}", report)
    return 0
