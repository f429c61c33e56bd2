"""Images and masks from files: arrays that numpy saved (.npy), and every kind that Pillow reads, if it is installed."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loratune.errors import ConfigError, DataError

MAX_CLASS = 65535
_MASK_MODES = ("1", "L", "P", "I", "I;16")  # one number a pixel
INSTALL = "pip install 'loratune[images]'"

Pixels = npt.NDArray[np.uint8]  # (H, W, 3)
Mask = npt.NDArray[np.integer[Any]]  # (H, W)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file as it was when it was first read: `content` raises DataError for one that has changed since."""

    path: Path
    digest: str

    @classmethod
    def of(cls, path: Path) -> "tuple[ImageFile, bytes]":
        """Returns a file with its bytes; raises DataError for one that cannot be read."""
        content = _bytes(path)
        return cls(path, hashlib.sha256(content).hexdigest()), content

    def content(self) -> bytes:
        """Returns the file's bytes."""
        now, content = ImageFile.of(self.path)
        if now != self:
            raise DataError(f"{self.path} changed while it was used; start again when nothing writes to it.")
        return content


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"the file {path} cannot be read: {error.strerror or error}.") from error


def image(content: bytes, path: Path) -> Pixels:
    """Returns a file's image, red, green and blue, (H, W, 3); raises DataError for what is no image."""
    pixels = _array(content, path) if path.suffix == ".npy" else np.array(_opened(content, path).convert("RGB"))
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise DataError(f"{path} is {_told(pixels)}; expected an image: uint8 (height, width, 3), or grey without 3.")
    return pixels


def mask(content: bytes, path: Path) -> Mask:
    """Returns a file's mask, the number of each pixel's class, (H, W); raises DataError for what is none."""
    if path.suffix == ".npy":
        numbers = _array(content, path)
    else:
        opened = _opened(content, path)
        if opened.mode not in _MASK_MODES:
            raise DataError(f"the mask {path} holds colours ({opened.mode}); expected one number a pixel, its class.")
        numbers = np.array(opened)
    if numbers.dtype == np.bool_:
        numbers = numbers.astype(np.uint8)
    if numbers.ndim != 2 or numbers.dtype.kind not in "ui" or not numbers.size:
        raise DataError(f"{path} is {_told(numbers)}; expected a mask: whole numbers (height, width).")
    if numbers.min() < 0 or numbers.max() > MAX_CLASS:
        raise DataError(f"the mask {path} holds {numbers.min()} to {numbers.max()}; expected 0 to {MAX_CLASS}.")
    return numbers


def _array(content: bytes, path: Path) -> npt.NDArray[Any]:
    """Returns what a .npy file holds, as the bytes that are there: numpy's own reader makes an array of whatever size
    the header claims, and reads objects, which are pickles."""
    stream, numpy = io.BytesIO(content), np.lib.format
    try:
        major = numpy.read_magic(stream)[0]
        read = numpy.read_array_header_1_0 if major == 1 else numpy.read_array_header_2_0
        shape, by_columns, dtype = read(stream)
        values = np.frombuffer(content, dtype, offset=stream.tell())
        return values.reshape(shape, order="F" if by_columns else "C").copy()  # not read-only
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is no array that numpy saved: {str(error).splitlines()[0]}.") from error


def _opened(content: bytes, path: Path) -> Any:
    """Returns what Pillow reads, turned as its EXIF says, as every viewer shows it."""
    try:
        from PIL import Image, ImageOps  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"{path}: images other than .npy arrays are read with Pillow, which is not installed: {INSTALL}."
        ) from error
    try:
        opened = Image.open(io.BytesIO(content))
        opened.load()
        return ImageOps.exif_transpose(opened)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no image that can be read: {error}.") from error


def _told(array: npt.NDArray[Any]) -> str:
    return f"{array.dtype} {array.shape}"
