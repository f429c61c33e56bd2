"""A run that was stopped and resumed ends in the bytes of one that was not; what would not continue it is refused."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune import api
from loratune.cli import main
from loratune.errors import CheckpointError, ConfigError
from loratune.train import checkpoint, loop
from loratune.train.config import load_run_config
from loratune.train.loop import NOT_IDENTICAL
from loratune.train.optim import Optimizer
from tiny_run import copy_rows, lines_of, make_run, save_model, tree, write_rows

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


def test_what_has_changed_is_allowed_and_said(project: Project, tmp_path: Path) -> None:
    """In the metrics, the run's file, the adapter's record, the events and the checkpoints; a second time as well."""
    run = stopped(project, tmp_path / "run")
    change_rate(project, run)
    events: list[dict[str, Any]] = []
    result = api.resume(run, events.append, allow_changed=True)
    assert (result.status, result.steps) == ("done", STEPS)
    label = {"step": 3, "changed": ["train.learning_rate was 0.01, is 0.02"]}
    assert lines_of(run / "metrics.jsonl", NOT_IDENTICAL) == [{"event": NOT_IDENTICAL, **label}]
    assert [line["step"] for line in lines_of(run / "metrics.jsonl", "step")] == list(range(1, STEPS + 1))
    text = (run / "run.yaml").read_text()
    assert text.endswith("# from step 3: continued, not identical: train.learning_rate was 0.01, is 0.02\n")
    about = json.loads((run / "adapter" / "loratune.json").read_text())
    assert (about["label"], about["continued"]) == ("continued, not identical", [label])
    assert events[-1]["event"] == "end" and events[-1]["label"] == "continued, not identical"
    saved, _ = checkpoint.newest(run)
    assert saved.state["continued"] == [label]
    assert untimed(run)[:4] == untimed(project.whole)[:4] and untimed(run)[4:] != untimed(project.whole)[4:]
    again: list[dict[str, Any]] = []
    api.resume(run, again.append)  # what it was changed to is what it is
    assert again[-1]["label"] == "continued, not identical" and checkpoint.newest(run)[0].state == saved.state


@pytest.mark.parametrize(
    ("changed", "best"),
    [("train.seed was 0, is 1", {"step": 3, "loss": 1.0}), ("data.validation was a, is b", None), ("base_model", None)],
)
def test_what_was_measured_on_something_else_is_forgotten(tmp_path: Path, changed: str, best: Any) -> None:
    run = make_run(tmp_path)
    run.step, run.best, run.micro_batch_tokens = 5, {"step": 3, "loss": 1.0}, 64
    loop.label_changed(run, [changed])
    assert run.best == best and run.micro_batch_tokens == run.config.micro_batch_tokens
    loop.label_changed(run, ["more"])
    assert run.continued == [{"step": 5, "changed": [changed]}, {"step": 5, "changed": ["more"]}]


def test_with_nothing_changed_nothing_is_labelled(project: Project, tmp_path: Path) -> None:
    run = stopped(project, tmp_path / "run")
    api.resume(run, allow_changed=True)
    assert_same_bytes(run, project.whole)
    assert "label" not in json.loads((run / "adapter" / "loratune.json").read_text())


def test_another_adapter_cannot_be_allowed(project: Project, tmp_path: Path) -> None:
    run = stopped(project, tmp_path / "run")
    change_rank(project, run)
    before = tree(run)
    with pytest.raises(CheckpointError, match=r"q_proj\.A has shape \(16, 32\); expected \(8, 32\): another adapter"):
        api.resume(run, allow_changed=True)
    assert tree(run) == before


def test_the_last_steps_are_repeated_and_compared(project: Project, tmp_path: Path) -> None:
    run = tmp_path / "run"
    project.run(run, at_step(5, signal.SIGINT))
    events: list[dict[str, Any]] = []
    api.resume(run, events.append, verify=True)
    assert {"event": "notice", "message": "the last steps, from 4 to 5, were done again: the same bits"} in events
    assert_same_bytes(run, project.whole)


def test_steps_that_do_not_repeat_are_found(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that adds a last bit to one number of one gradient."""
    run = tmp_path / "run"
    project.run(run, at_step(5, signal.SIGINT))
    before, clip = tree(run), Optimizer.clip

    def unsteady(self: Optimizer) -> Any:
        gradient = next(iter(self.parameters.values())).grad
        assert gradient is not None
        gradient.view(-1)[0] = torch.nextafter(gradient.view(-1)[0], torch.tensor(1.0))
        return clip(self)

    monkeypatch.setattr(Optimizer, "clip", unsteady)
    with pytest.raises(CheckpointError, match=r"from step-000004 do not lead to step-000005 again: \d+ of \d+ tensors"):
        api.resume(run, verify=True)
    assert tree(run) == before


def test_one_checkpoint_alone_cannot_be_verified(project: Project, tmp_path: Path) -> None:
    run = tmp_path / "run"
    project.run(run, at_step(1, signal.SIGINT))
    with pytest.raises(CheckpointError, match=r"needs a complete checkpoint before .*step-000001; there is none"):
        api.resume(run, verify=True)


@pytest.fixture
def relative(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder in which a run with relative paths was stopped; returns it."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("model", "train.jsonl", "held.jsonl"):
        (home / name).symlink_to(project.folder / name)
    monkeypatch.chdir(home)
    paths = {"model": "model", "data.train": "train.jsonl", "data.validation": "held.jsonl"}
    project.run(Path("runs/first"), at_step(3, signal.SIGINT), **paths)
    return home


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_is_resumed_from_another_directory(
    project: Project, relative: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    """By the command line; also after the whole project has moved."""
    home = relative.rename(tmp_path / "elsewhere") if moved else relative
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert main.run(["train", "--resume", os.path.relpath(home / "runs" / "first")]) == 0
    assert Path.cwd() == tmp_path / "other" and list(Path.cwd().iterdir()) == []
    assert untimed(home / "runs" / "first") == untimed(project.whole)


def test_the_library_says_where_to_resume_from(relative: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"its paths are relative to {relative}\. Resume from that directory"):
        api.resume(relative / "runs" / "first")


@pytest.mark.parametrize("output", ["/a/b", "../runs/first", "runs/second"])
def test_a_place_that_is_not_known_is_not_guessed(relative: Path, output: str) -> None:
    edit(relative / "runs" / "first", r"output: .*", f"output: {output}")
    assert api.working_directory(relative / "runs" / "first") is None


@pytest.mark.parametrize("flag", ["--allow-changed", "--verify-resume"])
def test_what_belongs_to_resume_is_refused_without_it(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["train", flag]) == 2
    assert "belong to --resume RUN, which is not given" in capsys.readouterr().err


def test_a_checkpoint_that_lacks_part_of_its_state_is_refused(project: Project, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    saved, _ = checkpoint.newest(project.whole)
    for name in ("best", "stale", "micro_batch_tokens", "continued", "num_metrics", "course", "step"):
        state = {key: value for key, value in saved.state.items() if key != name}
        with pytest.raises(CheckpointError, match=rf"state\.json lacks {name}: another version wrote it"):
            loop.restore(run, replace(saved, state=state))
    assert run.step == 0 and run.optimizer.state() == {}


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
