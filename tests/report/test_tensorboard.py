"""What TensorBoard itself reads of a run is what the run's metrics say."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loratune.cli.main import run as command
from loratune.errors import ConfigError
from loratune.report.tensorboard import export, scalars

STEP = {"event": "step", "loss": 1.5, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens_per_second": 90.0, "seconds": 2}


def step(number: int, loss: float) -> dict[str, Any]:
    return {**STEP, "step": number, "loss": loss}


def make(folder: Path, *events: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "run.yaml").write_text("model: m\n")
    write(folder, *events)
    return folder


def write(run: Path, *events: dict[str, Any]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def end(run: Path) -> None:
    (run / "adapter").mkdir()
    (run / "adapter" / "loratune.json").write_text('{"ended": true}')


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """By TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_every_step_and_evaluation(tmp_path: Path) -> None:
    figures = {"accuracy": {"value": 0.75, "low": 0.5, "high": 1.0}, "matthews": {"value": None}}
    evaluation = {"event": "evaluation", "step": 0, "loss": 2.0, "low": 1.0, "figures": figures}
    notice = {"event": "notice", "step": 1, "message": "x"}
    run = make(tmp_path / "run", evaluation, step(1, 1.5), notice, step(2, 1.25))
    found = read(export(run))
    assert found == {
        "held_out/loss": [(0, 2.0)], "held_out/accuracy": [(0, 0.75)], "train/loss": [(1, 1.5), (2, 1.25)],
        "train/grad_norm": [(1, 0.5), (2, 0.5)], "train/tokens_per_second": [(1, 90.0), (2, 90.0)],
        "train/learning_rate": [(1, pytest.approx(1e-3)), (2, pytest.approx(1e-3))],
    }  # fmt: skip
    write(run, step(1, 1.0))
    assert read(export(run))["train/loss"] == [(1, 1.0)]  # anew, not beside what was there


def test_a_value_that_is_not_finite_has_no_point() -> None:
    assert dict(scalars({**step(1, float("nan")), "memory_bytes": 5}))["train/memory_bytes"] == 5
    assert "train/loss" not in dict(scalars(step(1, float("nan"))))


def test_a_run_is_followed_to_its_end_through_a_half_line_and_a_resume(tmp_path: Path) -> None:
    run = make(tmp_path / "run", step(1, 4.0), step(2, 3.0))
    pauses = 0

    def wait(seconds: float) -> None:
        nonlocal pauses
        pauses += 1
        metrics = run / "metrics.jsonl"
        if pauses == 1:  # a line that is being written
            metrics.write_text(metrics.read_text() + json.dumps(step(3, 2.0))[:20])
        if pauses == 2:
            write(run, step(1, 4.0), step(2, 3.0), step(3, 2.0))
        if pauses == 3:  # resumed from step 1
            write(run, step(1, 4.0))
        if pauses == 4:
            write(run, step(1, 4.0), step(2, 3.0), step(3, 2.0), step(4, 1.0))
            end(run)

    found = read(export(run, follow=True, wait=wait))["train/loss"]
    assert pauses == 4 and dict(found) == {1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}


def test_the_command_says_where_to_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run", step(1, 1.0))
    assert command(["runs", "tensorboard", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"written": [str(run / "tensorboard")], "look": f"tensorboard --logdir {run}"}
    assert command(["runs", "tensorboard", str(run), str(run), "--follow"]) == 2
    assert "--follow goes with one run" in capsys.readouterr().err


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"is not a run: run\.yaml is missing"):
        export(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"needs its library: pip install 'loratune\[tensorboard\]'"):
        export(make(tmp_path / "run"))
