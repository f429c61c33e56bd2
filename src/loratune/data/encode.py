"""From rows to documents: token ids, and for each token whether it is trained.

Special tokens come from the tokenizer or the template, exactly once; text that spells one out is refused.
Nothing is ever cut: a document that does not fit is an error, or, of a text row and by choice, several documents.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from loratune.data.deferred import Deferred
from loratune.data.masks import Cuts, Lookup, Marks, Tokenizer
from loratune.data.rows import Row
from loratune.data.templates import NOW, Chat, Message, Transcript, plan
from loratune.errors import ConfigError, DataError

TRAIN_ON = ("completion", "all", "last")
LONG = ("stop", "drop", "split")


@dataclass(frozen=True, eq=False)
class Document:
    """One row as tokens: `input_ids` int32 (L,) and `trained` bool (L,).

    `trained[i]` says that token i is a label, predicted from position i-1; `trained[0]` is False.
    """

    input_ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        return int(self.trained.sum())


class LongRow(DataError):
    """A row longer than the limit; with `long="drop"` no reason to stop the run."""


class Encoder:
    """Turns rows into documents with one tokenizer; `max_tokens` is the longest document the model takes.

    prompt_completion: prefix + prompt + completion + eos, the two tokenised apart. text: prefix + text + eos, all but
    the prefix trained. messages: see `templates`. The prefix is what the tokenizer itself puts before a text: its begin
    token, or nothing.
    `train_on`: "completion" trains completions and assistant turns (but for `train: false`), "last" only the last turn,
    "all" every token but the prefix and the turns with `train: false`.
    `long`: a row beyond the limit is refused with LongRow ("stop", "drop": see the caller), or, a text row with
    "split", made into documents of about equal length, each token once.
    `num_ids`: rows with an id of that or above are refused: a tokenizer may know a token more than the model's
    embedding has rows (Gemma 3's image token). `now` is what a template's clock says. A `Deferred` tokenizer is read
    when the first row is encoded.
    Raises ConfigError for a tokenizer without an end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_tokens: int | None,
        *,
        train_on: str = "completion",
        long: str = "stop",
        num_ids: int | None = None,
        now: datetime = NOW,
    ) -> None:
        eos = tokenizer.special_tokens_map.get("eos_token")
        if eos is None:
            raise ConfigError("the tokenizer has no end-of-sequence token, so the model could never learn to stop.")
        _check_choice("train_on", train_on, TRAIN_ON)
        _check_choice("long", long, LONG)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.train_on = train_on
        self.long = long
        self.num_ids = num_ids
        self.now = now
        self._eos = str(eos)
        if not isinstance(tokenizer, Deferred):
            self.prefix  # noqa: B018  # what is wrong with it is said before anything is encoded

    @cached_property
    def eos_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(self._eos))

    @cached_property
    def marks(self) -> Marks:
        return Marks.of(self.tokenizer)

    @cached_property
    def chat(self) -> Chat:
        return Chat(self.tokenizer, self.marks, self.now)

    @cached_property
    def prefix(self) -> list[int]:
        """What the tokenizer itself puts before a text: its begin token, or nothing."""
        return self._find_prefix()

    def encode(self, row: Row) -> list[Document]:
        """Returns the row's documents, mostly one; raises DataError `file:line: reason` where it cannot be trained on.

        A template that rewrites earlier turns gives one for each trained turn, in their order; a split text several.
        """
        result = self.encode_many([row])[0]
        if isinstance(result, DataError):
            raise result
        return result

    def encode_many(self, rows: Sequence[Row]) -> list[list[Document] | DataError]:
        """Returns what `encode` would, or raise, for each row.

        The rows are rendered in one exchange and tokenised in one call: see `prepare` and `finish`.
        """
        return self.finish(rows, self.prepare(rows))

    def prepare(self, rows: Sequence[Row]) -> "list[_Job | DataError]":
        """Returns what of each row must be tokenised: chats rendered and checked; or why it cannot be."""
        refused = [self._refusal(row) for row in rows]
        chats = {
            i: plan(row.value["messages"], row.value.get("tools"), self.train_on)
            for i, row in enumerate(rows)
            if row.kind == "messages" and refused[i] is None
        }
        transcripts = dict(zip(chats, self.chat.transcripts(list(chats.values())), strict=True))
        return [refused[i] or self._job(row, transcripts.get(i, [])) for i, row in enumerate(rows)]

    def finish(self, rows: Sequence[Row], prepared: "list[_Job | DataError]") -> list[list[Document] | DataError]:
        """Tokenises what was prepared, in one call, and makes the documents of each row."""
        ids = self._tokenise(text for job in prepared if isinstance(job, _Job) for text in job.texts)

        def lookup(text: str) -> list[int]:
            return ids[text] if text in ids else self.tokens(text)

        return [self._finish(row, job, lookup) for row, job in zip(rows, prepared, strict=True)]

    def prompt(self, source: Row | str | Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """Returns exactly the ids that generation gets, the same that training saw before the answer.

        A string is a prompt as it stands, messages await an answer; of a row, the part before its last answer
        (of a text row: the prefix alone). Raises DataError where the text spells out a special token.
        """
        if isinstance(source, Row):
            return _KINDS[source.kind].prompt(self, source.value)
        self._refuse_special([source, tools])
        if isinstance(source, str):
            return self.prefix + self.tokens(source)
        return self.begun(self.tokens(self.chat.prompt(source, tools)))

    def turn_ends(self) -> set[int]:
        """Returns the tokens that end an answer in a chat: end-of-sequence, and what training puts there if it can."""
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        [result] = self.chat.transcripts([plan(example, None, "completion")])
        if isinstance(result, DataError) or not result[-1].turns[-1].closed:
            return {self.eos_id}
        [transcript] = result
        return {self.tokens(transcript.text[: transcript.turns[-1].end])[-1], self.eos_id}

    def tokens(self, text: str) -> list[int]:
        """Returns the ids of a text as it stands, nothing added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def begun(self, ids: list[int]) -> list[int]:
        """Returns the ids of a rendered chat, with the prefix if the template did not write it."""
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def _find_prefix(self) -> list[int]:
        bare, full = self.tokens("a"), list(self.tokenizer.encode("a"))
        for start in range(len(full)):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        raise ConfigError(
            f"the tokenizer encodes 'a' as {bare}, but as {full} with special tokens: expected it inside."
        )

    def _job(self, row: Row, transcripts: list[Transcript] | DataError) -> "_Job | DataError":
        return transcripts if isinstance(transcripts, DataError) else _KINDS[row.kind].job(self, row.value, transcripts)

    def _tokenise(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Each different text once, in one call of the Rust tokenizer where there is one."""
        unique = list(dict.fromkeys(texts))
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return {text: self.tokens(text) for text in unique}
        # What `encode` sets before each call; another user of the tokenizer may have left something else. What is right
        # already is left alone: no tokenizer can be set while another thread encodes with it.
        if backend.padding is not None:
            backend.no_padding()
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.encode_special_tokens != (splits := bool(getattr(self.tokenizer, "split_special_tokens", False))):
            backend.encode_special_tokens = splits
        encodings = backend.encode_batch_fast(unique, add_special_tokens=False)
        return {text: encoding.ids for text, encoding in zip(unique, encodings, strict=True)}

    def _finish(self, row: Row, job: "_Job | DataError", lookup: Lookup) -> list[Document] | DataError:
        try:
            if isinstance(job, DataError):
                raise job
            return [self._checked(document) for document in job.documents(lookup)]
        except DataError as error:
            located = type(error)(f"{row.where}: {error}")
            located.__cause__ = error
            return located

    def _checked(self, document: Document) -> Document:
        document.trained[:1] = False
        if self.max_tokens is not None and document.num_tokens > self.max_tokens:
            raise LongRow(
                f"the row is {document.num_tokens} tokens long, the limit is {self.max_tokens}. "
                "Rows are never cut: shorten or split it."
            )
        if self.num_ids is not None and (highest := int(document.input_ids.max())) >= self.num_ids:
            raise DataError(f"token {highest} is not in the model, which has {self.num_ids:,} tokens.")
        if not document.trained[-1] and not document.trained.any():  # mostly the last token is
            raise DataError("no token of the row would be trained.")
        return document

    def _refusal(self, row: Row) -> DataError | None:
        if row.kind not in _KINDS:
            return DataError(f"a {row.kind} row has no text to generate; expected one of {', '.join(_KINDS)}.")
        try:
            self._refuse_special(row.value)
        except DataError as error:
            return error

    def _refuse_special(self, value: Any) -> None:
        texts = _strings(value, [])
        if not self.marks.pattern.search("\n".join(texts)):  # one search is a third of the time of one for each
            return
        for text in texts:
            if found := self.marks.pattern.search(text):
                around = text[max(0, found.start() - 20) : found.end()]
                raise DataError(
                    f"the text spells out the special token {found[0]!r} (in {around!r}), which the tokenizer would "
                    "take for a control token; remove or rewrite it."
                )


@dataclass(frozen=True)
class _Job:
    """What a row needs tokenised, and the documents that come of it."""

    texts: list[str]
    documents: Callable[[Lookup], Iterable[Document]]


@dataclass(frozen=True)
class _Kind:
    job: Callable[[Encoder, dict[str, Any], list[Transcript]], _Job]  # a messages row comes rendered
    prompt: Callable[[Encoder, dict[str, Any]], list[int]]


def _completion_job(encoder: Encoder, value: dict[str, Any], _: list[Transcript]) -> _Job:
    prompt, completion = value["prompt"], value["completion"]

    def documents(ids: Lookup) -> list[Document]:
        before = [*encoder.prefix, *ids(prompt)]
        begin = len(encoder.prefix if encoder.train_on == "all" else before)
        return [_document([*before, *_some(ids(completion), "completion"), encoder.eos_id], begin)]

    return _Job([prompt, completion], documents)


def _completion_prompt(encoder: Encoder, value: dict[str, Any]) -> list[int]:
    return encoder.prompt(value["prompt"])


def _text_job(encoder: Encoder, value: dict[str, Any], _: list[Transcript]) -> _Job:
    def documents(ids: Lookup) -> list[Document]:
        body, prefix = [*_some(ids(value["text"]), "text"), encoder.eos_id], encoder.prefix
        first, *rest = _pieces(body, (encoder.max_tokens or 0) - len(prefix)) if encoder.long == "split" else [body]
        # The first token of a later piece is not trained: what it follows stands in the piece before.
        later = [_document(prefix + piece, len(prefix) + 1) for piece in rest]
        return [_document(prefix + first, len(prefix)), *later]

    return _Job([value["text"]], documents)


def _pieces(body: list[int], size: int) -> list[list[int]]:
    """Cuts a text into as few pieces of about equal length as fit; one that fits, or fits in no way, stays whole."""
    count = -(-len(body) // size) if size > 1 else 1
    edges = [len(body) * index // count for index in range(count + 1)]
    return [body[start:end] for start, end in pairwise(edges)]


def _text_prompt(encoder: Encoder, value: dict[str, Any]) -> list[int]:
    return list(encoder.prefix)


def _messages_job(encoder: Encoder, _: dict[str, Any], transcripts: list[Transcript]) -> _Job:
    cut = [
        Cuts.of(transcript.text, [edge for turn in transcript.turns for edge in (turn.start, turn.end)], encoder.marks)
        for transcript in transcripts
    ]

    def documents(ids: Lookup) -> list[Document]:
        return [_chat_document(encoder, transcript, cuts, ids) for transcript, cuts in zip(transcripts, cut)]

    return _Job([text for cuts in cut for text in cuts.texts], documents)


def _chat_document(encoder: Encoder, transcript: Transcript, cuts: Cuts, lookup: Lookup) -> Document:
    """The ids as the template wrote them; where it ends turns without a special token, one eos follows the last."""
    written = lookup(transcript.text)
    ids = encoder.begun(written)
    trained = np.full(len(ids), transcript.everything)
    trained[: len(encoder.prefix)] = False
    shift, end = len(ids) - len(written), 0
    edges = cuts.positions(lookup, encoder.marks)
    for turn, start, end in zip(transcript.turns, edges[::2], edges[1::2]):
        if start is None or end is None:
            edge = turn.start if start is None else turn.end
            around = transcript.text[max(0, edge - 20) : edge + 20]
            raise DataError(
                f"message {turn.message + 1} (assistant) cannot be masked exactly: a token spans the turn's boundary "
                f"(in {around!r}), so generation would see other tokens than training; remove white space at the ends "
                "of the message."
            )
        trained[start + shift : end + shift] = turn.trained
    if transcript.answered and end and transcript.turns[-1].trained and not transcript.turns[-1].closed:
        ids = [*ids[: end + shift], encoder.eos_id]
        trained = np.append(trained[: end + shift], True)
    return Document(np.array(ids, dtype=np.int32), trained)


def _messages_prompt(encoder: Encoder, value: dict[str, Any]) -> list[int]:
    messages = value["messages"]
    last = max(k for k, message in enumerate(messages) if message["role"] == "assistant")
    return encoder.prompt(messages[:last], value.get("tools"))


_KINDS: dict[str, _Kind] = {
    "prompt_completion": _Kind(_completion_job, _completion_prompt),
    "text": _Kind(_text_job, _text_prompt),
    "messages": _Kind(_messages_job, _messages_prompt),
}


def _strings(value: Any, found: list[str]) -> list[str]:
    """Appends every string in a JSON value, keys included; the depth of a row was checked when it was read."""
    if isinstance(value, str):
        found.append(value)
    elif isinstance(value, dict):
        for key, item in cast(dict[str, Any], value).items():
            found.append(key)
            _strings(item, found)
    elif isinstance(value, list | tuple):
        for item in cast(Sequence[Any], value):
            _strings(item, found)
    return found


def _document(ids: list[int], begin: int) -> Document:
    trained = np.zeros(len(ids), dtype=np.bool_)
    trained[begin:] = True
    return Document(np.array(ids, dtype=np.int32), trained)


def _some(ids: list[int], name: str) -> list[int]:
    if not ids:
        raise DataError(f"the tokenizer makes no token of the {name}.")
    return ids


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")
