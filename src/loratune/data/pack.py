"""Which documents make a step, and how a step is cut into micro-batches: pure functions of numbers.

The order depends on (seed, epoch) only, so a resumed run finds its place again from one step number.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@lru_cache(maxsize=2)  # a run asks for the same one at each step; sorting a million rows takes 0.1 s
def epoch_order(num_documents: int, seed: int, epoch: int) -> Indices:
    """Returns a permutation of 0..num_documents-1, int64 (N,), read-only, a pure function of (seed, epoch).

    Sorts the raw 64-bit words of PCG64, whose stream NumPy keeps stable between releases; that of
    `Generator.permutation` it does not (NumPy NEP 19).
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_documents)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def step_rows(num_documents: int, batch_size: int, seed: int, epoch: int, position: int) -> list[int]:
    """Returns the documents of one optimizer step of an epoch, the first at position 0; the last may have fewer."""
    start = position * batch_size
    return epoch_order(num_documents, seed, epoch)[start : start + batch_size].tolist()


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Packs the positions 0..n-1 into packs of at most `max_tokens`, by best fit decreasing (Johnson 1974).

    Longest first, each into the fullest pack that still holds it; at most 11/9 of the best possible number of packs,
    plus one. A document longer than `max_tokens` has a pack of its own. Positions ascend inside a pack.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for position in _longest_first(lengths):
        length = lengths[position]
        found = bisect_left(room, (length, -1))
        if found < len(room):
            left, pack = room.pop(found)
            packs[pack].append(position)
        else:
            left, pack = max_tokens, len(packs)
            packs.append([position])
        insort(room, (left - length, pack))
    return sorted(sorted(pack) for pack in packs)


def length_groups(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups the positions 0..n-1 for padded rows: similar lengths together, rows * longest <= `max_tokens`.

    For models whose rows cannot be packed. A document longer than `max_tokens` has a group of its own.
    """
    groups: list[list[int]] = []
    longest = 0
    for position in _longest_first(lengths):
        if groups and (len(groups[-1]) + 1) * longest <= max_tokens:
            groups[-1].append(position)
        else:
            groups.append([position])
            longest = lengths[position]
    return sorted(sorted(group) for group in groups)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
