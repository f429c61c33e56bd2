"""Checkpoints: a directory that is complete or does not count. safetensors and JSON only, and never the base model.

    checkpoints/step-000120/{adapter_config.json, adapter_model.safetensors, optimizer.safetensors, state.json,
                             MANIFEST.json}

The adapter's two files are for others to read; optimizer.safetensors holds what training goes on from: the trained
parameters bit for bit, and the moments. MANIFEST.json is written last and holds the size and sha256 of every other
file, and the sha256 of its own content. Dropout masks and the order of rows follow from (seed, step), so there is no
random state to keep.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratune import files
from loratune.errors import CheckpointError

FOLDER, MANIFEST, STATE, OPTIMIZER = "checkpoints", "MANIFEST.json", "state.json", "optimizer.safetensors"
_STEP = re.compile(r"step-(\d{6,})")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what bad JSON can lead to


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]

    def training_state(self) -> dict[str, Tensor]:
        """Returns the optimizer's moments and the parameters they belong to."""
        return load_file(str(self.path / OPTIMIZER))


def step_folder(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:06d}"


def write(run: Path, step: int, write_adapter: Any, optimizer: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Writes one checkpoint aside, reads it back, and renames it into place; returns its folder.

    `write_adapter(folder)` writes the adapter's two files. An existing checkpoint of the same step is replaced, and
    what a run that died has left half-written is removed. Raises CheckpointError if something else is read back.
    """
    target = step_folder(run, step)
    files.remove_leftovers(target.parent)
    tensors = {name: value.contiguous().cpu() for name, value in optimizer.items()}
    with files.staged_directory(target, replace=True) as staging:
        write_adapter(staging)
        save_file(tensors, str(staging / OPTIMIZER))
        files.sync_file(staging / OPTIMIZER)
        files.write_json(staging / STATE, state)
        _write_manifest(staging)
        verify(staging)
        _check_tensors(staging / OPTIMIZER, tensors)
    return target


def _check_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    found = load_file(str(file))
    for name in tensors | found:
        if name not in found or name not in tensors or not same_bits(found[name], tensors[name]):
            raise CheckpointError(f"{file}: {name} is not read back as it was written; the disk is not to be trusted.")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same in type, shape and every bit, NaN included."""
    same_kind = a.shape == b.shape and a.dtype == b.dtype
    return same_kind and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _write_manifest(folder: Path) -> None:
    entries = {
        path.name: {"bytes": path.stat().st_size, "sha256": files.digest(path)} for path in sorted(folder.iterdir())
    }
    files.write_json(folder / MANIFEST, {"files": entries, "sha256": _own_digest(entries)})


def _own_digest(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def verify(folder: Path) -> None:
    """Raises CheckpointError unless every file is there, whole and unchanged, and none is there that should not be."""
    entries = _read_manifest(folder / MANIFEST)
    found = {each.name for each in folder.iterdir()} - {MANIFEST}
    if found != set(entries):
        raise CheckpointError(f"{folder}: files missing or added: {', '.join(sorted(found ^ set(entries)))}.")
    for name, (num_bytes, sha256) in entries.items():
        size = (folder / name).stat().st_size
        if size != num_bytes or files.digest(folder / name) != sha256:
            raise CheckpointError(
                f"{folder / name} is damaged: found {size:,} bytes, expected {num_bytes:,} as written."
            )


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Returns (size in bytes, sha256) of each file; raises CheckpointError unless every byte is as written."""
    try:
        text = path.read_bytes()
        manifest = json.loads(text)
        entries = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        intact = manifest["sha256"] == _own_digest(manifest["files"]) and text.decode() == files.json_text(manifest)
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path} is missing or damaged ({type(error).__name__}): the checkpoint is incomplete."
        ) from error
    if not intact:
        raise CheckpointError(f"{path} is damaged: its own digest does not fit.")
    return entries


def read(folder: Path) -> Checkpoint:
    """Reads one checkpoint after verifying every byte of it; raises CheckpointError."""
    found = _STEP.fullmatch(folder.name)
    if found is None:
        raise CheckpointError(f"{folder} is not named step-NNNNNN.")
    try:
        verify(folder)
        state = json.loads((folder / STATE).read_bytes())
        step = state["step"]
    except _UNREADABLE as error:
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {error}.") from error
    if step != int(found[1]):
        raise CheckpointError(f"{folder} is the checkpoint of step {step}, under another name.")
    return Checkpoint(folder, step, state)


def folders(run: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, oldest first; half-written ones have other names and are none."""
    root = run / FOLDER
    found = [path for path in root.iterdir() if _STEP.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest(run: Path) -> tuple[Checkpoint, list[str]]:
    """Returns the newest complete checkpoint and why each newer one was skipped; raises CheckpointError for none."""
    skipped: list[str] = []
    for folder in reversed(folders(run)):
        try:
            return read(folder), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    detail = f" Skipped: {' '.join(skipped)}" if skipped else ""
    raise CheckpointError(f"{run} holds no complete checkpoint to resume from.{detail}")


def retain(run: Path, keep: int) -> None:
    """Removes all checkpoints but the last `keep` and the ones that those name as the best so far.

    Raises CheckpointError for one that cannot be removed.
    """
    found = folders(run)
    needed = {_best_of(run, folder) for folder in found[-keep:]}
    for folder in found[:-keep]:
        if folder not in needed:
            _remove(folder, run)


def _remove(folder: Path, run: Path) -> None:
    try:
        files.remove_directory(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder} is not needed any more and cannot be removed: {error}. Later checkpoints are whole. Find out "
            f"why, then: loratune train --resume {run}."
        ) from error


def _best_of(run: Path, folder: Path) -> Path | None:
    try:
        best = json.loads((folder / STATE).read_bytes())["best"]
        return step_folder(run, best["step"]) if best else None
    except _UNREADABLE:  # damaged since: nobody can resume from it
        return None
