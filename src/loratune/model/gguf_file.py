"""Reading a GGUF file: metadata by key, tensors as mapped bytes, nothing believed that the file's size does not allow.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from loratune.errors import ConfigError

Array = np.ndarray[Any, np.dtype[Any]]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_FLOATS = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}


@dataclass(frozen=True)
class Tensor:
    """One tensor as the file stores it: `data` is bytes, `shape` is in torch's order."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    data: Array

    def values(self) -> Array:
        """Returns the values in float32; raises ConfigError for a quantisation that `gguf` cannot undo."""
        try:
            return gguf.dequantize(self.data, self.kind).reshape(self.shape)
        except NotImplementedError as error:
            raise ConfigError(
                f"tensor {self.name} is stored as {self.kind.name}, which cannot be dequantised. "
                "Use a Q4_K_M, Q8_0 or F16 file, or the original folder."
            ) from error


@dataclass(frozen=True)
class File:
    """What a GGUF file holds: metadata by key, tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The float type to keep: the file's own, or float32 where blocks were dequantised, so that nothing rounds."""
        kinds = {tensor.kind for tensor in self.tensors.values()}
        halves = [_FLOATS[kind] for kind in kinds if _FLOATS.get(kind, torch.float32) != torch.float32]
        return halves[0] if len(halves) == 1 and kinds <= set(_FLOATS) else torch.float32


class _Cursor:
    """Reads little-endian values one after another; running past the end is a ConfigError."""

    def __init__(self, blob: memoryview, path: Path) -> None:
        self.blob, self.path, self.position = blob, path, 0

    def fail(self, found: str) -> ConfigError:
        return ConfigError(
            f"{self.path} is not a usable GGUF file: {found} at byte {self.position}. Download or convert it again."
        )

    def take(self, num_bytes: int) -> memoryview:
        end = self.position + num_bytes
        if end > len(self.blob):
            raise self.fail(f"it ends after {len(self.blob)} bytes, {num_bytes} more were expected")
        piece = self.blob[self.position : end]
        self.position = end
        return piece

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def string(self) -> str:
        piece = self.take(self.unpack("Q")[0])
        try:
            return str(piece, "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail("a text that is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return _shortest(self.unpack(_SCALARS[kind])[0], kind)
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.fail(f"metadata of the unknown type {kind}")
        item, count = self.unpack("IQ")
        if item in _SCALARS:
            width = struct.calcsize(_SCALARS[item])
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self.take(count * width)))
        if item != _STRING:
            raise self.fail(f"an array of the unknown type {item}")
        return [self.string() for _ in range(count)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, (num_dimensions,) = self.string(), self.unpack("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise self.fail(f"tensor {name} with {num_dimensions} dimensions (at most {_MAX_DIMENSIONS})")
        shape = tuple(reversed(self.unpack(f"{num_dimensions}Q")))
        kind, offset = self.unpack("IQ")
        return name, shape, kind, offset


def _shortest(value: Any, kind: int) -> Any:
    """float32 metadata as the decimal it was written from: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if _SCALARS[kind] == "f" else value


def read(path: Path) -> File:
    """Reads a GGUF file's metadata and maps its tensors, without copying them.

    Raises ConfigError when the file is missing, damaged or of another kind.
    """
    try:
        with path.open("rb") as file:
            blob = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ConfigError(f"{path} cannot be read as a GGUF file: {error}.") from error
    cursor = _Cursor(blob, path)
    magic, version = cursor.unpack("4sI")
    if magic != b"GGUF" or version not in (2, 3):
        raise cursor.fail(f"it starts with {magic!r}, version {version} (expected b'GGUF', 2 or 3)")
    num_tensors, num_keys = cursor.unpack("QQ")
    metadata = {cursor.string(): cursor.value(cursor.unpack("I")[0]) for _ in range(num_keys)}
    entries = [cursor.tensor() for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.fail(f"alignment {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {entry[0]: _tensor(cursor, start, *entry) for entry in entries}
    if len(tensors) != num_tensors:
        raise cursor.fail("two tensors of one name")
    return File(path, metadata, tensors)


def _tensor(cursor: _Cursor, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
    try:
        ggml = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[ggml]
    except (ValueError, KeyError) as error:
        raise cursor.fail(f"tensor {name} of the unknown type {kind}") from error
    if not shape or shape[-1] % block:
        raise cursor.fail(f"tensor {name} of shape {shape} in blocks of {block}")
    row_bytes = shape[-1] // block * block_bytes
    cursor.position = start + offset
    data = np.frombuffer(cursor.take(math.prod(shape[:-1]) * row_bytes), np.uint8)
    return Tensor(name, shape, ggml, data.reshape(*shape[:-1], row_bytes))
