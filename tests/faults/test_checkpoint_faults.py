"""A checkpoint with any byte changed, any file cut, missing or added does not count; the one before it does."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratune import api
from loratune.errors import CheckpointError
from loratune.train import checkpoint
from loratune.train.config import load_run_config
from tiny_run import copy_rows, save_model, tree, write_rows

FILES = ("MANIFEST.json", "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json")
REUSED = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a checkpoint of each of the last two."""
    folder = tmp_path_factory.mktemp("run")
    overrides: dict[str, Any] = {
        "model": str(save_model(folder / "model")), "output": str(folder / "run"),
        "data.train": str(write_rows(folder / "rows.jsonl", copy_rows(32))),
        "data.validation": str(write_rows(folder / "held.jsonl", copy_rows(4, seed=1))),
        "adapter.r": 2, "train.save_every": 1,
    }  # fmt: skip
    api.run(load_run_config(None, overrides))
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def newest_folder(run: Path) -> Path:
    return run / "checkpoints" / "step-000004"


def test_the_checkpoint_is_whole_before_anything_is_done_to_it(run: Path) -> None:
    assert sorted(path.name for path in newest_folder(run).iterdir()) == sorted(FILES)
    saved, skipped = checkpoint.newest(run)
    assert (saved.path, skipped) == (newest_folder(run), [])


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Checks that a file's checkpoint is refused while its bytes are changed, and accepted after."""
    whole = path.read_bytes()
    changed = change(whole)
    assert changed != whole
    path.write_bytes(changed)
    try:
        with pytest.raises(CheckpointError, match=r"damaged|missing"):
            checkpoint.read(path.parent)
    finally:
        path.write_bytes(whole)
    checkpoint.read(path.parent)


@given(file=st.sampled_from(FILES), position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@REUSED
def test_every_flipped_bit_is_found(finished: Path, file: str, position: float, bit: int) -> None:
    def flip(data: bytes) -> bytes:
        at = int(position * len(data))
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]

    damage(newest_folder(finished) / file, flip)


@given(file=st.sampled_from(FILES), share=st.floats(0, 1, exclude_max=True))
@REUSED
def test_every_cut_is_found(finished: Path, file: str, share: float) -> None:
    damage(newest_folder(finished) / file, lambda data: data[: int(share * len(data))])


@pytest.mark.parametrize("file", FILES)
def test_bytes_behind_the_end_are_found(finished: Path, file: str) -> None:
    damage(newest_folder(finished) / file, lambda data: data + b"x")


@pytest.mark.parametrize("file", FILES)
def test_with_a_file_removed_the_one_before_serves_and_the_run_ends_the_same(
    finished: Path, run: Path, file: str
) -> None:
    (newest_folder(run) / file).unlink()
    notices: list[str] = []
    result = api.resume(run, lambda event: notices.append(event.get("message", "")))
    assert (result.status, result.steps) == ("done", 4)
    skipped = next(notice for notice in notices if notice.startswith("skipped"))
    assert "step-000004" in skipped and file in skipped
    assert any("resuming at step 3 of 4 from" in notice for notice in notices)
    for same in ("adapter/adapter_config.json", "checkpoints/step-000004/state.json"):
        assert (run / same).read_bytes() == (finished / same).read_bytes()
    weights = [(root / "adapter/adapter_model.safetensors").read_bytes() for root in (run, finished)]
    data = [each[8 + int.from_bytes(each[:8], "little") :] for each in weights]  # the header's order is not fixed
    assert data[0] == data[1] and len(data[0]) > 1000


def test_a_file_that_nobody_wrote_is_found(run: Path) -> None:
    (newest_folder(run) / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"files missing or added: pytorch_model\.bin"):
        checkpoint.read(newest_folder(run))


def test_files_of_two_checkpoints_do_not_mix(run: Path) -> None:
    other = run / "checkpoints" / "step-000003"
    shutil.copy(other / "optimizer.safetensors", newest_folder(run) / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is damaged"):
        checkpoint.read(newest_folder(run))


def test_with_no_whole_checkpoint_nothing_is_done_and_all_are_named(run: Path) -> None:
    for folder in checkpoint.folders(run):
        (folder / "state.json").unlink()
    before = tree(run)
    with pytest.raises(CheckpointError, match=r"no complete checkpoint.*/step-000004: .*/step-000003: ") as caught:
        api.resume(run)
    assert str(caught.value).count("state.json") == 2
    assert tree(run) == before


def test_a_folder_left_half_written_by_a_crash_is_no_checkpoint(run: Path) -> None:
    """The writing died before the rename: the folder has its temporary name."""
    newest_folder(run).rename(run / "checkpoints" / ".step-000004.x1y2.tmp")
    saved, skipped = checkpoint.newest(run)
    assert saved.step == 3 and skipped == []
