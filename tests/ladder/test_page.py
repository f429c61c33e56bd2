"""What a ladder says of itself: in the terminal, on the page, in both languages."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from loratune.report.ladder_page import rung_rows, section, terminal
from loratune.report.ladder_texts import TEXTS, losses_on_test_rows, verdict, why

GAIN = {"value": -0.0213, "low": -0.0301, "high": -0.0125}
NONE = {"value": -0.0021, "low": -0.0093, "high": 0.0041}


def arm(rung: str, parameters: int, loss: float, difference: Any = None, price: float = 0.0) -> dict[str, Any]:
    found = {
        "rung": rung, "parameters": parameters, "step_seconds": 0.45, "memory_bytes": 1.9e9, "seconds": 18.0,
        "loss": loss, "low": loss - 0.1, "high": loss + 0.1, "pays": False,
    }  # fmt: skip
    return found if difference is None else {**found, "difference": difference, "price": price}


FAST, QUALITY = arm("fast", 368_640, 1.25), arm("quality", 1_474_560, 1.23, GAIN)
CLIMB = {"kind": "climb", "step": 80, "steps": 40, "rung": "fast", "to": "quality", "arms": [FAST, QUALITY]}
STAY = {
    "kind": "stay", "step": 160, "steps": 40, "rung": "quality", "to": "quality",
    "arms": [arm("quality", 1_474_560, 1.2), arm("expert", 7_593_984, 1.198, NONE)],
}  # fmt: skip
SKIP = {
    "kind": "climb", "step": 80, "steps": 40, "rung": "fast", "to": "expert",
    "arms": [FAST, arm("quality", 1_474_560, 1.25, NONE), arm("expert", 7_593_984, 1.2, GAIN)],
}  # fmt: skip
FAILED = {
    "kind": "stay", "step": 80, "steps": 40, "rung": "fast", "to": "fast",
    "arms": [FAST, {"rung": "quality", "parameters": 1_474_560, "pays": False, "failure": "loss nan is not finite"}],
}  # fmt: skip
PRICED = {**STAY, "arms": [STAY["arms"][0], arm("expert", 7_593_984, 1.19, GAIN, price=0.05)]}  # type: ignore[index]
CONFIRMED = {"kind": "confirmed", "step": 160, "steps": 40, "rung": "quality", "to": "fast", "difference": GAIN}
BACK = {**CONFIRMED, "kind": "back", "difference": NONE}
OPEN = {**STAY, "kind": "open", "again": 240}
DECISIONS = [CLIMB, STAY, SKIP, FAILED, PRICED, CONFIRMED, BACK, OPEN]


def rung(name: str, r: int, steps: int, tried: dict[str, Any]) -> dict[str, Any]:
    names = ("parameters", "step_seconds", "memory_bytes", "loss", "low", "high", "difference", "price", "failure")
    return {"name": name, "r": r, "steps": steps, "seconds": 36.0, **{each: tried.get(each) for each in names}}


def loss(value: float) -> dict[str, float]:
    return {"loss": value, "low": value - 0.05, "high": value + 0.05}


def made(*decisions: Any, chosen: str = "quality") -> dict[str, Any]:
    return {
        "rungs": [rung("fast", 8, 80, FAST), rung("quality", 16, 400, QUALITY), rung("expert:128", 128, 0, {})],
        "chosen": chosen, "decisions": list(decisions), "validation_rows": 203, "test_rows": 197, "trial_steps": 40,
        "price": {}, "steps": 480, "seconds": 216.0, "overhead_steps": 80, "overhead_seconds": 36.0,
        "test": {"base": loss(3.2), "first": {**loss(1.3), "step": 120}, "final": loss(1.2), "difference": GAIN},
    }  # fmt: skip


def test_each_decision_says_why_in_one_line() -> None:
    assert [why(each) for each in DECISIONS] == [
        "quality pays: it changed the held-out loss by -0.0213 (95%: -0.0301 to -0.0125) against fast in the same 40 "
        "steps for 4.0x the parameters.",
        "quality was enough: expert changed the held-out loss by -0.0021 (95%: -0.0093 to +0.0041) for 5.2x the "
        "parameters.",
        "expert pays: it changed the held-out loss by -0.0213 (95%: -0.0301 to -0.0125) against fast in the same 40 "
        "steps for 20.6x the parameters. quality alone did not: it changed the held-out loss by -0.0021 (95%: -0.0093 "
        "to +0.0041).",
        "fast was enough: quality could not be trained (loss nan is not finite).",
        "quality was enough: expert changed the held-out loss by -0.0213 (95%: -0.0301 to -0.0125) for 5.2x the "
        "parameters, less than its price of 0.0500.",
        "quality is confirmed: 40 steps on, it changed the held-out loss by -0.0213 (95%: -0.0301 to -0.0125) against "
        "fast where that was left.",
        "Back to fast: 40 steps on, quality changed the held-out loss by -0.0021 (95%: -0.0093 to +0.0041) against "
        "fast where that was left, which is no gain.",
        "Chance leaves open whether quality is enough: expert changed the held-out loss by -0.0021 (95%: -0.0093 to "
        "+0.0041) for 5.2x the parameters. Another look follows at step 240.",
    ]


def test_the_verdict_is_the_last_decision_that_moved_or_stayed() -> None:
    assert verdict(made(CLIMB, CONFIRMED)) == why(CLIMB)
    assert verdict(made(CLIMB, CONFIRMED, STAY)) == why(STAY)
    assert verdict(made(CLIMB, BACK)) == why(BACK)


GOLDEN = """\

rung        parameters  steps  s/step   memory  change in held-out loss (95%)
fast           368,640     80    0.45  1.90 GB
quality *    1,474,560    400    0.45  1.90 GB  -0.0213 (-0.0301 to -0.0125)
expert:128           -      0       -        -  -

quality was enough: expert changed the held-out loss by -0.0021 (95%: -0.0093 to
+0.0041) for 5.2x the parameters.
Loss on 197 rows that no decision saw: 3.2000 base, 1.3000 fast when it was
left, 1.2000 now (95%: 1.1500 to 1.2500)."""


def test_the_terminal_at_80_columns() -> None:
    shown = terminal(made(CLIMB, CONFIRMED, STAY))
    assert shown == GOLDEN
    assert max(map(len, shown.splitlines())) <= 80


def test_without_a_climb_there_is_no_rung_that_was_left() -> None:
    found = made(FAILED, chosen="fast")
    found["test"]["first"] = None
    assert (
        losses_on_test_rows(found)
        == "Loss on 197 rows that no decision saw: 3.2000 base, 1.2000 now (95%: 1.1500 to 1.2500)."
    )


@pytest.mark.parametrize("language", ["en", "uk"])
def test_the_page_says_it_all_and_draws_it(language: str, tmp_path: Path) -> None:
    found = made(*DECISIONS)
    (tmp_path / "ladder.json").write_text(json.dumps(found))
    page = section(tmp_path, language)
    text = re.sub(r"<[^>]+>", " ", page)
    for part in (
        *(why(each, language) for each in DECISIONS),
        verdict(found, language),
        losses_on_test_rows(found, language),
    ):
        assert part in text
    assert all(cell in text for row in rung_rows(found, language) for cell in row)
    assert page.count("<svg") == 1 and page.count("<polyline") == 5  # a line for each trial with two arms or more
    assert page.count("<circle") == 2 + 2 + 3 + 1 + 2 + 2 and not re.search(r"{\w+}|<script|https?://", page)


def test_a_run_without_a_ladder_has_no_section(tmp_path: Path) -> None:
    assert section(tmp_path) == ""


def test_a_reason_is_text_on_the_page(tmp_path: Path) -> None:
    hostile = json.loads(json.dumps(FAILED).replace("loss nan", "<script>"))
    (tmp_path / "ladder.json").write_text(json.dumps(made(hostile)))
    assert "<script>" not in section(tmp_path) and "&lt;script&gt;" in section(tmp_path)


def test_both_languages_have_the_same_words_and_places() -> None:
    assert TEXTS["uk"].keys() == TEXTS["en"].keys()
    for name, text in TEXTS["en"].items():
        assert set(re.findall(r"{\w+}", TEXTS["uk"][name])) == set(re.findall(r"{\w+}", text)), name
