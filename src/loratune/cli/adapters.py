"""`loratune adapters`: what an adapter is, how two differ, who can load it, and other formats of it."""

import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratune.cli.options import AsJson, RunOrAdapter, adapter_folder, print_json, show_report, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

app = typer.Typer(help="Look into adapters, compare, check and convert them.", invoke_without_command=True)

_BARS = "▁▂▃▄▅▆▇█"
# measure -> (heading, whether its bars go from 0 to 1 rather than from the least to the largest value)
_MEASURES: dict[str, tuple[str, bool]] = {
    "norm_update": ("size of the update, ‖s B A‖", False),
    "effective_rank": ("directions in use, effective rank", False),
    "amplification": ("amplification of W, ‖s B A‖ / ‖Uᵀ W V‖", False),
    "similarity_top": ("similarity of the top direction, φ(1, 1)", True),
    "similarity_span": ("similarity of the whole spans, φ(r, r)", True),
    "distance": ("distance of the updates, ‖Δ₁ - Δ₂‖ / ‖Δ₁‖", False),
}
_MARKS = {"refuse": ("✗", "red"), "note": ("·", "yellow")}


class Format(StrEnum):
    """What an adapter can be converted to."""

    peft = "peft"
    mlx = "mlx"


class Layout(StrEnum):
    """What an adapter can be converted from, where its files do not tell."""

    peft = "peft"
    peft_0_18 = "peft-0.18"
    mlx = "mlx"


class Precision(StrEnum):
    """The types that tensors can be stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.callback()
def adapters(context: typer.Context) -> int:
    """Look into adapters, compare, check and convert them."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    return 0


@app.command("info")
def info(
    path: RunOrAdapter,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Load this base model too, and show how much W is amplified."),
    ] = None,
    sites: Annotated[bool, typer.Option("--sites", help="List every site.")] = False,
    as_json: AsJson = False,
) -> int:
    """Show an adapter's settings, sites, ranks, norms and singular spectra."""
    folder = adapter_folder(path)
    from loratune import api

    console = _console(as_json)

    def notify(message: str) -> None:
        console.print(message, style="dim", markup=False, highlight=False, soft_wrap=True)

    report = api.adapter_info(folder, model=model, notify=notify)
    if as_json:
        print_json(report)
        return 0
    config = report["config"]
    settings = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "modules_to_save", "task_type")
    facts = {name: config[name] for name in settings if config.get(name) not in (None, "none", False)}
    counts = {"sites": len(report["sites"]), "parameters": report["num_parameters"], "bytes": report["bytes"]}
    show_report(console, str(folder), {"base model": report["base"]["name"], **facts, **counts})
    _show_groups(console, report["groups"])
    _show_spectra(console, report["groups"])
    if sites:
        _show_sites(console, report["sites"])
    _show_notes(console, report["notes"])
    return 0


@app.command("diff")
def diff(
    one: Annotated[Path, typer.Argument(metavar="ONE", help="A run or an adapter.", show_default=False)],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another one.", show_default=False)],
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="FILE.svg", help="Write the similarities as a figure.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Compare two adapters: settings, the subspaces they use, and their updates, layer by layer."""
    folders = adapter_folder(one), adapter_folder(other)
    from loratune import api

    report = api.adapter_diff(*folders, figure=figure)
    if as_json:
        print_json(report)
        return 0
    console = _console(as_json)
    _show_difference(console, report)
    _show_groups(console, report["groups"])
    _show_notes(console, report["notes"])
    if figure is not None:
        console.print(f"\nwrote {figure}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _show_difference(console: "Console", report: Mapping[str, Any]) -> None:
    """What the two are, and the settings that differ."""
    lines = [f"{name}  {report[key]}" for name, key in (("first ", "one"), ("second", "other"))]
    alone = [
        f"{len(report[key])} only in the {name}" for name, key in (("first", "only_one"), ("second", "only_other"))
    ]
    lines.append(", ".join([f"sites   {report['num_shared']} in both", *alone]))
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = _table(("", "first", "second"))
    for each in report["settings"]:
        table.add_row(each["setting"], shown(each["one"]), shown(each["other"]))
    if report["settings"]:
        _show_table(console, "settings that differ", table)


@app.command("check")
def check(
    path: RunOrAdapter,
    consumers: Annotated[
        str | None, typer.Option("--for", metavar="NAMES", help="Some of peft, vllm, llama.cpp; all if left out.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Say what PEFT, vLLM and llama.cpp will refuse; exit code 2 if one of them refuses."""
    folder = adapter_folder(path)
    from loratune import api

    names = None if consumers is None else [name.strip() for name in consumers.split(",")]
    report = api.adapter_check(folder, names)
    refused = any(each["severity"] == "refuse" for findings in report.values() for each in findings)
    if as_json:
        print_json({"path": folder, "refused": refused, "consumers": report})
    else:
        _show_findings(_console(as_json), folder, report)
    return 2 if refused else 0


@app.command("convert")
def convert(
    source: RunOrAdapter,
    target: Annotated[Path, typer.Argument(metavar="NEW", help="The folder to write; it must not exist yet.")],
    to: Annotated[Format, typer.Option("--to", help="The format to write.")],
    layout: Annotated[
        Layout | None, typer.Option("--from", help="What SOURCE is, where its files do not tell.")
    ] = None,
    dtype: Annotated[Precision | None, typer.Option("--dtype", help="Store tensors in this type.")] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="The best approximation of this rank, one scale for all sites.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Write an adapter in another format, precision or rank."""
    folder = adapter_folder(source)
    from loratune import api

    report = api.adapter_convert(folder, target, to.value, layout=layout, dtype=dtype, rank=rank)
    if as_json:
        print_json(report)
    else:
        show_report(_console(as_json), f"wrote {target}", report)
    return 0


def _console(as_json: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=as_json)


def bars(values: Sequence[float | None], width: int, low: float, high: float) -> str:
    """Returns one bar a value from `low` to `high`, `·` for None; more values than `width` are averaged in turn."""
    count = min(len(values), width)
    edges = [round(index * len(values) / count) for index in range(count + 1)] if count else []
    shares = [[value for value in values[a:b] if value is not None] for a, b in pairwise(edges)]
    return "".join(_bar(sum(own) / len(own), low, high) if own else "·" for own in shares)


def _bar(value: float, low: float, high: float) -> str:
    share = (value - low) / (high - low) if high > low else 0.5
    return _BARS[round(min(max(share, 0.0), 1.0) * (len(_BARS) - 1))]


def _table(columns: Iterable[str]) -> "Table":
    """Returns a table without lines: two left columns of names, numbers to the right, bars last."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(columns):
        numeric = index > 1 and not name.startswith(("layer", "i ="))
        table.add_column(name, justify="right" if numeric else "left", header_style="dim", no_wrap=True)
    return table


def _show_table(console: "Console", heading: str, table: "Table") -> None:
    """Shows a heading, which may be wider than its table, and the table."""
    console.print(f"\n[bold]{heading}[/]", highlight=False)
    console.print(table)


def _show_groups(console: "Console", groups: Sequence[Mapping[str, Any]]) -> None:
    """One table a measure, one line a projection: least, median and largest value, and bars over the layers."""
    width = min(64, max(16, console.width - 60))
    for measure, (heading, is_share) in _MEASURES.items():
        own = [group for group in groups if measure in group]
        if not own:
            continue
        table = _table(("", "", "min", "median", "max", _layers(own)))
        for group in own:
            summary = group[measure]
            low, high = (0.0, 1.0) if is_share else (summary["min"] or 0.0, summary["max"] or 0.0)
            drawn = bars(summary["by_layer"], width, low, high)
            numbers = [_number(summary[name]) for name in ("min", "median", "max")]
            table.add_row(group["role"], shown(group["name"]), *numbers, f"[cyan]{drawn}[/]")
        _show_table(console, heading, table)


def _layers(groups: Sequence[Mapping[str, Any]]) -> str:
    longest = max((group["layers"] for group in groups), key=len)
    return f"layers {longest[0]} to {longest[-1]}" if len(longest) > 1 else "layer"


def _show_spectra(console: "Console", groups: Sequence[Mapping[str, Any]]) -> None:
    own = [group for group in groups if group["spectrum"]]
    if not own:
        return
    table = _table(("", "", "last", "i = 1 to r"))
    for group in own:
        drawn = bars(group["spectrum"], 64, 0.0, 1.0)
        table.add_row(group["role"], shown(group["name"]), _number(group["spectrum"][-1]), f"[cyan]{drawn}[/]")
    _show_table(console, "singular values of the update, σᵢ / σ₁, median", table)


def _show_sites(console: "Console", sites: Sequence[Mapping[str, Any]]) -> None:
    columns = {"r": "r", "scale": "scale", "norm_update": "‖s B A‖", "effective_rank": "eff. rank"}
    columns |= {"amplification": "amplif."} if "amplification" in sites[0] else {}
    table = _table(("path", "σ₁ to σᵣ", *columns.values()))
    width = min(16, max(8, shutil.get_terminal_size().columns // 8))
    for site in sites:
        values = site["singular_values"]
        drawn = bars(values, width, 0.0, values[0]) if values and values[0] else "-"
        table.add_row(shown(site["path"]), f"[cyan]{drawn}[/]", *(_number(site[name]) for name in columns))
    _show_table(console, "sites", table)


def _show_notes(console: "Console", notes: Sequence[str]) -> None:
    for note in notes:
        console.print(f"\n{note}", style="dim", markup=False, highlight=False)


def _show_findings(console: "Console", folder: Path, report: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    for name, findings in report.items():
        refused = sum(each["severity"] == "refuse" for each in findings)
        verdict = f"refuses or misreads it: {refused} {'reason' if refused == 1 else 'reasons'}" if refused else "ok"
        console.print(Text.assemble((f"{name:<10}", "bold"), (verdict, "red" if refused else "green")))
        for each in findings:
            mark, style = _MARKS[each["severity"]]
            console.print(Padding(Text.assemble((f"{mark} ", style), f"{each['what']}."), (0, 0, 0, 2)))
            console.print(Padding(Text(each["advice"], style="dim"), (0, 0, 0, 4)))
            if each["command"]:  # on one line, to be copied
                command = each["command"].replace("ADAPTER", shlex.quote(str(folder)))
                console.print(f"    {command}", style="cyan", markup=False, highlight=False, soft_wrap=True)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if 0 < abs(value) < 5e-4:
        return f"{value:.0e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"
