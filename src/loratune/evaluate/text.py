"""Texts against references: chrF, BLEU, exact match, the words of answers, and the edits of corrections.

Each is a row of counts a document, whose sums give the figure of a corpus (see `metrics.additive`).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray

from loratune.evaluate import metrics
from loratune.evaluate.interval import Interval
from loratune.evaluate.metrics import Counts

_CHRF_ORDER, _CHRF_BETA, _BLEU_ORDER = 6, 2.0, 4
# The tokenizer "13a" of mteval-v13a.pl, as WMT and sacrebleu use it.
_13A = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def text_figures(said: Sequence[str], asked: Sequence[str]) -> dict[str, Interval]:
    """Returns exact match, chrF and BLEU (0 to 100 both) of answers beside their references."""
    return {
        "chrf": metrics.additive(chrf_counts(said, asked), chrf),
        "bleu": metrics.additive(bleu_counts(said, asked), bleu),
        "exact_match": metrics.mean([a.strip() == b.strip() for a, b in zip(said, asked, strict=True)]),
    }


def chrf_counts(said: Sequence[str], asked: Sequence[str]) -> Counts:
    """Returns (D, 18): of characters in runs of 1 to 6, white space left out, those said, asked for, and both."""
    return np.array([_chrf_row("".join(a.split()), "".join(b.split())) for a, b in zip(said, asked, strict=True)])


def _chrf_row(said: str, asked: str) -> list[float]:
    row: list[float] = []
    for n in range(1, _CHRF_ORDER + 1):
        mine, theirs = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (said, asked))
        row += [mine.total() if theirs else 0, theirs.total(), (mine & theirs).total()]
    return row


def chrf(sums: Counts) -> NDArray[np.float64]:
    """chrF2 (Popović 2015), in percent: F of the mean precision and recall over the orders that both sides have."""
    said, asked, both = (sums[..., k::3] for k in range(3))
    there = (said > 0) & (asked > 0)
    orders = np.maximum(there.sum(-1), 1)
    precision = np.where(there, both / np.maximum(said, 1), 0).sum(-1) / orders
    recall = np.where(there, both / np.maximum(asked, 1), 0).sum(-1) / orders
    under = _CHRF_BETA**2 * precision + recall
    return 100 * (1 + _CHRF_BETA**2) * precision * recall / np.where(under > 0, under, 1)


def bleu_counts(said: Sequence[str], asked: Sequence[str]) -> Counts:
    """Returns (D, 10): words said and asked for; then of runs of 1 to 4 words those right, and those said."""
    return np.array([_bleu_row(words_13a(a), words_13a(b)) for a, b in zip(said, asked, strict=True)])


def _bleu_row(said: list[str], asked: list[str]) -> list[float]:
    row: list[float] = [len(said), len(asked)]
    for n in range(1, _BLEU_ORDER + 1):
        mine, theirs = (Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (said, asked))
        row += [(mine & theirs).total(), mine.total()]
    return row


def words_13a(text: str) -> list[str]:
    """Returns the words and marks of a text as WMT's evaluation cuts it."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in _13A:
        text = pattern.sub(replacement, text)
    return text.split()


def bleu(sums: Counts) -> NDArray[np.float64]:
    """BLEU (Papineni et al. 2002) of a corpus, in percent; orders without a hit count as 1/2, 1/4 ... hits."""
    return np.apply_along_axis(_bleu_of, -1, sums)


def _bleu_of(sums: Counts) -> float:
    said, asked, *counts = sums.tolist()
    logs, smooth = 0.0, 1.0
    for right, total in zip(counts[::2], counts[1::2], strict=True):
        if not total:
            return 0.0
        if not right:
            smooth *= 2
            right = 1 / smooth
        logs += np.log(right / total)
    if not any(counts[::2]):
        return 0.0
    shortness = min(0.0, 1 - asked / said)
    return 100 * float(np.exp(logs / _BLEU_ORDER + shortness))


_ARTICLES = re.compile(r"\b(a|an|the)\b")


def answer_words(text: str) -> list[str]:
    """Returns an answer's words as SQuAD's evaluation compares them: lower case, no punctuation, no articles."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLES.sub(" ", bare).split()


def answer_scores(said: str, asked: Sequence[str]) -> tuple[float, float]:
    """Returns (exact match, F1 of the words) of an answer against its best reference; of none, "" is right."""
    words = answer_words(said)
    references = [answer_words(each) for each in asked] or [[]]
    exact = max(float(words == each) for each in references)
    return exact, max(_word_f1(words, each) for each in references)


def _word_f1(said: list[str], asked: list[str]) -> float:
    if not said or not asked:
        return float(said == asked)
    both = (Counter(said) & Counter(asked)).total()
    return 2 * both / (len(said) + len(asked))


_TOKENS = re.compile(r"\w+(?:['’ʼ-]\w+)*|[^\w\s]")
Edit = tuple[int, int, tuple[str, ...]]


def edits(source: str, target: str) -> set[Edit]:
    """Returns what changes one text into another: (first word, word behind the last, the words put there instead)."""
    before, after = _TOKENS.findall(source), _TOKENS.findall(target)
    changes = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return {(i, j, tuple(after[k:m])) for tag, i, j, k, m in changes if tag != "equal"}


def likeness(sources: Sequence[str], targets: Sequence[str]) -> float:
    """Returns the share of the sources' words that their targets have too."""
    pairs = [(Counter(_TOKENS.findall(a)), Counter(_TOKENS.findall(b))) for a, b in zip(sources, targets, strict=True)]
    return sum((a & b).total() for a, b in pairs) / max(1, sum(a.total() for a, _ in pairs))


def edit_counts(sources: Sequence[str], said: Sequence[str], asked: Sequence[str]) -> Counts:
    """Returns (D, 3): edits that are right, made, and asked for, of corrections of sources."""
    rows: list[list[float]] = []
    for source, mine, theirs in zip(sources, said, asked, strict=True):
        made, wanted = edits(source, mine), edits(source, theirs)
        rows.append([len(made & wanted), len(made), len(wanted)])
    return np.array(rows, dtype=np.float64)


def correction_figures(sources: Sequence[str], said: Sequence[str], asked: Sequence[str]) -> dict[str, Interval]:
    """Returns F0.5, precision and recall over the edits of corrections."""
    return metrics.found_figures(edit_counts(sources, said, asked), {"f0_5": 0.5})


# ---- spans of tags --------------------------------------------------------------------------------------------------

Span = tuple[str, int, int]


def spans(tags: Sequence[str]) -> list[Span]:
    """Returns the (type, first, behind the last) of tags, as seqeval's default reads B-, I-, E-, S- and O.

    A span ends before O, B-, S- and another type, and behind E- and S-; I- and E- without a beginning begin one, too.
    """
    found: list[Span] = []
    begin, kind = 0, None
    ends_before = False
    for position, tag in enumerate([*tags, "O"]):
        mark, name = _cut(tag)
        if kind is not None and (ends_before or mark in "OBS" or name != kind):
            found.append((kind, begin, position))
            kind = None
        if kind is None and mark != "O":
            begin, kind = position, name
        ends_before = mark in "ES"
    return found


def _cut(tag: str) -> tuple[str, str]:
    """A tag that is not of the form B-TYPE is a type of its own, which goes on as long as it stands."""
    mark, dash, name = tag.partition("-")
    if tag in ("O", "0", ""):
        return "O", ""
    return (mark, name) if dash and mark in ("B", "I", "E", "S") else ("I", tag)


def span_counts(said: Sequence[Sequence[str]], asked: Sequence[Sequence[str]], names: Sequence[str]) -> Counts:
    """Returns (D, 3 T): for each type the spans that are both, predicted, true: see `metrics.class_counts`."""
    rows: list[list[int]] = []
    for mine, theirs in zip(said, asked, strict=True):
        found, wanted = set(spans(mine)), set(spans(theirs))
        columns = (Counter(kind for kind, _, _ in each) for each in (found & wanted, found, wanted))
        rows.append([column[name] for column in columns for name in names])
    return np.array(rows, dtype=np.float64).reshape(len(rows), 3 * len(names))


def types(tags: Sequence[str]) -> tuple[str, ...]:
    """Returns the types of spans that a set of tags makes, in order."""
    return tuple(sorted({name for mark, name in map(_cut, tags) if mark != "O"}))
