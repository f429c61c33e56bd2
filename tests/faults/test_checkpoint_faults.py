"""A checkpoint with any byte changed, any file cut, missing or added does not count; the one before it does."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faults.harness import figure, toy_run
from loratune import api
from loratune.errors import CheckpointError
from loratune.train import checkpoint, identity, loop
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


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(finished: Path, run: Path) -> None:
    """The metrics of the steps that are lost are not kept twice."""
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "adapter")
    notices: list[str] = []
    result = api.resume(run, lambda event: notices.append(event.get("message", "")))
    assert (result.status, result.steps) == ("done", 4) and result.before is not None
    assert f"{run} has no checkpoint yet: beginning at step 0" in notices
    for same in ("adapter/adapter_config.json", "checkpoints/step-000004/state.json", "run.yaml"):
        assert (run / same).read_bytes() == (finished / same).read_bytes()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(
        (finished / "metrics.jsonl").read_text().splitlines()
    )


def test_a_finished_run_without_its_checkpoints_does_not_begin_again(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    before = tree(run)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        api.resume(run)
    assert tree(run) == before


def test_a_checkpoint_under_another_step_is_refused(run: Path) -> None:
    newest_folder(run).rename(run / "checkpoints" / "step-000009")
    saved, skipped = checkpoint.newest(run)
    assert saved.step == 3 and "step-000009 is the checkpoint of step 4, under another name" in skipped[0]


HOSTILE = {
    "no object": "[]",
    "files no object": '{"files": 5, "sha256": "x"}',
    "deep": "[" * 200_000,
    "entries of another kind": '{"files": {"state.json": 5}, "sha256": "x"}',
    "sizes of another kind": '{"files": {"state.json": {"bytes": [], "sha256": "x"}}, "sha256": "x"}',
    "not UTF-8": b"\xff\xfe",
    "a null": "null",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_manifest_of_another_kind_is_refused(run: Path, text: str | bytes) -> None:
    (newest_folder(run) / "MANIFEST.json").write_bytes(text.encode() if isinstance(text, str) else text)
    saved, skipped = checkpoint.newest(run)
    assert saved.step == 3 and "MANIFEST.json is missing or damaged" in skipped[0]


def test_a_state_of_another_kind_is_refused(run: Path) -> None:
    """With a manifest that fits it: somebody wrote it so."""
    (newest_folder(run) / "state.json").write_text("[1]")
    (newest_folder(run) / "MANIFEST.json").unlink()
    checkpoint._write_manifest(newest_folder(run))
    saved, skipped = checkpoint.newest(run)
    assert saved.step == 3 and "step-000004 cannot be read: TypeError" in skipped[0]


def test_what_is_not_read_back_as_written_is_no_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes a write and keeps something else; the manifest alone, made from what is there, would fit."""
    tensors = checkpoint.newest(run)[0].training_state()
    write = checkpoint.save_file

    def careless(values: dict[str, Any], path: str) -> None:
        write({name: value * 0 if name == "step" else value for name, value in values.items()}, path)

    monkeypatch.setattr(checkpoint, "save_file", careless)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: step is not read back as it was written"):
        checkpoint.write(run, 5, lambda folder: None, tensors, {"step": 5})
    assert [folder.name for folder in checkpoint.folders(run)] == ["step-000003", "step-000004"]


@pytest.mark.parametrize("lasting", [False, True])
def test_a_rename_that_fails_loses_nothing_of_what_had_the_name(
    run: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    """The one that was there is put back; where even that fails, it stays whole under another name."""
    before, rename = tree(newest_folder(run)), os.rename

    def failing(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp") or (lasting and Path(source).parent.suffix == ".old"):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(run, 4, lambda folder: None, {}, {"step": 4})
    kept = list((run / "checkpoints").glob("*.old/step-000004")) if lasting else [newest_folder(run)]
    assert [tree(folder) for folder in kept] == [before]
    assert checkpoint.newest(run)[0].step == (3 if lasting else 4)


def test_what_a_run_that_died_left_is_removed_by_the_next_save(run: Path) -> None:
    root = run / "checkpoints"
    for name in (".step-000005.x1y2.tmp", ".step-000002.removed", ".step-000004.zz.old"):
        (root / name / "inner").mkdir(parents=True)
    (root / ".note").write_text("somebody else's")
    checkpoint.write(run, 5, lambda folder: None, {}, {"step": 5})
    assert sorted(path.name for path in root.iterdir()) == [".note", "step-000003", "step-000004", "step-000005"]


def every_byte(folder: Path) -> list[tuple[Path, int]]:
    """(file, offset) of every byte in the full form, else of every 41st."""
    step = 1 if os.environ.get("LORATUNE_FAULTS") == "full" else 41
    return [(folder / file, at) for file in FILES for at in range(0, (folder / file).stat().st_size, step)]


def is_found(folder: Path) -> bool:
    try:
        checkpoint.read(folder)
    except CheckpointError:
        return True
    return False


def test_every_byte_flipped_is_found(finished: Path) -> None:
    places = every_byte(newest_folder(finished))
    good = 0
    for path, at in places:
        whole = path.read_bytes()
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        good += is_found(path.parent)
        path.write_bytes(whole)
    assert not is_found(newest_folder(finished))
    figure("bytes flipped, found", good, len(places))


def test_every_file_cut_at_every_byte_is_found(finished: Path) -> None:
    places = every_byte(newest_folder(finished))
    good = 0
    for path, at in places:
        whole = path.read_bytes()
        os.truncate(path, at)
        good += is_found(path.parent)
        path.write_bytes(whole)
    assert not is_found(newest_folder(finished))
    figure("cuts at every byte, found", good, len(places))


def test_no_tensor_or_key_of_the_state_may_be_missing(tmp_path: Path) -> None:
    """With a manifest that fits what is left: a checkpoint is all or nothing."""
    run = toy_run(tmp_path, max_steps=1)
    run.identity = {"machine": "toy"}
    loop.train(run)
    saved = checkpoint.newest(run.output)[0]
    tensors, state = saved.training_state(), saved.state
    cases = [(without(tensors, name), state) for name in tensors] + [(tensors, without(state, name)) for name in state]
    good = 0
    for number, (content, position) in enumerate(cases):
        folder = checkpoint.write(tmp_path / str(number), 1, lambda folder: None, content, position)
        try:
            read = checkpoint.read(folder)
            identity.check(read, run.identity)
            loop.restore(run, read)
        except CheckpointError:
            good += 1
    figure("tensors and keys of the state removed, refused", good, len(cases))


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}
