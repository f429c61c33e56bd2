"""What would be trained, for the eye: rows as pieces of text, one a token, and a look over all rows of a file."""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from loratune.data.encode import Document, Encoder
from loratune.data.ledger import Ledger
from loratune.data.rows import detect, iter_rows
from loratune.data.store import Documents, Tokens
from loratune.data.tokenise import MIN_STORED_BYTES, Notify, Reading, stored, tokenise
from loratune.errors import ConfigError, DataError

_BINS = 32
_LOG_FROM = 20  # lengths that span more than this factor are counted on a logarithmic axis
_REPLACEMENT = "\ufffd"  # a decoder's word for bytes that are no whole character yet
_MAX_CHARACTER_BYTES = 4  # in UTF-8
Specs = str | Path | Sequence[str]  # one spec (see `sources`), or several that are read as one, in order

_UNSAFE = re.compile(r"[^\x20-\x7e]")


class Piece(NamedTuple):
    """One token: its id and text, whether it is trained, and whether it is a special token.

    The text is empty where the token is the beginning of a character that a later one completes.
    """

    id: int
    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class Shown:
    """One row token by token, one list for each of its documents; or the `reason` why it was rejected."""

    where: str
    documents: list[list[Piece]] = field(default_factory=list[list[Piece]])
    reason: str | None = None


@dataclass(frozen=True)
class Histogram:
    """Counts of values in [edges[i], edges[i + 1]), the last bin closed."""

    edges: list[float]
    counts: list[int]
    median: float
    most: float  # 95 of 100 values are at most this


@dataclass(frozen=True)
class Preview:
    """A file as a run would see it: the ledger, tokens and histograms of all documents, and the rows that are shown.

    `format` is None where no row could be read, `template` but for messages, the histograms without a document;
    `columns` is {column: key in the file} where the two differ.
    """

    source: str
    model: str
    template: str | None
    train_on: str
    max_tokens: int | None
    format: str | None
    columns: dict[str, str]
    ledger: Ledger
    num_documents: int
    num_tokens: int
    num_trained: int
    lengths: Histogram | None
    shares: Histogram | None
    rows: list[Shown]

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as plain values; texts are as they are, control characters and all."""
        ledger = self.ledger
        plain = {name: value for name, value in vars(self).items() if name not in ("ledger", "rows")}
        return plain | {
            **ledger_json(ledger),
            "lengths": self.lengths and vars(self.lengths),
            "shares": self.shares and vars(self.shares),
            "rows": [_shown_json(row) for row in self.rows],
        }


def ledger_json(ledger: Ledger) -> dict[str, Any]:
    """Returns a ledger as plain values: the counts, every rejected row with its reason, and the notes."""
    return {
        "rows_in": ledger.rows_in,
        "rows_trained": ledger.rows_trained,
        "rejected": [{"source": each.source, "line": each.line, "reason": each.reason} for each in ledger.rejects],
        "notes": {name: vars(note) for name, note in ledger.notes.items()},
    }


def preview(
    spec: Specs,
    encoder: Encoder,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    rows: int = 3,
    only: Sequence[str] = (),
    cache: Path | None = None,
    notify: Notify | None = None,
) -> Preview:
    """Reads and tokenises whole specs as a run does, and takes the first `rows` rows that are trained for a look.

    `only` names the rows to take instead: a line number, or FILE:LINE as messages write it. Raises what `load_dataset`
    raises but for rows that are rejected, and ConfigError for a row in `only` that is not there.
    """
    layouts = [layout for each in _each(spec) if (layout := detect(each, format, columns))]
    mapped = {column: key for layout in layouts for column, key in layout.columns.items() if column != key}
    tokens = read_tokens(spec, encoder, format, columns, cache, notify)
    documents, ledger = Documents(tokens.chunks), tokens.ledger
    lengths, labels = documents.lengths, documents.labels
    kinds = {kind for kind, _ in tokens.sources}
    return Preview(
        source=_name(spec),
        model=encoder.tokenizer.name_or_path,
        template=_template(encoder) if "messages" in kinds else None,
        train_on=encoder.train_on,
        max_tokens=encoder.max_tokens,
        format=", ".join(dict.fromkeys(layout.name for layout in layouts)) or None,
        columns=mapped,
        ledger=ledger,
        num_documents=len(documents),
        num_tokens=int(lengths.sum()),
        num_trained=int(labels.sum()),
        lengths=_length_histogram(lengths) if len(documents) else None,
        shares=_histogram(labels / lengths, [step / 20 for step in range(21)]) if len(documents) else None,
        rows=_named(spec, only, documents, ledger, encoder) if only else _first(rows, documents, ledger, encoder),
    )


def read_tokens(
    spec: Specs,
    encoder: Encoder,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    cache: Path | None = None,
    notify: Notify | None = None,
) -> Tokens:
    """Returns everything that a run would train on of a spec, rejected rows in its ledger; DataError without rows."""
    reading = Reading(_each(spec), format, columns)
    if cache is not None and reading.num_bytes >= MIN_STORED_BYTES:
        tokens = stored(reading, encoder, cache, notify)
    else:
        tokens = tokenise(reading, encoder, None)
    _check_any(spec, tokens.ledger)
    return tokens


def read_ledger(spec: Specs, format: str | None = None, columns: Mapping[str, str] | None = None) -> Ledger:
    """Returns what can be told of a spec's rows without a tokenizer: the rows that can be read count as trained."""
    ledger = Ledger()
    for each in _each(spec):
        for _ in ledger.take(iter_rows(each, format, columns)):
            ledger.train()
    ledger.close()
    _check_any(spec, ledger)
    return ledger


def _each(spec: Specs) -> list[str]:
    return [str(spec)] if isinstance(spec, str | Path) else list(spec)


def _name(spec: Specs) -> str:
    return ", ".join(_each(spec))


def _check_any(spec: Specs, ledger: Ledger) -> None:
    if not ledger.rows_in:
        raise DataError(f"{_name(spec)}: the file has no rows; expected one JSON object a line.")


def _template(encoder: Encoder) -> str:
    return "its own chat template" if encoder.tokenizer.chat_template else "the plain chat template (it brings none)"


# ---- tokens ---------------------------------------------------------------------------------------------------------


def pieces(document: Document, tokenizer: Any) -> list[Piece]:
    """Returns the text of every token of a document, so that the texts in a row are the text that was tokenised.

    A token is decoded behind the one before it, because a decoder treats the first of a text apart; tokens that end
    inside a character wait for the one that completes it.
    """
    special = {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    ids: list[int] = document.input_ids.tolist()
    texts = _texts(ids, special, partial(_decode, tokenizer))
    return [Piece(i, text, bool(t), i in special) for i, text, t in zip(ids, texts, document.trained, strict=True)]


def _texts(ids: list[int], special: set[int], decode: Callable[[list[int]], str]) -> list[str]:
    texts: list[str] = []
    start, shown = 0, 0  # the window begins at the last piece before the first token that is not shown yet
    for end in range(1, len(ids) + 1):
        before, text = decode(ids[start:shown]), decode(ids[start:end])
        whole = not text.endswith(_REPLACEMENT) or end - shown >= _MAX_CHARACTER_BYTES
        if not whole and end < len(ids) and ids[end] not in special:
            continue
        own = text[len(before) :] if text.startswith(before) else decode(ids[shown:end])
        texts += [""] * (end - shown - 1) + [own]
        start, shown = shown, end
    return texts


def _decode(tokenizer: Any, ids: list[int]) -> str:
    if not ids:
        return ""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


# ---- text that cannot do harm ---------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """Returns a text whose every character can be seen, on one line, whatever shows it.

    Controls become their symbols (a line feed ↵, a tab ⇥, an escape ␛); what is invisible, turns the direction of
    writing, or is no character becomes ⟨U+202E⟩; a mark that has nothing before it to stand on gets a circle.
    """
    shown = _UNSAFE.sub(_symbol, text)
    return f"◌{shown}" if shown and unicodedata.category(shown[0]).startswith("M") else shown


def _symbol(match: re.Match[str]) -> str:
    character, code = match[0], ord(match[0])
    if character in "\n\t\x7f":
        return {"\n": "↵", "\t": "⇥", "\x7f": "␡"}[character]
    if code < 0x20:
        return chr(0x2400 + code)
    category = unicodedata.category(character)
    return f"⟨U+{code:04X}⟩" if category[0] == "C" or category in ("Zl", "Zp") else character


# ---- histograms -----------------------------------------------------------------------------------------------------


def _length_histogram(lengths: Any) -> Histogram:
    """Counts lengths in at most 32 bins with whole edges; on a logarithmic axis where they span a factor of 20."""
    low, high = int(lengths.min()), int(lengths.max()) + 1
    if high > _LOG_FROM * low:
        steps = [round(low * (high / low) ** (step / _BINS)) for step in range(_BINS + 1)]
        return _histogram(lengths, sorted({*steps}))
    width = math.ceil((high - low) / _BINS)
    return _histogram(lengths, list(range(low, high + width, width)))


def _histogram(values: Any, edges: Sequence[float]) -> Histogram:
    counts = np.histogram(values, bins=np.array(edges))[0]
    most = float(np.quantile(values, 0.95, method="lower"))
    return Histogram(list(edges), counts.tolist(), float(np.median(values)), most)


# ---- rows -----------------------------------------------------------------------------------------------------------


def _first(number: int, documents: Documents, ledger: Ledger, encoder: Encoder) -> list[Shown]:
    return [_shown(row, documents, ledger, encoder) for row in np.unique(documents.rows)[:number].tolist()]


def _named(spec: Specs, only: Sequence[str], documents: Documents, ledger: Ledger, encoder: Encoder) -> list[Shown]:
    """Returns the rows of the names, trained or rejected; ConfigError for a name that no row has."""
    trained = [(ledger.place(row), row) for row in np.unique(documents.rows).tolist()]
    shown: list[Shown] = []
    for name in only:
        found = [_shown(row, documents, ledger, encoder) for place, row in trained if _is_named(*place, name)]
        found += [
            Shown(each.where, reason=each.reason) for each in ledger.rejects if _is_named(each.source, each.line, name)
        ]
        if not found:
            raise ConfigError(
                f"{_name(spec)} has no row {name!r}; expected a line number, or FILE:LINE as messages write it."
            )
        shown += found
    return shown


def _is_named(source: str, line: int, name: str) -> bool:
    """Says whether a row is meant by LINE, by FILE:LINE, or by that with the last part of the file's path alone."""
    file, _, number = name.rpartition(":")
    return number == str(line) and file in ("", source, Path(source).name)


def _shown(row: int, documents: Documents, ledger: Ledger, encoder: Encoder) -> Shown:
    own = np.flatnonzero(documents.rows == row).tolist()
    return Shown(ledger.where(row), [pieces(documents[index], encoder.tokenizer) for index in own])


def _shown_json(row: Shown) -> dict[str, Any]:
    documents = [[piece._asdict() for piece in document] for document in row.documents]
    return {"where": row.where, "reason": row.reason, "documents": documents}


def spans(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Yields a document's tokens line by line: each part ends with the token whose text ends a line."""
    ends = [0, *(i for i, piece in enumerate(pieces, 1) if "\n" in piece.text), len(pieces)]
    yield from (pieces[a:b] for a, b in pairwise(ends) if b > a)
