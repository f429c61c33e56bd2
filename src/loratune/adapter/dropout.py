"""Dropout whose mask is a function of (seed, step, document, site), so that no cut of a batch changes it.

The same document meets the same mask however the optimizer batch is cut into micro-batches or packed, and a
resumed run meets the masks of the unbroken one, because nothing depends on a generator's history.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """Where one document's tokens stand on the flattened token axis of a micro-batch."""

    document: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Noise:
    """What the masks of one forward pass depend on."""

    seed: int
    step: int
    spans: tuple[Span, ...]
    num_tokens: int

    def keep(self, site: int, width: int, p: float, device: torch.device) -> Tensor:
        """Returns the mask of the inputs that stay, bool (num_tokens, width): each with probability 1 - p."""
        mask = torch.ones(self.num_tokens, width, dtype=torch.bool, device=device)
        generator = torch.Generator(device=device)
        for span in self.spans:
            generator.manual_seed(_key(self.seed, self.step, span.document, site))
            draw = torch.rand(span.length, width, generator=generator, device=device)
            torch.ge(draw, p, out=mask[span.start : span.start + span.length])
        return mask


def _key(*parts: int) -> int:
    """Mixes whole numbers into one 63-bit seed (numpy's SeedSequence: every bit of every part matters)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
