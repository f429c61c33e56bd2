"""Fingerprint of a base model: its structure and 1,024 weights, enough to tell other weights from another precision."""

import base64
import hashlib
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

NUM_SAMPLES = 1024
# bfloat16 keeps 8 bits: rounding moves a value by at most 2^-8 of itself; up to twice that is another precision, not
# another weight. Below 6e-5 the error of float16 is absolute.
_SAME_RELATIVE, _SAME_ABSOLUTE = 2.0**-7, 1e-4


@dataclass(frozen=True)
class Fingerprint:
    """structure: sha256 of the sorted parameter names and shapes; samples: float32 values at even positions."""

    structure: str
    samples: bytes

    def to_json(self) -> dict[str, Any]:
        return {"structure": self.structure, "samples": base64.b64encode(self.samples).decode()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(str(value["structure"]), base64.b64decode(str(value["samples"]), validate=True))

    def compare(self, other: "Fingerprint") -> str:
        """Returns "same", "precision" (the same weights rounded otherwise) or "different"."""
        if self == other:
            return "same"
        mine, theirs = (np.frombuffer(item.samples, np.float32) for item in (self, other))
        if self.structure != other.structure or mine.shape != theirs.shape:
            return "different"
        limit = np.maximum(np.abs(mine), np.abs(theirs)) * _SAME_RELATIVE + _SAME_ABSOLUTE
        return "precision" if bool(np.all(np.abs(mine - theirs) <= limit)) else "different"


def fingerprint(model: nn.Module) -> Fingerprint:
    """Returns the fingerprint of a model that holds no adapter. Reads 1,024 values; changes nothing."""
    parameters = sorted(model.named_parameters(), key=lambda item: item[0])
    structure = hashlib.sha256(repr([(name, tuple(p.shape)) for name, p in parameters]).encode()).hexdigest()
    ends = np.cumsum([parameter.numel() for _, parameter in parameters])
    if not len(ends) or any(parameter.is_meta for _, parameter in parameters):  # nothing to sample
        return Fingerprint(structure, b"")
    positions = (np.arange(NUM_SAMPLES, dtype=np.int64) * int(ends[-1])) // NUM_SAMPLES
    owners = np.searchsorted(ends, positions, side="right")
    values = [
        _values(parameters[owner][1], positions[owners == owner] - (ends[owner] - parameters[owner][1].numel()))
        for owner in np.unique(owners)
    ]
    return Fingerprint(structure, np.concatenate(values).astype(np.float32).tobytes())


def _values(parameter: Tensor, offsets: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    index = torch.as_tensor(offsets, device=parameter.device)
    return parameter.detach().reshape(-1)[index].float().cpu().numpy()
