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
from loratune.report.ladder_texts import TEXTS, best_of, change, losses_on_test_rows, verdict, why

_RECORD = "ladder.json"
# Events that the section tells of, or that a step back has undone.
SHOWN_THERE = ("arm", "rung", "decision", "abandoned_step", "abandoned_evaluation")
_COLUMNS = ("rung", "parameters", "steps", "step_seconds", "memory", "change")
_TOGETHER = ("configuration", "parameters", "dropped", "held_out", "above")


def section(folder: Path, language: str = "en") -> str:
    """Returns the section of a run: verdict, rungs, quality against cost, decisions, test; empty if it is no ladder."""
    file = folder / _RECORD
    if not file.is_file():
        return ""
    record, text = json.loads(file.read_bytes()), TEXTS[language]
    if record.get("kind") == "together":
        return _together(record, language)
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
    text, is_climb = TEXTS["en"], record.get("kind") != "together"
    names, body = (_COLUMNS, rung_rows(record)) if is_climb else (_TOGETHER[:-1], configuration_rows(record))
    rows = [[text[name] for name in names], *(row[: len(names)] for row in body)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    lines = [_aligned(row, widths) for row in rows]
    told = (verdict(record) if is_climb else best_of(record), losses_on_test_rows(record))
    return "\n".join(["", *lines, "", *(textwrap.fill(part, width) for part in told)])


def configuration_rows(record: Mapping[str, Any], language: str = "en") -> list[list[str]]:
    """Returns a row of the table for each of many configurations, the last to be dropped first; the best one: *."""
    text = TEXTS[language]
    ranked = sorted(
        record["configurations"], key=lambda each: (-(each["dropped"] or math.inf), each["loss"] or math.inf)
    )
    return [
        [
            each["name"] + (" *" if each["name"] == record["chosen"] else ""),
            f"{each['parameters']:,}",
            _shown(each["dropped"], text["failed_at" if each["failure"] else "lost_at"].replace("{step}", "{}").format),
            _shown(each["loss"], lambda loss, of=each: _with_interval(loss, of["low"], of["high"], text)),
            _shown(each["difference"], lambda difference: change(difference, language)),
        ]
        for each in ranked
    ]


def _with_interval(value: float, low: float, high: float, text: Mapping[str, str]) -> str:
    return text["interval"].format(value=f"{value:.4f}", low=f"{low:.4f}", high=f"{high:.4f}")


def _together(record: Mapping[str, Any], language: str) -> str:
    """The section of a contest: the best one, all of them, loss against size, what was decided, the test."""
    text, others = TEXTS[language], [name for name in record["survivors"] if name != record["chosen"]]
    kept = text["kept"].format(chosen=record["chosen"], others=", ".join(others)) if others else ""
    rows = text["rows_together"].format(validation=record["validation_rows"], test=record["test_rows"])
    cost = text["for_all"].format(**{**record, "seconds": f"{record['seconds']:.1f}"})
    decisions = [[str(each["step"]), why(each, language)] for each in record["decisions"]]
    return "".join(
        (
            tag("h2", text["together"]),
            tag("p", f"{best_of(record, language)} {kept}".rstrip(), class_="verdict"),
            _table([text[name] for name in _TOGETHER], configuration_rows(record, language)),
            _by_size(record["configurations"], text),
            tag("p", losses_on_test_rows(record, language)),
            _table([text["step"], text["decision"]], decisions) if decisions else "",
            tag("p", f"{rows} {cost}", class_="note"),
        )
    )


def _by_size(configurations: Sequence[Mapping[str, Any]], text: Mapping[str, str]) -> str:
    """The best loss of every configuration over the logarithm of its parameters."""
    known = [each for each in configurations if each["loss"] is not None]
    smallest = min(each["parameters"] for each in known)
    series = [
        Series(
            name=text[name],
            points=[(math.log2(each["parameters"] / smallest), each["loss"]) for each in some],
            colour=colour,
            lined=False,
            intervals=[(each["low"], each["high"]) for each in some],
        )
        for colour, (name, some) in enumerate(
            (
                ("to_the_end", [each for each in known if each["dropped"] is None]),
                ("dropped_early", [each for each in known if each["dropped"] is not None]),
            )
        )
        if some
    ]
    return _drawn(series, text, "by_size")


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *numbers, last = row
    middle = [cell.rjust(width) for cell, width in zip(numbers, widths[1:])]
    return "  ".join([first.ljust(widths[0]), *middle, last]).rstrip()


def _figure(record: Mapping[str, Any], text: Mapping[str, str]) -> str:
    """Quality against cost: the loss of each trial's arms over the logarithm of their parameters."""
    trials = [each for each in record["decisions"] if "arms" in each]
    series = [_line(each, trials[0]["arms"][0]["parameters"], colour, text) for colour, each in enumerate(trials)]
    return _drawn(series, text, "figure")


def _drawn(series: Sequence[Series], text: Mapping[str, str], name: str) -> str:
    keys = "".join(tag("span", class_=f"key k{each.colour % NUM_COLOURS}") + escape(each.name) for each in series)
    caption = tag("figcaption", raw=escape(text[name]) + tag("span", raw=keys, class_="keys"))
    drawing = line_chart(series, text[name], text["doublings"])
    return tag("figure", raw=caption + drawing) + tag("p", text[f"{name}_note"], class_="note")


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
