"""Checkpoints: written whole, read back the same, and only as many as asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune import files
from loratune.errors import CheckpointError
from loratune.train import checkpoint

MOMENTS = {"exp_avg.a": torch.arange(6.0).reshape(2, 3).T, "step": torch.tensor(4.0)}  # one is not contiguous


def write(run: Path, step: int, best: int | None = None) -> Path:
    state: dict[str, Any] = {"step": step, "best": {"step": best, "loss": 1.0} if best else None}

    def write_adapter(folder: Path) -> None:
        files.atomic_write(folder / "adapter_config.json", "{}\n")
        files.atomic_write(folder / "adapter_model.safetensors", bytes(range(100)))

    return checkpoint.write(run, step, write_adapter, MOMENTS, state)


def steps(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in checkpoint.folders(run)]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    folder = write(tmp_path, 120, best=60)
    assert folder == tmp_path / "checkpoints" / "step-000120"
    assert sorted(path.name for path in folder.iterdir()) == [
        "MANIFEST.json", "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    found = checkpoint.read(folder)
    assert (found.path, found.step, found.state) == (folder, 120, {"step": 120, "best": {"step": 60, "loss": 1.0}})
    loaded = found.training_state()
    assert loaded.keys() == MOMENTS.keys() and all(torch.equal(loaded[name], MOMENTS[name]) for name in MOMENTS)


def test_the_manifest_holds_the_digest_of_every_other_file(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    entries = json.loads((folder / "MANIFEST.json").read_text())["files"]
    assert entries == {
        path.name: {"bytes": path.stat().st_size, "sha256": files.digest(path)}
        for path in folder.iterdir()
        if path.name != "MANIFEST.json"
    }


def test_folders_are_in_the_order_of_their_steps_and_half_written_ones_are_none(tmp_path: Path) -> None:
    for step in (20, 100, 3, 1_000_000):
        write(tmp_path, step)
    for name in (".step-000200.abc.tmp", ".step-000001.removed", "step-7", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert steps(tmp_path) == [3, 20, 100, 1_000_000]
    assert checkpoint.newest(tmp_path)[0].step == 1_000_000


def test_a_step_is_replaced_by_its_next_writing(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 5, best=2)
    assert steps(tmp_path) == [5] and checkpoint.newest(tmp_path)[0].state["best"]["step"] == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


@pytest.mark.parametrize(("keep", "expected"), [(1, [10, 50]), (2, [10, 40, 50]), (9, [10, 20, 30, 40, 50])])
def test_retain_keeps_the_last_ones_and_the_best(tmp_path: Path, keep: int, expected: list[int]) -> None:
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step, best=10)
    checkpoint.retain(tmp_path, keep)
    assert steps(tmp_path) == expected
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step-0000{s}" for s in expected]


def test_retain_keeps_the_best_of_an_older_one_that_may_be_fallen_back_to(tmp_path: Path) -> None:
    for step, best in ((10, 10), (20, 10), (30, 30)):
        write(tmp_path, step, best)
    checkpoint.retain(tmp_path, 2)
    assert steps(tmp_path) == [10, 20, 30]
    write(tmp_path, 40, best=30)
    checkpoint.retain(tmp_path, 2)
    assert steps(tmp_path) == [30, 40]


def test_a_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint to resume from"):
        checkpoint.newest(tmp_path)


def test_a_failing_write_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path, 5, best=2)

    def fail(folder: Path) -> None:
        files.atomic_write(folder / "adapter_config.json", "{")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(tmp_path, 5, fail, MOMENTS, {"step": 5})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    assert checkpoint.newest(tmp_path)[0].state["best"]["step"] == 2
