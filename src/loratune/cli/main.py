"""The `loratune` command: its verbs in groups, one clean line for an error a user can meet, and the exit codes.

0 done, 1 failed while running, 2 wrong usage, configuration or data, 75 stopped early but resumable, 130 interrupted
at once. A verb returns its exit code. Nothing heavy is imported here: `loratune --help` has to answer in 0.3 s.
"""

import json
import sys
import traceback
from typing import Annotated, Any

import typer
import typer.core

from loratune.cli import adapters, chat, data, demo, doctor, eval, explain, export, ladder, plan, runs, train
from loratune.errors import LoratuneError

INTERRUPTED = 130
UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # typer names only this subclass of it


class _Verbs(typer.core.TyperGroup):
    """Lists the verbs, and so their panels, in this order; typer puts those with verbs of their own last."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


_ORDER = ("demo", "explain", "doctor", "data", "plan", "train", "ladder", "chat", "eval", "export", "adapters", "runs")

app = typer.Typer(
    name="loratune",
    cls=_Verbs,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo", rich_help_panel="Learn")(demo.demo)
app.command("explain", rich_help_panel="Learn")(explain.explain)
app.command("doctor", rich_help_panel="Learn")(doctor.doctor)
app.add_typer(data.app, name="data", rich_help_panel="Data and plan")
app.command("plan", rich_help_panel="Data and plan")(plan.plan)
app.command("train", rich_help_panel="Train")(train.train)
app.command("ladder", rich_help_panel="Train")(ladder.ladder)
app.command("chat", rich_help_panel="Use")(chat.chat)
app.command("eval", rich_help_panel="Use")(eval.evaluate)
app.command("export", rich_help_panel="Use")(export.export)
app.add_typer(adapters.app, name="adapters", rich_help_panel="Use")
app.add_typer(runs.app, name="runs", rich_help_panel="Use")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> int:
    """Fine-tune transformer models with LoRA: exact, fast, and nothing fails silently.

    Start with [bold]loratune demo[/bold]: it tunes a small real model and shows what changed.
    """
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"loratune {installed('loratune')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    return 0


def main() -> None:
    """Runs the command line and exits with its code: the entry point of the package."""
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Runs one command line and returns its exit code; every error has been shown by then."""
    as_json = "--json" in args
    try:
        return app(args, prog_name="loratune", standalone_mode=False) or 0
    except LoratuneError as error:
        return _report(error, str(error), error.exit_code, as_json)
    except UsageError as error:
        return _report(error, _usage_message(error), 2, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        hint = "This was not expected. Please report it with the lines above and the command you ran."
        return _report(error, f"{type(error).__name__}: {error}\n{hint}", 1, as_json)


def _usage_message(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "loratune"
    message = error.format_message() if hasattr(error, "format_message") else str(error)  # pyright: ignore
    message = " ".join(message.split()).removesuffix(".")  # typer puts choices on lines of their own
    return f"{message}{'' if message.endswith('?') else '.'} See '{command} --help'."


def _report(error: Exception, message: str, exit_code: int, as_json: bool) -> int:
    if as_json:
        kind = type(error).__name__ if isinstance(error, LoratuneError) or exit_code == 1 else "UsageError"
        typer.echo(json.dumps({"error": {"type": kind, "message": message, "exit_code": exit_code}}))
    else:
        shown = data.UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], message)  # it may quote a row of anybody's
        typer.secho(f"error: {shown}", fg=typer.colors.RED, err=True)
    return exit_code
