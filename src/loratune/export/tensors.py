"""safetensors files read and written block by block: memory stays at one block, whatever the sizes on disk.

The format: 8 bytes, little endian, with the header's length; the header, JSON padded with spaces to a multiple of 8,
name -> {dtype, shape, data_offsets}; then the tensors' bytes without gaps.
Source: https://github.com/huggingface/safetensors, section "Format".
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune import files
from loratune.errors import ExportError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_MAX_HEADER_BYTES = 100_000_000  # as the format's own readers
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: safetensors' name of its type, and where its bytes lie."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def blocks(self) -> Iterator[bytearray]:
        """Yields the tensor's bytes as they are, 4 MiB at a time."""
        yield from self._read(_BLOCK_BYTES)

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (index of the first row, rows) of a floating tensor, about 4 MiB at a time; a scalar is one row."""
        dtype, columns = FLOATS[self.dtype], self.shape[1:]
        row_bytes = math.prod(columns) * dtype.itemsize
        num_rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
        for index, data in enumerate(self._read(num_rows * row_bytes)):
            yield index * num_rows, torch.frombuffer(data, dtype=dtype).reshape(-1, *columns)

    def whole(self) -> Tensor:
        """Returns a floating tensor in full."""
        parts = [part for _, part in self.rows()]
        return torch.cat(parts).reshape(self.shape) if parts else torch.empty(self.shape, dtype=FLOATS[self.dtype])

    def _read(self, size: int) -> Iterator[bytearray]:
        with self.file.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, self.num_bytes, size) if self.num_bytes else ():
                data = bytearray(min(size, self.num_bytes - start))
                if file.readinto(data) != len(data):
                    raise ExportError(f"{self.file} changed while it was read: {self.name} ends early. Start again.")
                yield data


def read_headers(folder: Path) -> dict[str, Stored]:
    """Returns the tensors of a model's safetensors files by name, from the headers alone.

    Raises ExportError for a folder without safetensors, a missing shard, a damaged header, a name in two shards.
    """
    found: dict[str, Stored] = {}
    for file in _weight_files(folder):
        for stored in _read_header(file):
            if stored.name in found:
                raise ExportError(f"{stored.name} is in two files: {found[stored.name].file} and {file}.")
            found[stored.name] = stored
    return found


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names: set[str] = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
        odd = [name for name in names if Path(name).name != name]
        missing = sorted(name for name in names if not (folder / name).is_file())
        if odd or missing:
            raise ExportError(f"{folder / INDEX} lists {(odd or missing)[0]}, which is not in {folder}.")
        return [folder / name for name in sorted(names)]
    if not (folder / WEIGHTS).is_file():
        raise ExportError(
            f"{folder} holds no {WEIGHTS}. Files are merged from safetensors only: load the base once in transformers "
            "and save it with save_pretrained, then give that folder with --model."
        )
    return [folder / WEIGHTS]


def _read_header(path: Path) -> Iterator[Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ExportError(f"{path} is damaged: its header would have {length:,} bytes, the file has {size:,}.")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            yield from _entries(path, header, 8 + length, size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(f"{path} is damaged: its header cannot be read ({error}).") from error


def _entries(path: Path, header: dict[str, Any], start: int, size: int) -> Iterator[Stored]:
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        stored = Stored(path, name, entry["dtype"], tuple(entry["shape"]), start + first, last - first)
        dtype = FLOATS.get(stored.dtype)
        right_size = dtype is None or stored.num_bytes == math.prod(stored.shape) * dtype.itemsize
        if not (0 <= first <= last and start + last <= size and right_size):
            raise ExportError(
                f"{path} is damaged: {name} does not fit ({stored.shape} {stored.dtype}, {size:,} bytes)."
            )
        yield stored


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: what the header says of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def write_file(path: Path, entries: Sequence[Entry], contents: Iterable[Iterable[Any]]) -> None:
    """Writes a safetensors file: the header first, then each tensor's bytes as they come, in the entries' order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.num_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with files.open_new(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, blocks in zip(entries, contents, strict=True):
            written = sum(file.write(block) for block in blocks)
            assert written == entry.num_bytes, (entry, written)


def shard_names(number: int) -> list[str]:
    """Returns transformers' names for the files of a model."""
    return [WEIGHTS] if number == 1 else [f"model-{i:05}-of-{number:05}.safetensors" for i in range(1, number + 1)]


def write_index(folder: Path, shards: Sequence[tuple[str, Sequence[Entry]]]) -> None:
    """Writes model.safetensors.index.json for the files (name, entries)."""
    total = sum(entry.num_bytes for _, entries in shards for entry in entries)
    where = {entry.name: name for name, entries in shards for entry in entries}
    files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
