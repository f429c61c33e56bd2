"""Where rows come from: a file, a sample of one, a folder with splits, or a data set of the hub.

A spec is a path, or `FILE#500` (a sample of 500 rows), `FOLDER` (its train files), `FOLDER/validation`,
`hub:NAME`, `hub:NAME:SPLIT`, `hub:NAME:CONFIG:SPLIT`.
"""

import hashlib
import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loratune.data.arrow_files import spoken
from loratune.data.readers import KINDS, Hasher, feed, file_kind, read_file
from loratune.data.strict_json import content_hash
from loratune.errors import ConfigError, DataError

# The split a file belongs to, by the first part of its name: train-00000-of-00002.parquet, val.jsonl, test.csv.gz.
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_SHARD = re.compile(r"[-_.](\d+)(?:[-_.]of[-_.](\d+))?$")


class Record(NamedTuple):
    """One row of a file as it stands there, or the reason why it cannot be read; `line` as `readers` counts."""

    source: str
    line: int
    value: dict[str, Any] | DataError


@dataclass(frozen=True)
class Source:
    """What a spec stands for: the files in order, each with the name that messages show, and the sample's size."""

    files: tuple[tuple[str, Path], ...]
    sample: int | None = None


def read_records(spec: str | Path, hasher: Hasher | None = None) -> Iterator[Record]:
    """Yields every row of a spec, bad ones as a DataError in `value`; holds one row, chunk or batch at a time.

    A sample is the rows with the lowest hashes of their content, so that rows added to a file change little of it.
    `hasher` ends with the digest of all bytes read (see `digest`). Raises ConfigError for what cannot be opened.
    """
    source = resolve(spec)
    return _every(source, hasher) if source.sample is None else _sampled(source, source.sample, hasher)


def first_records(spec: str | Path) -> Iterator[Record]:
    """Yields the rows of a spec in order, whether or not it is a sample, for a look at the first of them."""
    return _every(resolve(spec), None)


def digest(spec: str | Path) -> str:
    """Returns the sha256, in hexadecimal, that `read_records` leaves in a hasher, without reading rows."""
    source, state = resolve(spec), hashlib.sha256()
    for _, path in source.files:
        try:
            feed(path, state)
        except OSError as error:
            raise ConfigError(f"cannot read the data file {path}: {error.strerror}. Check the path.") from error
    _mark(source, state)
    return state.hexdigest()


def resolve(spec: str | Path) -> Source:
    """Finds the files of a spec; ConfigError where there are none."""
    text = str(spec)
    if text.startswith("hub:"):
        name, sample = _sample_size(text)
        return Source(_hub_files(name), sample)
    if Path(text).exists():
        return Source(_local_files(Path(text)))
    name, sample = _sample_size(text)
    return Source(_local_files(Path(name)), sample)


def folder_splits(folder: Path) -> dict[str, list[Path]]:
    """Returns the files of each split (train, validation, test) that a folder has, the shards of one in order.

    Raises ConfigError for a split with files that are not the shards of one, or of which one is missing.
    """
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        split = _SPLITS.get(re.split(r"[-_.]", path.name.lower())[0])
        if split and path.is_file() and file_kind(path):
            splits.setdefault(split, []).append(path)
    for split, files in splits.items():
        _check_shards(folder, split, files)
    return splits


def _check_shards(folder: Path, split: str, files: list[Path]) -> None:
    found = [_SHARD.search(path.name.split(file_kind(path) or "")[0]) for path in files]
    if len(files) > 1 and not (all(found) and len({file_kind(path) for path in files}) == 1):
        names = ", ".join(path.name for path in files[:5])
        raise ConfigError(f"{folder}: {names} are all {split} data; keep one of them, or give the file itself.")
    totals = {int(match[2]) for match in found if match and match[2]}
    if totals and totals != {len(files)}:
        raise ConfigError(f"{folder}: {len(files)} of {max(totals)} {split} shards are there; fetch the missing ones.")


def _sample_size(text: str) -> tuple[str, int | None]:
    name, mark, number = text.rpartition("#")
    if not mark:
        return text, None
    if not re.fullmatch(r"[1-9]\d{0,11}", number):
        raise ConfigError(f"{text}: expected a number of rows after '#', such as {name}#500; found {number!r}.")
    return name, int(number)


def _local_files(path: Path) -> tuple[tuple[str, Path], ...]:
    if path.is_dir():
        return _split_files(path, "train")
    split = _SPLITS.get(path.name)
    if not path.exists() and split and path.parent.is_dir():
        return _split_files(path.parent, split)
    return ((str(path), path),)


def _split_files(folder: Path, split: str) -> tuple[tuple[str, Path], ...]:
    splits = folder_splits(folder)
    if split not in splits:
        found = f"found {' and '.join(splits)} files" if splits else "found no file of that kind"
        kinds = ", ".join(KINDS)
        raise ConfigError(f"{folder} is a folder without {split} data: {found}; expected {split}.jsonl (or {kinds}).")
    return tuple((str(path), path) for path in splits[split])


def _hub_files(spec: str) -> tuple[tuple[str, Path], ...]:
    """Lets `datasets` download (or find in its cache) one split; the Arrow files it keeps are read as any others."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"{spec}: reading from the hub needs the datasets library; pip install 'loratune[datasets]'."
        ) from error
    _, name, *rest = spec.split(":")
    *config, split = rest or ["train"]
    if not name or not split or len(config) > 1:
        raise ConfigError(f"{spec}: expected hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT.")
    try:
        found = datasets.load_dataset(name, *config, split=split)
    except Exception as error:  # network, names, splits, configurations: its own message says which
        raise ConfigError(f"{spec}: cannot be loaded from the hub: {spoken(error)}.") from error
    files = [Path(file["filename"]) for file in found.cache_files]
    return tuple((spec if len(files) == 1 else f"{spec}/{path.name}", path) for path in files)


def _every(source: Source, hasher: Hasher | None) -> Iterator[Record]:
    for name, path in source.files:
        for line, value in read_file(path, hasher):
            yield Record(name, line, value)


def _sampled(source: Source, size: int, hasher: Hasher | None) -> Iterator[Record]:
    """Reads twice: what is kept between is two numbers a row of the sample."""
    keys = ((_key(record), index) for index, record in enumerate(_every(source, hasher)))
    chosen = {index for _, index in heapq.nsmallest(size, keys)}
    if hasher is not None:
        _mark(source, hasher)
    for index, record in enumerate(_every(source, None)):
        if index in chosen:
            yield record


def _key(record: Record) -> int:
    return content_hash(record.line if isinstance(record.value, DataError) else record.value, "sample")


def _mark(source: Source, hasher: Hasher) -> None:
    if source.sample is not None:
        hasher.update(f"#{source.sample}".encode())
