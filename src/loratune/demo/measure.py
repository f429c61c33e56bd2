"""How much of the punctuation and the capitals a model put back, word by word.

A mark is a (place, sign) pair of the reference: the capital form of a word, or a punctuation sign in the gap after a
word (or before the first). It counts as restored when the prediction has it at the word that `difflib` aligns, so one
lost or added word costs its own marks and not those of the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import NamedTuple

from loratune.demo.corpus import WORD, one_spelling
from loratune.errors import DataError

_QUOTES = str.maketrans(dict.fromkeys("«»“”„", '"'))


class Marks(NamedTuple):
    """Counts for one sentence: right marks, marks of the reference, marks of the prediction, and no difference left."""

    restored: int
    total: int
    placed: int
    exact: bool


@dataclass(frozen=True)
class Restoration:
    """Shares in [0, 1] over all sentences.

    marks_share = sum restored / sum total (recall); precision = sum restored / sum placed, 0 if nothing was placed;
    exact_share = sentences without any difference / sentences.
    """

    marks_share: float
    exact_share: float
    precision: float
    num_sentences: int


def compare(predicted: str, reference: str) -> Marks:
    """Counts the marks of one prediction; wrong extra marks are `placed - restored`.

    Kinds of dash, apostrophe and quote, and the number of spaces, make no difference.
    """
    words, signs = _parse(predicted)
    wanted_words, wanted_signs = _parse(reference)
    restored = len(signs[0] & wanted_signs[0])
    for i, j in _aligned(words, wanted_words):
        restored += len(signs[i + 1] & wanted_signs[j + 1])
    return Marks(
        restored=restored,
        total=sum(map(len, wanted_signs)),
        placed=sum(map(len, signs)),
        exact=_normal(predicted) == _normal(reference),
    )


def marks_restored(predicted: str, reference: str) -> tuple[int, int]:
    """Returns (marks of the reference that the prediction has, marks of the reference)."""
    marks = compare(predicted, reference)
    return marks.restored, marks.total


def measure(predictions: Sequence[str], references: Sequence[str]) -> Restoration:
    """Returns the shares over all sentences; raises DataError for no sentence or for lists of different lengths."""
    if not predictions or len(predictions) != len(references):
        raise DataError(
            f"{len(predictions)} predictions for {len(references)} references: expected one for each, and at least one."
        )
    counts = [compare(predicted, reference) for predicted, reference in zip(predictions, references, strict=True)]
    restored, total, placed, exact = (sum(column) for column in zip(*counts, strict=True))
    if not total:
        raise DataError("the references hold no mark and no capital, so there is no share to give.")
    return Restoration(restored / total, exact / len(counts), restored / placed if placed else 0.0, len(counts))


def _normal(text: str) -> str:
    return one_spelling(text).translate(_QUOTES)


def _parse(text: str) -> tuple[list[str], list[set[str]]]:
    """Returns the words in lower case, and signs: [0] before the first word, [i + 1] at and after word i."""
    text = _normal(text)
    found = list(WORD.finditer(text))
    ends = [0, *(match.end() for match in found)]
    starts = [*(match.start() for match in found), len(text)]
    signs = [_signs(text[end:start]) for end, start in zip(ends, starts, strict=True)]
    words = [match.group() for match in found]
    for i, word in enumerate(words):
        if word != word.lower():
            signs[i + 1].add(word)  # ПІБ and Піб are different capitals
    return [word.lower() for word in words], signs


def _signs(gap: str) -> set[str]:
    """Returns the different signs of a gap; three dots are one sign, and are not a full stop."""
    return {sign for sign in gap.replace("...", "…") if not sign.isspace()}


def _aligned(words: list[str], wanted: list[str]) -> list[tuple[int, int]]:
    blocks = SequenceMatcher(None, words, wanted, autojunk=False).get_matching_blocks()
    return [(block.a + i, block.b + i) for block in blocks for i in range(block.size)]
