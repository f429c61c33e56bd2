"""A run as one page of its own: opens offline, light or dark as the reader's screen is, in English or Ukrainian."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from loratune.errors import AdapterError
from loratune.report import charts
from loratune.report.charts import Series, line_chart
from loratune.report.figures import tag
from loratune.report.ladder_page import SHOWN_THERE, section
from loratune.report.run_files import RunFiles, paired
from loratune.report.run_texts import TEXTS
from loratune.report.task_page import task_section

_STYLE = """
:root { --surface: #fcfcfb; --raised: #f4f3ef; --ink: #0b0b0b; --soft: #52514e; --grid: #e1e0d9; --good: #0b7a3b;
  --bad: #b3261e; --c0: #2a78d6; --c1: #eb6834; --c2: #0f9d7a; --c3: #9b51c8; --c4: #b58900; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --surface: #1a1a19; --raised: #242423; --ink: #f2f1ec; --soft: #c3c2b7;
  --grid: #383835; --good: #52c98a; --bad: #ff8a80; --c0: #3987e5; --c1: #f0803c; --c2: #35c7a0; --c3: #bd84e0;
  --c4: #d9b23a } }
* { box-sizing: border-box }
body { margin: 0; background: var(--surface); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 880px; margin: 0 auto; padding: 28px 20px 60px }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: break-word }
h2 { font-size: 18px; margin: 36px 0 6px }
p { margin: 6px 0 } .note { color: var(--soft); font-size: 14px } .soft { color: var(--soft) }
.verdict { font-size: 18px; padding: 12px 16px; background: var(--raised); border-left: 4px solid var(--soft);
  border-radius: 4px; margin: 16px 0 }
.verdict.better { border-color: var(--good) } .verdict.worse { border-color: var(--bad) }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 390px), 1fr)); gap: 8px 28px }
figure { margin: 12px 0 } figcaption { font-weight: 600; font-size: 14px }
.keys { font-size: 13px; color: var(--soft) }
.key { display: inline-block; width: 12px; height: 3px; margin: 0 6px 4px 12px }
.k0 { background: var(--c0) } .k1 { background: var(--c1) } .k2 { background: var(--c2) } .k3 { background: var(--c3) }
.k4 { background: var(--c4) }
.wide { overflow-x: auto; margin: 14px 0 } table { border-collapse: collapse; font-size: 14px; width: 100% }
td, th { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--grid); vertical-align: top }
th { color: var(--soft); font-weight: 500 } td { overflow-wrap: break-word; white-space: pre-wrap }
td.name { white-space: nowrap }
pre { background: var(--raised); padding: 12px 14px; border-radius: 4px; overflow-x: auto; font-size: 13px;
  line-height: 1.45 }
details > summary { cursor: pointer; color: var(--soft) }
"""


def run_page(folder: Path, language: str = "en") -> str:
    """Returns the page of one run, from the files of its directory; raises ConfigError for a directory that is none."""
    run, text = RunFiles.open(folder), TEXTS[language]
    title = text["title"].format(name=run.name)
    parts = [
        tag("h1", title),
        _heading(run, text),
        _verdict(run, text),
        section(folder, language),
        _curves([run], text),
        task_section(run, language),
        _trained(run, text),
        _spectra(run, text),
        _samples(run, text),
        _rows(run, text),
        _use(run, text),
        _settings(run, text),
        _events(run, text),
    ]
    return page(title, "".join(parts), language)


def compare_page(folders: Sequence[Path], language: str = "en") -> str:
    """Returns the page that holds runs against each other: curves together, differing settings, paired tests."""
    runs, text = [RunFiles.open(folder) for folder in folders], TEXTS[language]
    title = text["compare"].format(count=len(runs))
    tests = [_paired_line(runs[0], other, text) for other in runs[1:]]
    names = " · ".join(run.name for run in runs)
    parts = [
        tag("h1", title),
        tag("p", names, class_="soft"),
        "".join(tag("p", line, class_="verdict") for line in tests),
        _curves(runs, text),
        tag("h2", text["difference"]),
        _table([text["setting"], *(run.name for run in runs)], differences(runs)),
    ]
    return page(title, "".join(parts), language)


def differences(runs: Sequence[RunFiles]) -> list[list[str]]:
    """Returns the settings that are not the same in all runs: a row of the name and each run's value."""
    names = list(dict.fromkeys(each.name for run in runs for each in run.settings))
    rows = [[name, *(run.setting(name) or "-" for run in runs)] for name in names if name != "output"]
    return [row for row in rows if len(set(row[1:])) > 1]


def page(title: str, body: str, language: str) -> str:
    """Returns a whole page that needs nothing from elsewhere; `body` is markup."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        + tag("title", title)
        + tag("style", raw=_STYLE + charts.STYLE)
    )
    return (
        f'<!doctype html>\n<html lang="{language}">{tag("head", raw=head)}<body>{tag("main", raw=body)}</body></html>\n'
    )


def verdict(run: RunFiles) -> str:
    """Returns better, same, worse or unknown: what the held-out rows say of the weights that were kept.

    Over the difference of each document where that is on record, else whether the intervals overlap.
    """
    before, kept = run.before, run.kept
    if before is None or kept is None:
        return "unknown"
    difference = paired(run, 0, run, kept["step"])
    low, high = (kept["low"] - before["high"], kept["high"] - before["low"]) if difference is None else difference[1:]
    return "better" if high < 0 else "worse" if low > 0 else "same"


def _verdict(run: RunFiles, text: Mapping[str, str]) -> str:
    found, before, kept = verdict(run), run.before, run.kept
    figures = {} if kept is None else {name: f"{kept[name]:.3f}" for name in ("low", "high")}
    if before is not None and kept is not None:
        figures |= {"before": f"{before['loss']:.3f}", "after": f"{kept['loss']:.3f}"}
    lines = [text[found].format(**figures)]
    if not run.has_ended:
        lines.append(text["unfinished"].format(done=len(run.steps)))
    if run.about.get("label"):
        lines.append(text["changed"])
    return tag("p", raw="<br>".join(map(escape, lines)), class_=f"verdict {found}")


def _heading(run: RunFiles, text: Mapping[str, str]) -> str:
    parts = [run.setting("model"), run.setting("data.train")]
    if run.kept is not None:
        parts.append(text["best"].format(step=run.kept["step"]))
    return tag("p", " · ".join(part for part in parts if part), class_="soft")


def _curves(runs: Sequence[RunFiles], text: Mapping[str, str]) -> str:
    alone = len(runs) == 1
    losses: list[Series] = []
    for colour, run in enumerate(runs):
        name = text["training"] if alone else run.name
        losses.append(Series(name, _points(run.steps, "loss"), colour))
        held = [(float(event["step"]), float(event["loss"])) for event in run.evaluations]
        intervals = [(float(event["low"]), float(event["high"])) for event in run.evaluations]
        losses.append(Series(text["held_out"], held, 1 if alone else colour, lined=False, intervals=intervals))
    whole = _figure(text["loss"], losses, text, legend=[each for each in losses if alone or each.lined])
    rest = "".join(
        _figure(
            text[label],
            [Series(run.name, _points(run.steps, key, scale), colour) for colour, run in enumerate(runs)],
            text,
            width=charts.NARROW,
        )
        for label, key, scale in (
            ("rate", "learning_rate", 1.0), ("speed", "tokens_per_second", 1.0), ("norm", "grad_norm", 1.0),
            ("memory", "memory_bytes", 1e-9),
        )
    )  # fmt: skip
    return whole + tag("p", text["loss_note"], class_="note") + tag("div", raw=rest, class_="charts")


def _points(steps: Sequence[Mapping[str, Any]], key: str, scale: float = 1.0) -> list[tuple[float, float]]:
    return [(float(step["step"]), float(step[key]) * scale) for step in steps if step.get(key) is not None]


def _figure(
    title: str,
    series: Sequence[Series],
    text: Mapping[str, str],
    legend: Sequence[Series] = (),
    width: int = charts.WIDE,
) -> str:
    drawing = line_chart(series, title, text["step"], width)
    if not drawing:
        return ""
    keys = "".join(
        tag("span", class_=f"key k{each.colour % charts.NUM_COLOURS}") + escape(each.name) for each in legend
    )
    caption = tag("figcaption", raw=escape(title) + tag("span", raw=keys, class_="keys"))
    return tag("figure", raw=caption + drawing)


def _trained(run: RunFiles, text: Mapping[str, str]) -> str:
    return tag("h2", text["trained"]) + tag("pre", run.summary) if run.summary else ""


def _spectra(run: RunFiles, text: Mapping[str, str]) -> str:
    """The spectrum of each group of updates, or why it cannot be told."""
    from loratune.report.adapters import info  # torch: only where there is an adapter to look at

    if not run.about:
        return ""
    try:
        groups = [group for group in info(run.folder / "adapter")["groups"] if group["spectrum"]]
    except AdapterError as error:  # the page of a run whose adapter was touched since shows the rest
        return tag("h2", text["spectrum"]) + tag("p", str(error), class_="note")
    shown = groups[: charts.NUM_COLOURS + 3]
    series = [
        Series(group["name"], [(i + 1.0, value) for i, value in enumerate(group["spectrum"])], colour)
        for colour, group in enumerate(shown)
    ]
    figure = _figure("", series, {**text, "step": "i"}, legend=series)
    return tag("h2", text["spectrum"]) + tag("p", text["spectrum_note"], class_="note") + figure if figure else ""


def _samples(run: RunFiles, text: Mapping[str, str]) -> str:
    by_prompt: dict[str, dict[str, str]] = {}
    for sample in run.samples:
        row = by_prompt.setdefault(sample["prompt"], {"reference": sample["reference"]})
        row[sample["when"]] = sample["answer"]
    if not by_prompt:
        return ""
    blocks = ""
    for prompt, row in by_prompt.items():
        answers = [[text[key], row[key].strip()] for key in ("before", "after", "reference") if key in row]
        blocks += _table(None, [[text["prompt"], prompt], *answers])
    return tag("h2", text["samples"]) + tag("p", text["samples_note"], class_="note") + blocks


def _rows(run: RunFiles, text: Mapping[str, str]) -> str:
    """The row ledger: the counts and notes of each file or split, and each rejected row with its reason."""
    splits = [line for line in run.ledger if "rows_in" in line]
    if not splits:
        return ""
    names = ("rows_in", "rows_trained", "held_out", "rejected")
    columns = {name: "held_out_rows" if name == "held_out" else name for name in names}
    counts = [[text[line["split"]], *(f"{line.get(name, 0):,}" for name in columns)] for line in splits]
    notes = [
        [f"{text[line['split']]}: {name}", f"{note['count']:,}", "\n".join(note["examples"])]
        for line in splits
        for name, note in line["notes"].items()
    ]
    rejected = [[f"{line['source']}:{line['line']}", line["reason"]] for line in run.ledger if "reason" in line]
    tables = _table(["", *(text[name] for name in columns.values())], counts)
    return tag("h2", text["rows"]) + tables + "".join(_table(None, rows[:50]) for rows in (notes, rejected) if rows)


def _use(run: RunFiles, text: Mapping[str, str]) -> str:
    folder = str(run.folder)
    commands = (
        ("use_chat", f"loratune chat {folder}"),
        ("use_merge", f"loratune export {folder} --to merged --output merged/{run.name}"),
        ("use_python", "\n".join((
            "import loratune", "",
            f'model, tokenizer = loratune.load_model("{run.setting("model")}")',
            f'attached = loratune.load_adapter(model, "{folder}/adapter")',
        ))),
    )  # fmt: skip
    blocks = "".join(tag("p", text[key], class_="note") + tag("pre", command) for key, command in commands)
    return tag("h2", text["use"]) + blocks if run.about else ""


def _settings(run: RunFiles, text: Mapping[str, str]) -> str:
    given = [[each.name, each.value, each.origin] for each in run.settings if each.origin != "default"]
    rest = [[each.name, each.value, each.origin] for each in run.settings if each.origin == "default"]
    header = [text["setting"], text["value"], text["origin"]]
    more = tag("details", raw=tag("summary", f"default: {len(rest)}") + _table(header, rest))
    note = tag("p", text["settings_note"], class_="note")
    return tag("h2", text["settings"]) + note + _table(header, given) + more


def _events(run: RunFiles, text: Mapping[str, str]) -> str:
    """What is on record besides steps and evaluations: memory that ran out, warnings, a run taken up again."""
    elsewhere = ("step", "evaluation", "checkpoint", *SHOWN_THERE)
    others = [event for event in run.events if event.get("event") not in elsewhere]
    rows = [[str(event.get("event")), _told(event)] for event in others]
    return tag("h2", text["events"]) + _table(None, rows) if rows else ""


def _told(event: Mapping[str, Any]) -> str:
    return str(event.get("message") or ", ".join(f"{key} {value}" for key, value in event.items() if key != "event"))


def paired_test(one: RunFiles, other: RunFiles) -> dict[str, Any]:
    """Returns the difference of two runs' kept held-out losses per token, other less one, with its 95% interval, and
    who is better; without figures where they were not evaluated on the same rows."""
    names = {"one": one.name, "other": other.name}
    first, second = one.kept, other.kept
    found = None if first is None or second is None else paired(one, first["step"], other, second["step"])
    if found is None:
        return {**names, "verdict": "unpaired"}
    better = "second_better" if found.high < 0 else "first_better" if found.low > 0 else "no_difference"
    return {**names, **found._asdict(), "rows": len(one.documents["labels"]), "verdict": better}


def _paired_line(one: RunFiles, other: RunFiles, text: Mapping[str, str]) -> str:
    test = paired_test(one, other)
    words = text[test["verdict"]].format(**test)
    if "value" not in test:
        return words
    figures = {name: f"{test[name]:+.4f}" for name in ("value", "low", "high")}
    return text["paired"].format(**{**test, **figures, "verdict": words})


def _table(header: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> str:
    head = "" if header is None else tag("tr", raw="".join(tag("th", cell) for cell in header))
    return tag("div", raw=tag("table", raw=head + "".join(_cells(rows))), class_="wide")


def _cells(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for name, *cells in rows:
        yield tag("tr", raw=tag("td", name, class_="name") + "".join(tag("td", cell) for cell in cells))
