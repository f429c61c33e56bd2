"""A run that was stopped and resumed ends in the bytes of one that was not; what would not continue it is refused."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune import api
from loratune.errors import CheckpointError, ConfigError
from loratune.train import checkpoint
from loratune.train.config import load_run_config
from tiny_run import copy_rows, lines_of, save_model, tree, write_rows

STEPS = 12  # two epochs of 48 rows
TIMES = {"seconds", "step_seconds", "tokens_per_second", "seconds_left", "memory_bytes"}
_RUN = "from loratune.cli.main import main; main()"


class Project:
    """A folder with a model, rows and the finished run that others are compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_model(folder / "model")
        self.data = write_rows(folder / "train.jsonl", copy_rows(48))
        self.validation = write_rows(folder / "held.jsonl", copy_rows(8, seed=1))
        self.whole = folder / "whole"
        self.run(self.whole)

    def settings(self, output: Path, **changes: Any) -> dict[str, Any]:
        return {
            "model": str(self.model), "output": str(output),
            "data.train": str(self.data), "data.validation": str(self.validation),
            "adapter.preset": "quality", "adapter.lora_dropout": 0.05,
            "train.epochs": 2.0, "train.batch_size": 8, "train.micro_batch_tokens": 32,
            "train.learning_rate": 0.01, "train.save_every": 2, **changes,
        }  # fmt: skip

    def run(self, output: Path, on_event: Callable[[dict[str, Any]], None] = lambda event: None, **changes: Any) -> str:
        return api.run(load_run_config(None, self.settings(output, **changes)), on_event).status


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


def at_step(step: int, *signals: int) -> Callable[[dict[str, Any]], None]:
    """Sends signals to this process when a step has been done, before it is saved."""

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            for number in signals:
                os.kill(os.getpid(), number)

    return on_event


def untimed(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = lines_of(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def content(folder: Path) -> dict[str, Any]:
    """Every byte under a folder; of safetensors the header as JSON and the rest, because they shuffle their header."""
    found: dict[str, Any] = tree(folder)
    found.pop("MANIFEST.json", None)  # digests of the shuffled files
    for name in found:
        if name.endswith(".safetensors"):
            end = 8 + int.from_bytes(found[name][:8], "little")
            found[name] = json.loads(found[name][8:end]), found[name][end:]
    return found


def assert_same_bytes(run: Path, whole: Path) -> None:
    """The adapter that is kept, and the last checkpoint with its moments and position."""
    for folder in ("adapter", f"checkpoints/step-{STEPS:06d}"):
        found, expected = content(run / folder), content(whole / folder)
        assert found.keys() == expected.keys() != set()
        assert [name for name in found if found[name] != expected[name]] == []
    assert untimed(run) == untimed(whole)


def test_two_whole_runs_are_the_same(project: Project, tmp_path: Path) -> None:
    assert project.run(tmp_path / "again") == "done"
    assert_same_bytes(tmp_path / "again", project.whole)
    assert [line["step"] for line in lines_of(project.whole / "metrics.jsonl", "step")] == list(range(1, STEPS + 1))


def test_another_seed_is_another_run(project: Project, tmp_path: Path) -> None:
    """Else the comparison above would be of constants."""
    project.run(tmp_path / "other", **{"train.seed": 1})
    assert untimed(tmp_path / "other") != untimed(project.whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 3, 6, 11])  # 6 ends an epoch
def test_a_stopped_run_goes_on_bit_for_bit(project: Project, tmp_path: Path, step: int, number: int) -> None:
    run = tmp_path / "run"
    assert project.run(run, at_step(step, number)) == "stopped"
    assert checkpoint.newest(run)[0].step == step
    result = api.resume(run)
    assert (result.status, result.steps) == ("done", STEPS)
    assert_same_bytes(run, project.whole)


def test_a_run_stopped_again_and_again(project: Project, tmp_path: Path) -> None:
    run = tmp_path / "run"
    project.run(run, at_step(2, signal.SIGINT))
    for step in (5, 7):
        assert api.resume(run, at_step(step, signal.SIGTERM)).status == "stopped"
    api.resume(run)
    assert_same_bytes(run, project.whole)


def test_a_stop_before_the_first_step_is_resumable(project: Project, tmp_path: Path) -> None:
    """During the first evaluation nothing is saved yet: one step is done, and saved."""

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "evaluation" and event["step"] == 0:
            os.kill(os.getpid(), signal.SIGINT)

    run = tmp_path / "run"
    assert project.run(run, on_event) == "stopped"
    assert checkpoint.newest(run)[0].step == 1
    api.resume(run)
    assert_same_bytes(run, project.whole)


def test_a_stop_just_after_a_save_is_resumable(project: Project, tmp_path: Path) -> None:
    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    run = tmp_path / "run"
    assert project.run(run, on_event) == "stopped"
    assert checkpoint.newest(run)[0].step == 4
    api.resume(run)
    assert_same_bytes(run, project.whole)


def test_a_second_signal_interrupts_at_once_and_the_last_checkpoint_serves(project: Project, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        project.run(run, at_step(5, signal.SIGINT, signal.SIGINT))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not (run / "adapter").exists()
    assert checkpoint.newest(run)[0].step == 4
    api.resume(run)
    assert_same_bytes(run, project.whole)


def test_resuming_a_finished_run_changes_nothing(project: Project, tmp_path: Path) -> None:
    run = tmp_path / "run"
    project.run(run)
    before = tree(run / "checkpoints")
    assert api.resume(run).status == "done"
    assert tree(run / "checkpoints") == before
    assert_same_bytes(run, project.whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGINT,), 75),
        ((signal.SIGTERM,), 75),
        ((signal.SIGINT, signal.SIGTERM), 130),
        ((signal.SIGKILL,), -signal.SIGKILL),
    ],
    ids=["SIGINT", "SIGTERM", "twice", "SIGKILL"],
)
def test_the_command_line_stopped_from_outside(
    project: Project, tmp_path: Path, signals: tuple[signal.Signals, ...], code: int
) -> None:
    run, config = tmp_path / "run", tmp_path / "run.yaml"
    sections: dict[str, Any] = {}
    for key, value in project.settings(run).items():
        section, _, name = key.rpartition(".")
        (sections.setdefault(section, {}) if section else sections)[name] = value
    config.write_text(json.dumps(sections))  # JSON is YAML
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", _RUN, "train", str(config), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "step" and event["step"] == 3:
                for number in signals:
                    process.send_signal(number)
        assert process.wait() == code
    assert 3 <= lines_of(run / "metrics.jsonl", "step")[-1]["step"] < STEPS
    if code == 75:
        assert event["event"] == "end" and event["status"] == "stopped"
        assert checkpoint.newest(run)[0].step == event["steps"] == lines_of(run / "metrics.jsonl")[-1]["step"]
    api.resume(run)
    assert_same_bytes(run, project.whole)


def stopped(project: Project, output: Path) -> Path:
    project.run(output, at_step(3, signal.SIGINT))
    return output


def edit(run: Path, line: str, replacement: str) -> None:
    text, count = re.subn(line, replacement, (run / "run.yaml").read_text())
    assert count == 1
    (run / "run.yaml").write_text(text)


def change_data(project: Project, run: Path) -> None:
    rows = project.folder / "other.jsonl"
    write_rows(rows, [*copy_rows(47), {"prompt": "1 1 =", "completion": " 1 1"}])
    edit(run, r"  train: .*", f"  train: {rows}")


def change_rate(project: Project, run: Path) -> None:
    edit(run, r"learning_rate: 0\.01", "learning_rate: 0.02")


def change_rank(project: Project, run: Path) -> None:
    edit(run, r"  r: 16", "  r: 8")


def change_model(project: Project, run: Path) -> None:
    other = save_model(run.parent / "other-model", initializer_range=0.03)
    edit(run, r"model: .*", f"model: {other}")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_data, r"data\.train was \S+, is \S+"),
        (change_rate, r"train\.learning_rate was 0\.01, is 0\.02"),
        (change_rank, r"adapter\.r was 16, is 8"),
        (change_model, r"base_model was \S+, is \S+"),
    ],
    ids=["data", "rate", "rank", "model"],
)
def test_what_would_not_continue_the_run_is_refused(
    project: Project, tmp_path: Path, change: Callable[[Project, Path], None], named: str
) -> None:
    run = stopped(project, tmp_path / "run")
    change(project, run)
    before = tree(run)
    with pytest.raises(CheckpointError, match=f"not made by this run as it is now, .*: {named}. Put these back"):
        api.resume(run)
    assert tree(run) == before


@pytest.mark.parametrize(
    "adapter",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5.0}},
    ],
    ids=lambda adapter: next(iter(adapter)),
)
def test_every_kind_of_adapter_is_resumed(project: Project, tmp_path: Path, adapter: dict[str, Any]) -> None:
    changes = {f"adapter.{name}": value for name, value in adapter.items()} | {"train.max_steps": 4}
    whole, run = tmp_path / "whole", tmp_path / "run"
    project.run(whole, **changes)
    assert untimed(whole)[1:] != untimed(project.whole)[1:5]
    assert project.run(run, at_step(3, signal.SIGINT), **changes) == "stopped"
    api.resume(run)
    found, expected = content(run / "adapter"), content(whole / "adapter")
    assert [name for name in found if found[name] != expected[name]] == []
    assert untimed(run) == untimed(whole)


def test_how_many_checkpoints_are_kept_may_change(project: Project, tmp_path: Path) -> None:
    run = stopped(project, tmp_path / "run")
    edit(run, r"keep: 2", "keep: 1")
    edit(run, r"save_every: 2", "save_every: 5")
    api.resume(run)
    assert untimed(run) == untimed(project.whole)
    assert content(run / "adapter") == content(project.whole / "adapter")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run: run\.yaml is missing"):
        api.resume(tmp_path)
