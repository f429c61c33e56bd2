"""How a run shows itself: a calm panel in a terminal, plain lines elsewhere, JSON lines for programs.

All three are fed the run's events (`loratune.api.run`): dicts with an "event" key.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Protocol, Self

import typer
from rich.console import Console
from rich.live import Live
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Event = Mapping[str, Any]

STOPPED_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: not an error, try again later
_MAX_WIDTH = 100  # wider, the eye loses the line
_LABEL_WIDTH = len("learning rate")
_BARS = "▁▂▃▄▅▆▇█"


class View(Protocol):
    """One way to show events and text."""

    def event(self, event: Event) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


class Panel:
    """Shows a run while it runs: `with Panel("runs/first") as panel: api.run(config, panel)`.

    A rich panel where `console` (by default standard output) is a terminal, else one line per event; with `as_json`
    one JSON object per line.
    """

    def __init__(self, title: str, *, as_json: bool = False, console: Console | None = None) -> None:
        console = console or Console()
        is_screen = console.is_terminal and not console.is_dumb_terminal
        self._view: View = JsonView() if as_json else LiveView(title, console) if is_screen else PlainView()

    def __call__(self, event: Event) -> None:
        self._view.event(event)

    def say(self, text: str) -> None:
        """Shows a text among the events, as it is."""
        self._view.say(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._view.close()


def exit_code(result: Any) -> int:
    """Returns the exit code of a run's result: 0 done, 75 stopped early but resumable."""
    return STOPPED_RESUMABLE if getattr(result, "status", "done") == "stopped" else 0


class JsonView:
    """One JSON object per line on standard output."""

    def event(self, event: Event) -> None:
        typer.echo(json.dumps(dict(event), ensure_ascii=False, default=str))

    def say(self, text: str) -> None:
        self.event({"event": "text", "text": text})

    def close(self) -> None:
        """Every line has been written already."""


class PlainView:
    """One plain line per event, for logs and pipes."""

    def __init__(self) -> None:
        self._evaluations: list[Event] = []

    def event(self, event: Event) -> None:
        if event["event"] == "evaluation":
            self._evaluations.append(event)
        typer.echo(plain(event))
        if event["event"] == "end":
            typer.echo(ending(event, self._evaluations))

    def say(self, text: str) -> None:
        typer.echo(text)

    def close(self) -> None:
        """Every line has been written already."""


@dataclass
class Progress:
    """What the panel shows of a run, as its events tell it."""

    num_steps: int = 0
    step: Event = field(default_factory=dict[str, Any])
    losses: list[float] = field(default_factory=list[float])
    evaluations: list[Event] = field(default_factory=list[Event])
    checkpoint: Event | None = None
    arm: Event | None = None  # of a trial that is under way

    def see(self, event: Event) -> None:
        """Takes in one event."""
        if event["event"] == "start":
            self.num_steps = event["num_steps"]
        elif event["event"] == "step":
            self.step, self.num_steps, self.arm = event, event["num_steps"], None
            self.losses.append(event["loss"])
        elif event["event"] == "arm":
            self.arm = event
        elif event["event"] == "evaluation":
            self.evaluations.append(event)
        elif event["event"] == "checkpoint":
            self.checkpoint = event


class LiveView:
    """A panel that is redrawn in place; what is said and noticed stands above it and stays."""

    _DRAWN = frozenset(("step", "arm", "evaluation", "checkpoint"))

    def __init__(self, title: str, console: Console) -> None:
        self.title = title
        self.console = console
        self.progress = Progress()
        self._live: Live | None = None

    def event(self, event: Event) -> None:
        name = event["event"]
        if name == "start":
            self._open(event)
        elif name == "end":
            self.close()
            self.say(plain(event))
            self.say(ending(event, self.progress.evaluations))
        elif name == "ladder":
            self.say(plain(event))
        elif self._live is not None and name in self._DRAWN:
            self.progress.see(event)
            self._live.update(self.draw(), refresh=True)
        else:
            self.progress.see(event)
            self._print_dim(plain(event))

    def _print_dim(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.update(self.draw(hint=""), refresh=True)
            self._live.stop()
            self._live = None

    def _open(self, event: Event) -> None:
        self.close()
        self._print_dim(plain(event))
        self.progress = Progress(evaluations=self.progress.evaluations)  # one from before the first step belongs here
        self.progress.see(event)
        # Drawn on events only: a thread that redraws would take turns with the training for the interpreter.
        self._live = Live(self.draw(), console=self.console, auto_refresh=False)
        self._live.start(refresh=True)

    def draw(self, hint: str = "Ctrl-C stops after this step and saves") -> Frame:
        """Returns the panel as it stands now."""
        width = min(self.console.width, _MAX_WIDTH)
        rows = Table.grid(padding=(0, 2, 0, 0))
        rows.add_column(style="dim", no_wrap=True, min_width=_LABEL_WIDTH)
        rows.add_column(no_wrap=True)
        for label, value in panel_rows(self.progress, width - _LABEL_WIDTH - 10):  # 10: border and padding
            rows.add_row(label, value)
        return Frame(
            rows,
            title=Text(self.title, style="bold"),
            title_align="left",
            subtitle=Text(hint, style="dim") if hint else None,
            subtitle_align="right",
            border_style="dim",
            padding=(1, 2),
            width=width,
        )


def panel_rows(progress: Progress, width: int) -> list[tuple[str, Any]]:
    """Returns the panel's lines, label and value, each value at most `width` characters wide."""
    step = progress.step
    done = step.get("step", 0)
    rows: list[tuple[str, Any]] = [("progress", _bar(done, progress.num_steps, width))]
    if not step:
        return [*rows, ("", Text("the first step takes longest", style="dim"))]
    loss = Text(f"{step['loss']:.4f}  ", style="bold")
    rows.append(("loss", loss.append(sparkline(progress.losses, width - len(loss)), style="cyan")))
    if progress.evaluations:
        rows.append(("evaluation", _evaluation(progress.evaluations)))
    rate = f"{step['learning_rate']:.2e}"
    rows += [
        ("learning rate", Text(rate).append(f"   gradient norm {step['grad_norm']:.2f}", style="dim")),
        ("speed", f"{step['tokens_per_second']:,.0f} tokens/s"),
        ("memory", size(step["memory_bytes"])),
        ("time", _time(step)),
    ]
    if progress.arm is not None:
        rows.append(
            ("trial", f"{progress.arm['rung']}   step {progress.arm['step']}   loss {progress.arm['loss']:.4f}")
        )
    if progress.checkpoint is not None:
        rows.append(("saved", f"step {progress.checkpoint['step']}"))
    return rows


def _bar(done: int, total: int, width: int) -> Any:
    share = done / total if total else 0.0
    label = f"{done} of {total}   {share:.0%}"
    line = Table.grid(padding=(0, 2, 0, 0))
    width = max(8, width - len(label) - 4)
    bar = ProgressBar(total=total or 1, completed=done, width=width, complete_style="cyan", finished_style="cyan")
    line.add_row(bar, Text(label))
    return line


def _evaluation(evaluations: Sequence[Event]) -> Text:
    last, best = evaluations[-1], min(evaluations, key=lambda item: item["loss"])
    text = Text(f"{last['loss']:.4f}  ", style="bold")
    text.append(f"{last['low']:.4f} to {last['high']:.4f}", style="cyan")
    if told := figures_told(last.get("figures", {})):
        text.append(f"   {told[0]}", style="bold")
    place = "best so far" if best is last else f"best {best['loss']:.4f} at step {best['step']}"
    return text.append(f"   at step {last['step']}, {place}", style="dim")


def _time(step: Event) -> Text:
    text = Text(f"{duration(step['seconds'])} gone")
    if step.get("seconds_left"):
        text.append(f", {duration(step['seconds_left'])} left")
    return text.append(f"   epoch {step['epoch']:.2f}", style="dim")


def plain(event: Event) -> str:
    """Returns an event as one line; of an event that has no line of its own, its name and values."""
    line = _LINES.get(event["event"])
    if line is not None:
        return line(event)
    return "  ".join([str(event["event"]), *(f"{key} {value}" for key, value in event.items() if key != "event")])


def _start_line(event: Event) -> str:
    return (
        f"start: {event['num_steps']:,} steps over {event['num_documents']:,} documents, "
        f"{event['num_tokens']:,} tokens, {event['num_label_tokens']:,} "
        + ("of them trained on" if event["num_label_tokens"] <= event["num_tokens"] else "labels")  # pixels, say
    )


def _step_line(event: Event) -> str:
    number = str(event["step"]).rjust(len(str(event["num_steps"])))
    left = event.get("seconds_left")
    parts = [
        f"step {number}/{event['num_steps']}",
        f"loss {event['loss']:.4f}",
        f"gradient {event['grad_norm']:.2f}",
        f"rate {event['learning_rate']:.2e}",
        f"{event['tokens_per_second']:,.0f} tokens/s",
        size(event["memory_bytes"]),
        *([f"{duration(left)} left"] if left is not None else []),
    ]
    return "  ".join(parts)


def _evaluation_line(event: Event) -> str:
    head = (
        f"evaluation at step {event['step']}: loss {event['loss']:.4f} "
        f"(95%: {event['low']:.4f} to {event['high']:.4f})  "
    )
    if "figures" in event:  # of a task
        return f"{head}{'  '.join(figures_told(event['figures']))}  {event['num_rows']:,} rows"
    return (
        f"{head}perplexity {event['perplexity']:.2f}  {event['num_rows']:,} rows, {event['num_label_tokens']:,} tokens"
    )


def figures_told(figures: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Returns each figure of a task with its 95% interval; one that is not defined there is left out."""
    return [
        f"{name.replace('_', ' ')} {each['value']:.3f} ({each['low']:.3f} to {each['high']:.3f})"
        for name, each in figures.items()
        if each["value"] is not None
    ]


def _end_line(event: Event) -> str:
    word = {"done": "done", "stopped": "stopped and saved"}.get(event["status"], event["status"])
    label = f" ({event['label']})" if event.get("label") else ""
    return f"{word}{label}: {event['steps']:,} steps in {duration(event['seconds'])}"


def _memory_line(event: Event) -> str:
    now = f"micro-batches of {event['micro_batch_tokens']:,} tokens instead of {event['was']:,} from here on"
    return f"memory ran out in step {event['step'] + 1}: {now}; the result is the same but for rounding"


def _arm_line(event: Event) -> str:
    return f"trial of {event['rung']}: {_step_line(event)}"


def _decision_line(event: Event) -> str:
    from loratune.report.ladder_texts import why

    return f"decision at step {event['step']}: {why(event)}"


def _ladder_text(event: Event) -> str:
    from loratune.report.ladder_page import terminal

    return terminal(event)


def _rung_line(event: Event) -> str:
    return f"rung {event['rung']} from step {event['step']}: r {event['r']}, {event['parameters']:,} parameters"


_LINES: dict[str, Callable[[Event], str]] = {
    "memory": _memory_line,
    "notice": lambda event: f"note: {event['message']}",
    "summary": lambda event: str(event["text"]).rstrip(),
    "start": _start_line,
    "step": _step_line,
    "arm": _arm_line,
    "decision": _decision_line,
    "rung": _rung_line,
    "ladder": _ladder_text,
    "evaluation": _evaluation_line,
    "checkpoint": lambda event: f"saved step {event['step']}: {event['path']}",
    "end": _end_line,
}


def ending(event: Event, evaluations: Sequence[Event]) -> str:
    """Returns the last lines of a run: what evaluation says, where everything is, and what to do next."""
    output = event["output"]
    lines: list[str] = []
    if len(evaluations) > 1:
        first, best = evaluations[0], min(evaluations, key=lambda item: item["loss"])
        start = f"{first['loss']:.4f} at step {first['step']}"
        lines.append(f"evaluation loss: {start}, best {best['loss']:.4f} at step {best['step']}")
        lines += [f"{title}\n{text_table(rows)}" for title, rows in best.get("tables", {}).items()]
    if event["status"] == "stopped":
        return "\n".join([*lines, f"go on with:  loratune train --resume {output}"])
    lines.append(f"everything is in {output}; next:")
    is_task = bool(evaluations) and "figures" in evaluations[-1]
    lines.append(f"  loratune eval {output} --data FILE" if is_task else f"  loratune chat {output}")
    lines.append(f"  loratune export {output} --to merged --output DIR")
    return "\n".join(lines)


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows of the same keys as lines of aligned columns."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        for name, *rest in cells
    )
    return "\n".join("  " + "  ".join(line) for line in lines)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value}"


def sparkline(values: Sequence[float], width: int) -> str:
    """Returns values as a row of at most `width` bars, each the mean of its share of them, from lowest to highest."""
    finite = [value for value in values if math.isfinite(value)]
    count = min(len(finite), width)
    if count < 2:
        return ""
    edges = [round(index * len(finite) / count) for index in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1)) if span else 0] for mean in means)


def size(num_bytes: float) -> str:
    """Returns a number of bytes as people read it: 1.9 GB, 310 MB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Returns a time as 1:05 or 2:03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
