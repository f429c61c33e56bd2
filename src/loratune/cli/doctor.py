"""`loratune doctor`: whether this machine is ready, line by line, with the command that mends what is not."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.cli.options import AsJson, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.explain.doctor import Check

_MARKS = {"ok": ("✓", "green"), "note": ("·", "yellow"), "bad": ("✗", "red")}


def doctor(as_json: AsJson = False) -> int:
    """Check Python, packages, processor, memory, disk, cache and extras; exit code 1 if something is not fine."""
    from loratune.explain.doctor import BAD, examine

    checks = examine(Path.cwd())
    is_fine = all(check.status != BAD for check in checks)
    if as_json:
        print_json({"ok": is_fine, "checks": [asdict(check) for check in checks]})
    else:
        _show(checks, is_fine)
    return 0 if is_fine else 1


def _show(checks: "Sequence[Check]", is_fine: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    last = ""
    for check in checks:
        found = Text(check.found, style="dim" if check.status == "note" else "")
        if check.command:
            found.append(f"\n{check.command}", style="cyan")
        table.add_row(Text(*_MARKS[check.status]), Text("" if check.name == last else check.name, "bold"), found)
        last = check.name
    console = Console()
    console.print(table, highlight=False)
    bad = sum(check.status == "bad" for check in checks)
    verdict = "Everything is fine." if is_fine else f"Not fine: {bad} of {len(checks)}; the commands above mend it."
    console.print(Text(f"\n{verdict}", style="green" if is_fine else "red"))
