"""What a run shows: plain lines and JSON to the letter, and the panel as it stands on the screen."""

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from loratune.cli.panel import LiveView, Panel, duration, exit_code, size, sparkline


def step(number: int, loss: float, left: float | None = 30.0) -> dict[str, Any]:
    return {
        "event": "step",
        "step": number,
        "num_steps": 12,
        "epoch": number / 12,
        "loss": loss,
        "grad_norm": 0.834,
        "learning_rate": 5e-4,
        "num_tokens": 900,
        "num_label_tokens": 300,
        "tokens_per_second": 1234.5,
        "seconds": 65.2,
        "memory_bytes": 1.93e9,
        "seconds_left": left,
    }


def evaluation(number: int, loss: float) -> dict[str, Any]:
    interval = {"low": loss - 0.05, "high": loss + 0.05, "perplexity": 2.718}
    return {"event": "evaluation", "step": number, "loss": loss, **interval, "num_rows": 64, "num_label_tokens": 3000}


def events(status: str = "done") -> list[dict[str, Any]]:
    return [
        {"event": "notice", "message": "[the] packing probe differs"},
        {"event": "summary", "text": "36 sites\n  query  18/18  q_proj\n", "trainable": 1, "total": 2},
        evaluation(0, 1.0),
        {"event": "start", "num_steps": 12, "num_documents": 96, "num_tokens": 12345, "num_label_tokens": 2345},
        step(1, 0.98),
        step(2, 0.7, None),
        {"event": "checkpoint", "step": 2, "path": "runs/a/checkpoints/step-000002"},
        evaluation(2, 0.6),
        {"event": "end", "status": status, "steps": 2, "output": "runs/a", "seconds": 3725},
    ]


GOLDEN_PLAIN = """\
note: [the] packing probe differs
36 sites
  query  18/18  q_proj
evaluation at step 0: loss 1.0000 (95%: 0.9500 to 1.0500)  perplexity 2.72  64 rows, 3,000 tokens
start: 12 steps over 96 documents, 12,345 tokens, 2,345 of them trained on
step  1/12  loss 0.9800  gradient 0.83  rate 5.00e-04  1,234 tokens/s  1.9 GB  0:30 left
step  2/12  loss 0.7000  gradient 0.83  rate 5.00e-04  1,234 tokens/s  1.9 GB
saved step 2: runs/a/checkpoints/step-000002
evaluation at step 2: loss 0.6000 (95%: 0.5500 to 0.6500)  perplexity 2.72  64 rows, 3,000 tokens
done: 2 steps in 1:02:05
evaluation loss: 1.0000 at step 0, best 0.6000 at step 2
everything is in runs/a; next:
  loratune chat runs/a
  loratune export runs/a --to merged --output DIR
"""


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Panel("runs/a") as panel:
        for event in events():
            panel(event)
    assert capsys.readouterr().out == GOLDEN_PLAIN


def test_a_stopped_run_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with Panel("runs/a") as panel:
        panel(events("stopped")[-1])
    out = capsys.readouterr().out
    assert out == "stopped and saved: 2 steps in 1:02:05\ngo on with:  loratune train --resume runs/a\n"


def test_json_is_the_events_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Panel("runs/a", as_json=True) as panel:
        for event in events():
            panel(event)
        panel.say("Привіт")
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [*events(), {"event": "text", "text": "Привіт"}]


def test_an_event_without_a_line_of_its_own_is_shown_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    Panel("runs/a")({"event": "sample", "prompt": "a", "answer": 3})
    assert capsys.readouterr().out == "sample  prompt a  answer 3\n"


GOLDEN_PANEL = """\
╭─ runs/[a] ───────────────────────────────────────────────────────────╮
│                                                                      │
│  progress       ━━━━━                             2 of 12   17%      │
│  loss           0.7000  █▁                                           │
│  evaluation     0.6000  0.5500 to 0.6500   at step 2, best so far    │
│  learning rate  5.00e-04   gradient norm 0.83                        │
│  speed          1,234 tokens/s                                       │
│  memory         1.9 GB                                               │
│  time           1:05 gone   epoch 0.17                               │
│  saved          step 2                                               │
│                                                                      │
╰───────────────────────────── Ctrl-C stops after this step and saves ─╯
"""


def screen(draw: Callable[[LiveView], None], width: int = 72, **kwargs: Any) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, **kwargs)
    draw(LiveView("runs/[a]", console))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_panel_as_it_stands() -> None:
    def draw(view: LiveView) -> None:
        for event in events()[2:-1]:
            view.progress.see(event)
        view.console.print(view.draw())

    assert screen(draw) == GOLDEN_PANEL


@pytest.mark.parametrize("width", [20, 40, 64, 80, 200])
def test_the_panel_never_leaves_its_width(width: int) -> None:
    def draw(view: LiveView) -> None:
        for number in range(1, 13):
            view.progress.see(step(number, 1 / number))
        view.console.print(view.draw())

    lines = screen(draw, width=width).splitlines()
    assert {len(line) for line in lines} == {min(width, 100)}
    assert all(line[0] in "╭│╰" and line[-1] in "╮│╯" for line in lines)


def test_in_a_terminal_nothing_said_is_lost_and_the_panel_stays() -> None:
    def draw(view: LiveView) -> None:
        for event in [*events()[:5], {"event": "notice", "message": "late"}, *events()[5:]]:
            view.event(event)
        view.close()

    shown = screen(draw, force_terminal=True)
    for line in (
        "note: [the] packing probe differs",
        "query  18/18",
        "start: 12 steps",
        "note: late",
        "at step 2, best",
    ):
        assert line in shown
    assert "Ctrl-C" not in shown.rpartition("╭─")[2]  # the last drawing is a finished run's
    assert shown.endswith(GOLDEN_PLAIN[GOLDEN_PLAIN.index("done: 2") :])


def test_an_error_leaves_the_terminal_in_order() -> None:
    console = Console(file=io.StringIO(), width=72, color_system=None, force_terminal=True)
    with pytest.raises(ZeroDivisionError), Panel("runs/a", console=console) as panel:
        panel(events()[3])
        raise ZeroDivisionError
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32)), st.integers(0, 50))
def test_a_sparkline_takes_any_numbers_and_keeps_its_width(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) <= width
    assert set(line) <= set("▁▂▃▄▅▆▇█")


def test_sparkline_golden() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([8, 8, 1, 1], 2) == "█▁"
    assert sparkline([2, 2, 2], 8) == "▁▁▁"
    assert sparkline([1], 8) == ""


def test_units() -> None:
    assert [size(310e6), size(1.96e9)] == ["310 MB", "2.0 GB"]
    assert [duration(5), duration(65.4), duration(7384)] == ["0:05", "1:05", "2:03:04"]


@pytest.mark.parametrize(("status", "code"), [("done", 0), ("stopped", 75)])
def test_a_stopped_run_can_be_resumed_and_its_exit_code_says_so(status: str, code: int) -> None:
    class Result:
        pass

    result = Result()
    result.status = status  # pyright: ignore[reportAttributeAccessIssue]
    assert exit_code(result) == code
