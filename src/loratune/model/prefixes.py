"""Documents that begin alike: what they share is computed once in a micro-batch, and each goes on from there.

Only what stands before a document's first predicting token is shared, so no label is met twice. The gradient is that of
the documents apart (dropout aside, whose masks belong to one document), at the cost of the distinct tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from loratune.data.encode import Document
from loratune.data.pack import micro_batches

MIN_TOKENS = 16  # what a shorter common beginning saves, the copies of its keys and values cost


class Group(NamedTuple):
    """Documents with a common beginning of `shared` tokens, by their positions in the batch; 0 for one alone."""

    shared: int
    members: list[int]


class Segment(NamedTuple):
    """A stretch of a packed row that attends to itself and to the beginning it goes on from (empty where equal)."""

    start: int
    end: int
    from_start: int = 0
    from_end: int = 0


def groups(documents: Sequence[Document]) -> list[Group]:
    """Returns the documents in groups that begin alike for at least MIN_TOKENS before any of them predicts."""
    ends = [int(document.trained.argmax()) - 1 for document in documents]  # the first predicting token stays its own
    keys = [document.input_ids[: max(0, end)] for document, end in zip(documents, ends, strict=True)]
    order = sorted(range(len(documents)), key=lambda position: (keys[position].tobytes(), position))
    found: list[Group] = []
    for position in order:
        before = found[-1] if found else None
        common = 0 if before is None else _common(keys[before.members[-1]], keys[position])
        if before is not None and before.members[1:]:
            common = min(common, before.shared)
        if before is None or common < MIN_TOKENS:
            found.append(Group(0, [position]))
        else:
            found[-1] = Group(common, [*before.members, position])
    return sorted((Group(shared, sorted(members)) for shared, members in found), key=lambda group: group.members[0])


def cut(documents: Sequence[Document], max_tokens: int) -> list[list[int]]:
    """Packs documents into micro-batches of at most `max_tokens` distinct tokens, those that begin alike together."""
    chunks: list[list[int]] = []
    sizes: list[int] = []
    for shared, members in groups(documents):
        size = max_tokens + 1  # the first of a group opens a chunk
        for position in members:
            own = documents[position].num_tokens - shared
            if size + own > max_tokens:
                chunks.append([])
                sizes.append(shared)
                size = shared
            chunks[-1].append(position)
            size = sizes[-1] = size + own
    return [
        sorted(position for chunk in pack for position in chunks[chunk]) for pack in micro_batches(sizes, max_tokens)
    ]


def lay_out(documents: Sequence[Document], lengths: Sequence[int], share: bool) -> "Layout":
    """Places documents, cut to `lengths`, in one packed row; with `share`, what they have in common stands once."""
    apart = [Group(0, [position]) for position in range(len(documents))]
    ids: list[Any] = []
    positions: list[Any] = []
    segments: list[Segment] = []
    offsets = [0] * len(documents)

    def place(document: Document, start: int, end: int, after: Segment | None) -> Segment:
        at = segments[-1].end if segments else 0
        reach = (0, 0) if after is None else (after.start, after.end)
        ids.append(document.input_ids[start:end])
        positions.append(np.arange(start, end))
        segments.append(Segment(at, at + end - start, *reach))
        return segments[-1]

    for shared, members in groups(documents) if share else apart:
        common = place(documents[members[0]], 0, shared, None) if shared else None
        for position in members:
            offsets[position] = place(documents[position], shared, lengths[position], common).start - shared
    return Layout(np.concatenate(ids), np.concatenate(positions), tuple(segments), offsets)


class Layout(NamedTuple):
    """A packed row: ids and positions (T,), its segments, and for each document what to add to a position in it."""

    ids: "np.ndarray[Any, Any]"
    positions: "np.ndarray[Any, Any]"
    segments: tuple[Segment, ...]
    offsets: list[int]


def _common(a: "np.ndarray[Any, Any]", b: "np.ndarray[Any, Any]") -> int:
    """Returns how many tokens two sequences begin with alike."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length
