"""A task's part of a run's page: its figures over the run and, of the weights that were kept, its tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from loratune.report.figures import tag
from loratune.report.run_files import RunFiles

_TEXTS = {
    "en": {"figures": "Figures of the task", "note": "On the held-out rows, with 95% intervals.", "step": "step",
           "classes": "Each class", "types": "Each type",
           "confusion": "Confusion: true classes down, predicted across"},
    "uk": {"figures": "Показники завдання", "note": "На відкладених рядках, з 95% інтервалами.", "step": "крок",
           "classes": "Кожен клас", "types": "Кожен тип",
           "confusion": "Плутанина: справжні класи вниз, передбачені вправо"},
}  # fmt: skip


def task_section(run: RunFiles, language: str) -> str:
    """Returns the figures at each evaluation and the tables of the kept one; empty for a run without a task's."""
    evaluations = [event for event in run.evaluations if event.get("figures")]
    if not evaluations:
        return ""
    text = _TEXTS[language]
    names = list(evaluations[-1]["figures"])
    rows = [[str(event["step"]), *(told(event["figures"].get(name)) for name in names)] for event in evaluations]
    parts = [tag("h2", text["figures"]), tag("p", text["note"], class_="note")]
    parts.append(_table([text["step"], *(name.replace("_", " ") for name in names)], rows))
    kept = run.kept or evaluations[-1]
    for name, table in kept.get("tables", {}).items():
        parts += [tag("h3", text.get(name, name)), _table(list(table[0]), [list(row.values()) for row in table])]
    return "".join(parts)


def told(figure: Mapping[str, float | None] | None) -> str:
    """Returns a figure with its interval, or a dash where it is not defined."""
    if figure is None or figure["value"] is None:
        return "-"
    return f"{figure['value']:.3f} ({figure['low']:.3f} – {figure['high']:.3f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = tag("tr", raw="".join(tag("th", cell) for cell in header))
    body = "".join(tag("tr", raw="".join(tag("td", _cell(cell)) for cell in row)) for row in rows)
    return tag("div", raw=tag("table", raw=head + body), class_="wide")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
