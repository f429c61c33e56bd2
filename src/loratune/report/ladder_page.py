"""A ladder as a section of its run's page, and as the text that a terminal ends with."""

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from loratune.report.charts import NUM_COLOURS, Series, line_chart
from loratune.report.figures import tag
from loratune.report.ladder_texts import TEXTS, change, losses_on_test_rows, verdict, why

_RECORD = "ladder.json"
# Events that the section tells of, or that a step back has undone.
SHOWN_THERE = ("arm", "rung", "decision", "abandoned_step", "abandoned_evaluation")
_COLUMNS = ("rung", "parameters", "steps", "step_seconds", "memory", "change")


def section(folder: Path, language: str = "en") -> str:
    """Returns the section of a run: verdict, rungs, quality against cost, decisions, test; empty if it is no ladder."""
    file = folder / _RECORD
    if not file.is_file():
        return ""
    record, text = json.loads(file.read_bytes()), TEXTS[language]
    all_steps = record["steps"] + record["overhead_steps"]
    cost = text["cost"].format(
        steps=record["overhead_steps"], all=all_steps, seconds=f"{record['overhead_seconds']:.1f}"
    )
    rows = text["rows"].format(
        validation=record["validation_rows"], test=record["test_rows"], trial=record["trial_steps"]
    )
    decisions = [[str(each["step"]), why(each, language)] for each in record["decisions"]]
    return "".join(
        (
            tag("h2", text["heading"]),
            tag("p", f"{verdict(record, language)} {text['chosen'].format(**record)}", class_="verdict"),
            _table([text[name] for name in _COLUMNS], rung_rows(record, language)),
            _figure(record, text),
            tag("p", losses_on_test_rows(record, language)),
            _table([text["step"], text["decision"]], decisions),
            tag("p", f"{rows} {cost}", class_="note"),
        )
    )


def rung_rows(record: Mapping[str, Any], language: str = "en") -> list[list[str]]:
    """Returns a row of the table for each rung; what was not tried has no figures. The rung that was chosen: *."""
    return [
        [
            rung["name"] + (" *" if rung["name"] == record["chosen"] else ""),
            _shown(rung["parameters"], lambda value: f"{value:,}"),
            str(rung["steps"]),
            _shown(rung["step_seconds"], lambda value: f"{value:.3g}"),
            _shown(rung["memory_bytes"], lambda value: f"{value / 1e9:.2f} GB"),
            change(rung["difference"], language) if rung["difference"] else "" if rung["parameters"] else "-",
        ]
        for rung in record["rungs"]
    ]


def _shown(value: Any, write: Callable[[Any], str]) -> str:
    return "-" if value is None else write(value)


def terminal(record: Mapping[str, Any], width: int = 80) -> str:
    """Returns the table, the verdict and the test as plain text."""
    text = TEXTS["en"]
    rows = [[text[name] for name in _COLUMNS], *rung_rows(record)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [_aligned(row, widths) for row in rows]
    told = (verdict(record), losses_on_test_rows(record))
    return "\n".join(["", *lines, "", *(textwrap.fill(part, width) for part in told)])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *numbers, last = row
    middle = [cell.rjust(width) for cell, width in zip(numbers, widths[1:])]
    return "  ".join([first.ljust(widths[0]), *middle, last]).rstrip()


def _figure(record: Mapping[str, Any], text: Mapping[str, str]) -> str:
    """Quality against cost: the loss of each trial's arms over the logarithm of their parameters."""
    trials = [each for each in record["decisions"] if "arms" in each]
    series = [_line(each, trials[0]["arms"][0]["parameters"], colour, text) for colour, each in enumerate(trials)]
    keys = "".join(tag("span", class_=f"key k{each.colour % NUM_COLOURS}") + escape(each.name) for each in series)
    caption = tag("figcaption", raw=escape(text["figure"]) + tag("span", raw=keys, class_="keys"))
    drawing = line_chart(series, text["figure"], text["doublings"])
    return tag("figure", raw=caption + drawing) + tag("p", text["figure_note"], class_="note")


def _line(decision: Mapping[str, Any], first: int, colour: int, text: Mapping[str, str]) -> Series:
    arms = [arm for arm in decision["arms"] if "loss" in arm]
    return Series(
        name=text["trial_at"].format(step=decision["step"]),
        points=[(math.log2(arm["parameters"] / first), arm["loss"]) for arm in arms],
        colour=colour,
        intervals=[(arm["low"], arm["high"]) for arm in arms],
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = tag("tr", raw="".join(tag("th", cell) for cell in header))
    body = "".join(tag("tr", raw="".join(tag("td", cell) for cell in row)) for row in rows)
    return tag("div", raw=tag("table", raw=head + body), class_="wide")
