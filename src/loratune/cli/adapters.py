"""`loratune adapters`: what an adapter is."""

import typer

from loratune.cli.options import AsJson, RunOrAdapter, adapter_folder, print_json, show_report

app = typer.Typer(help="Look into adapters.", invoke_without_command=True)


@app.callback()
def adapters(context: typer.Context) -> int:
    """Look into adapters."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    return 0


@app.command("info")
def info(
    path: RunOrAdapter,
    as_json: AsJson = False,
) -> int:
    """Show an adapter's settings, sites, ranks, size and norms; no base model is loaded."""
    folder = adapter_folder(path)
    from rich.console import Console

    from loratune import api

    report = api.adapter_info(folder)
    if as_json:
        print_json(report)
    else:
        show_report(Console(), str(folder), report)
    return 0
