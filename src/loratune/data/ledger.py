"""The ledger of a data set: rows in = rows trained + rows rejected, each rejected row with file, line and reason.

Beside it stand notes on what is no error but worth a look: duplicates, unusual characters, unbalanced labels ...
"""

import json
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from typing import Self

import numpy as np
import numpy.typing as npt

from loratune.data.rows import Reject, Row
from loratune.data.strict_json import canonical, strings, text_hash
from loratune.errors import DataError

_SHOWN = 5  # rejects in a message, examples of a note
_MAX_LABELS = 1000  # more different labels than this are numbers or texts, which have no balance
_UNBALANCED = 10  # the commonest label has this many times the rows of the rarest
# Controls, invisible and direction marks, the replacement character (lost text), private use, noncharacters, tags.
_UNUSUAL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2028\u2029\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\ufdd0-\ufdef\ufff0-\uffff\ue000-\uf8ff\U000e0000-\U000e007f\U000f0000-\U0010ffff]"
)
_MARKS = ("\\u00", "\\b", "\\f", "\ufffd")  # the spellings of controls in JSON, and one, are printable


@dataclass
class Note:
    """How many rows a note is about, and the first of them, as `file:line: what`."""

    count: int = 0
    examples: list[str] = field(default_factory=list[str])


class Ledger:
    """Counts rows: `take` what is read, then `train` or `reject` each row, then `close`.

    `notes` is {name: Note}. Sixteen bytes a row are kept, to find duplicates.
    """

    def __init__(self) -> None:
        self.rows_in = 0
        self.rows_trained = 0
        self.rejects: list[Reject] = []
        self.notes: dict[str, Note] = {}
        self._hashes, self._lines = array("Q"), array("Q")
        self._files: list[tuple[int, str]] = []  # (index of the first row, name) of each file
        self._labels: Counter[str | int] = Counter()

    def take(self, items: Iterable[Row | Reject]) -> Iterator[Row]:
        """Yields the rows of `iter_rows`; counts all, keeps the rejected ones, and notes what it sees in the others."""
        for item in items:
            self.rows_in += 1
            if isinstance(item, Reject):
                self.rejects.append(item)
            else:
                self._look(item)
                yield item

    def train(self, count: int = 1) -> None:
        """Counts rows that are trained on."""
        self.rows_trained += count

    def reject(self, row: Row, reason: str | DataError) -> None:
        """Counts a row that was read but cannot be trained on; `reason` may begin with the row's `file:line: `."""
        self.rejects.append(Reject(row.source, row.line, str(reason).removeprefix(f"{row.where}: ")))

    def note(self, name: str, where: str, what: str = "") -> None:
        """Notes one row under `name`; the first five are kept as examples."""
        note = self.notes.setdefault(name, Note())
        note.count += 1
        if note.count <= _SHOWN:
            note.examples.append(f"{where}: {what}" if what else where)

    def close(self) -> None:
        """Asserts rows in = rows trained + rows rejected, and adds the notes that need all rows."""
        assert self.rows_in == self.rows_trained + len(self.rejects), (
            f"{self.rows_in} rows in, but {self.rows_trained} trained and {len(self.rejects)} rejected"
        )
        self._note_duplicates()
        self._note_labels()

    @property
    def hashes(self) -> npt.NDArray[np.uint64]:
        """The hash of the content of each row that was read, in order."""
        return np.frombuffer(self._hashes, dtype=np.uint64) if self._hashes else np.zeros(0, np.uint64)

    def place(self, index: int) -> tuple[str, int]:
        """File and line of the row whose hash is `hashes[index]`."""
        file = self._files[bisect_right(self._files, index, key=itemgetter(0)) - 1][1]
        return file, self._lines[index]

    def where(self, index: int) -> str:
        """`file:line` of the row whose hash is `hashes[index]`."""
        return "{}:{}".format(*self.place(index))

    @property
    def memory(self) -> tuple[bytes, list[tuple[int, str]]]:
        """What is kept of the rows themselves: hashes, then lines, 8 bytes each; (first row, name) of each file."""
        return self._hashes.tobytes() + self._lines.tobytes(), self._files

    def remember(self, rows: bytes, files: list[tuple[int, str]]) -> None:
        """Takes back what `memory` was."""
        self._hashes, self._lines = array("Q", rows[: len(rows) // 2]), array("Q", rows[len(rows) // 2 :])
        self._files = files

    def note_overlap(self, training: "Ledger") -> None:
        """Notes each row of this (validation) ledger that stands in the training data too."""
        for index in np.flatnonzero(np.isin(self.hashes, training.hashes)).tolist():
            first = int(np.argmax(training.hashes == self.hashes[index])) if self._room("overlap") else 0
            self.note("overlap", self.where(index), f"also at {training.where(first)}")

    def message(self, limit: int = _SHOWN) -> str:
        """Returns the error that stops a run: how many rows are rejected, the first of them, and what to do."""
        count = len(self.rejects)
        shown = [f"  {reject.where}: {reject.reason}" for reject in self.rejects[:limit]]
        more = [f"  ... and {count - limit:,} more."] if count > limit else []
        return "\n".join(
            [
                f"{count:,} of {self.rows_in:,} rows cannot be trained on:",
                *shown,
                *more,
                "Mend or remove them; or go on without them with --reject, which lists them in the run's ledger.jsonl.",
            ]
        )

    def to_json_lines(self) -> str:
        """Returns the ledger as JSON Lines: the counts and notes, then each rejected row."""
        notes = {name: asdict(note) for name, note in self.notes.items()}
        counts = {"rows_in": self.rows_in, "rows_trained": self.rows_trained, "rejected": len(self.rejects)}
        lines = [counts | {"notes": notes}, *map(asdict, self.rejects)]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    @classmethod
    def from_json_lines(cls, text: str) -> Self:
        """Reads what `to_json_lines` wrote; hashes are not part of it (see `memory`)."""
        head, *rejects = (json.loads(line) for line in text.split("\n") if line)
        ledger = cls()
        ledger.rows_in, ledger.rows_trained = head["rows_in"], head["rows_trained"]
        ledger.notes = {name: Note(**note) for name, note in head["notes"].items()}
        ledger.rejects = [Reject(**reject) for reject in rejects]
        return ledger

    def _look(self, row: Row) -> None:
        if not self._files or self._files[-1][1] != row.source:
            self._files.append((len(self._hashes), row.source))
        text = canonical(row.value)
        self._hashes.append(text_hash(text))
        self._lines.append(row.line)
        if not text.isprintable() or any(mark in text for mark in _MARKS):  # a quick test that few rows fail
            self._look_at_characters(row)
        if row.kind == "question" and not row.value["answers"]["text"]:
            self.note("empty answers", row.where)
        label = row.value.get("label")
        if isinstance(label, str | int) and len(self._labels) <= _MAX_LABELS:
            self._labels[label] += 1

    def _look_at_characters(self, row: Row) -> None:
        if found := next(filter(None, map(_UNUSUAL.search, strings(row.value))), None):
            self.note("unusual characters", row.where, f"U+{ord(found[0]):04X}")

    def _note_duplicates(self) -> None:
        order = np.argsort(self.hashes, kind="stable")
        same = np.flatnonzero(self.hashes[order][1:] == self.hashes[order][:-1])
        for index, first in sorted(zip(order[same + 1].tolist(), order[same].tolist())):
            self.note(
                "duplicates", self.where(index), f"the same as {self.where(first)}" if self._room("duplicates") else ""
            )

    def _note_labels(self) -> None:
        if not 1 < len(self._labels) <= _MAX_LABELS:
            return
        (most, many), *_, (least, few) = self._labels.most_common()
        if many >= _UNBALANCED * few:
            note = self.notes["unbalanced labels"] = Note(len(self._labels))
            note.examples = [f"{most!r}: {many:,} rows", f"{least!r}: {few:,} rows"]

    def _room(self, name: str) -> bool:
        """Says whether the next note of this name will be kept as an example."""
        return name not in self.notes or self.notes[name].count < _SHOWN
