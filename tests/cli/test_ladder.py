"""`loratune ladder` as a user meets it: its options are train's, its errors one line, its end a table."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from loratune.cli import ladder, main, train
from loratune.cli.panel import Progress, panel_rows, plain
from tiny_run import copy_rows, lines_of, save_model, write_rows

NEEDED = ["--model", "m", "--data", "d", "--output", "o"]


def test_its_options_are_those_of_train_but_for_what_rungs_set() -> None:
    own, of_train = (inspect.signature(verb).parameters for verb in (ladder.ladder, train.train))
    assert set(own) - set(of_train) == {"rungs", "price", "together", "configs", "finalists"}
    assert set(of_train) - set(own) == {"preset", "r", "lora_alpha", "target_modules", "patience", "verify_resume"}
    assert all(own[name].annotation == of_train[name].annotation for name in own if name in of_train)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*NEEDED, "--price", "gold=1"], "--price gold=1: unknown; expected doubling, second, gb."),
        ([*NEEDED, "--price", "gb=x"], "--price gb=x: expected a number of nats, such as gb=0.01."),
        ([*NEEDED, "--price", "0.1"], "--price: '0.1' is not one NAME=VALUE for each name; expected such as doubling="),
        ([*NEEDED, "--price", "gb=-1"], "--price: ladder.price is "),
        ([*NEEDED, "--rungs", "fast"], "--rungs: ladder.rungs is the list ['fast']; expected two or more presets"),
        ([*NEEDED, "--rungs", "fast,qualty"], "--rungs: ladder.rungs is the list ['fast', 'qualty']; expected two"),
        ([*NEEDED, "--r", "4"], "No such option: --r"),
        (["--allow-changed"], "--allow-changed belongs to --resume RUN, which is not given."),
        (["--resume", "nowhere"], "nowhere is not a run directory."),
        (["--rungs", "fast,quality"], "no base model is set"),
    ],
)
def test_wrong_usage_is_answered_at_once(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["ladder", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}")


def test_what_the_rungs_set_cannot_be_set_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: {train: d}\noutput: o\nadapter: {r: 4}\n")
    assert main.run(["ladder", str(file)]) == 2
    assert "r is 4, but on a ladder the rungs set it: the first, fast, has 8." in capsys.readouterr().err


def test_a_whole_ladder_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run = save_model(tmp_path / "model", num_hidden_layers=1), tmp_path / "run"
    args = [
        "--model", str(model), "--output", str(run), "--data", str(write_rows(tmp_path / "a.jsonl", copy_rows(400))),
        "--validation", str(write_rows(tmp_path / "b.jsonl", copy_rows(60, seed=1))), "--rungs", "fast:4,quality:16",
        "--price", "doubling=0.001", "--learning-rate", "0.01", "--epochs", "9", "--max-steps", "48",
        "--batch-size", "16",
    ]  # fmt: skip
    assert main.run(["ladder", *args]) == 0
    out = capsys.readouterr().out
    record = json.loads((run / "ladder.json").read_text())
    assert [rung["name"] for rung in record["rungs"]] == ["fast:4", "quality:16"]
    assert all(each["why"] in out for each in record["decisions"]) and record["price"] == {"doubling": 0.001}
    for line in ("ladder fast:4, quality:16: a look every", "trial of quality:16: step", "rows that no decision saw"):
        assert line in out
    table = out[out.rindex("\nrung ") :]
    assert max(map(len, table.splitlines())) <= 80
    text = (run / "run.yaml").read_text()
    assert "rungs: [" in text and "r: 4  # rung fast:4" in text and "price: {doubling: 0.001}  # --price" in text
    assert "The ladder" in (run / "report.html").read_text() or "Драбина" in (run / "report.html").read_text()
    assert len(lines_of(run / "metrics.jsonl", "step")) == 48


def test_a_trial_has_its_line_in_the_panel_until_the_next_step() -> None:
    step: dict[str, Any] = {
        "event": "step", "step": 3, "num_steps": 9, "epoch": 0.1, "loss": 1.0, "grad_norm": 1.0, "seconds": 1.0,
        "learning_rate": 1e-3, "tokens_per_second": 10.0, "memory_bytes": 1e9, "seconds_left": 5.0,
    }  # fmt: skip
    progress = Progress()
    for event in (step, {**step, "event": "arm", "rung": "quality", "step": 4, "loss": 0.9}):
        progress.see(event)
    assert dict(panel_rows(progress, 60))["trial"] == "quality   step 4   loss 0.9000"
    progress.see({**step, "step": 4})
    assert "trial" not in dict(panel_rows(progress, 60))


def test_a_rung_has_a_line() -> None:
    event = {"event": "rung", "step": 80, "rung": "quality", "r": 16, "parameters": 1_474_560}
    assert plain(event) == "rung quality from step 80: r 16, 1,474,560 parameters"
