"""How a model wants its images, as its preprocessor_config.json says; what a tokenizer is to texts.

The same as transformers' image processors do: resized as Pillow resizes, scaled, less the mean, by the deviation.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loratune import files
from loratune.data.images import Mask, Pixels
from loratune.errors import ConfigError

FILE = "preprocessor_config.json"
_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class Images:
    """The size (height, width) that images are brought to, and what is done with their values; `settings` is what the
    file says."""

    height: int
    width: int
    resampling: str
    scale: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    settings: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> "Images":
        """Reads a model's folder; raises ConfigError for one without the file, or with settings that are not known."""
        file = folder / FILE
        if not file.is_file():
            raise ConfigError(f"{folder} holds no {FILE}, which says how images are prepared. Copy it there.")
        try:
            found: dict[str, Any] = json.loads(file.read_bytes())
            height, width = _size(found["size"])
            scaled, normalised = found.get("do_rescale", True), found.get("do_normalize", True)
            return cls(
                height=height,
                width=width,
                resampling=_RESAMPLING[found.get("resample", 2)],
                scale=float(found.get("rescale_factor", 1 / 255)) if scaled else 1.0,
                mean=_three(found["image_mean"]) if normalised else (0.0, 0.0, 0.0),
                deviation=_three(found["image_std"]) if normalised else (1.0, 1.0, 1.0),
                settings=found,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} is not understood ({error!r}); expected size (height and width), resample (2 or 3), "
                "image_mean and image_std, as SegFormer's has them."
            ) from error

    def pixels(self, image: Pixels) -> Tensor:
        """Returns an image as the model reads it, float32 (3, height, width)."""
        planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
        resized = F.interpolate(planes, (self.height, self.width), mode=self.resampling, antialias=True)[0]
        values = resized.double() * self.scale
        return ((values - _column(self.mean)) / _column(self.deviation)).float()

    def classes(self, mask: Mask) -> Tensor:
        """Returns a mask in the size of the model's images, int64 (height, width): of each place the nearest pixel."""
        numbers = torch.from_numpy(mask.astype(np.float64))[None, None]
        return F.interpolate(numbers, (self.height, self.width), mode="nearest-exact")[0, 0].long()

    def save_pretrained(self, folder: str) -> None:
        """Writes the file into a folder, as tokenizers do theirs."""
        files.write_json(Path(folder, FILE), self.settings)


def _size(found: Any) -> tuple[int, int]:
    if isinstance(found, int):
        return found, found
    return int(found["height"]), int(found["width"])


def _three(found: Any) -> tuple[float, ...]:
    if len(found) != 3:
        raise ValueError(f"{len(found)} channels")
    return tuple(map(float, found))


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]
