"""From a row to a document: token ids, and for each token whether it is trained.

Special tokens come from the tokenizer or the template, exactly once; text that spells one out is refused.
Nothing is ever cut: a document that does not fit is an error.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loratune.data.rows import Row, strings
from loratune.data.templates import Chat, Message, Span, Tokenizer
from loratune.errors import ConfigError, DataError


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


class Encoder:
    """Turns rows into documents with one tokenizer; `max_tokens` is the longest document the model takes.

    prompt_completion: prefix + prompt + completion + eos, the two tokenised apart; completion and eos are trained.
    text: prefix + text + eos, all but the prefix trained. messages: see `templates`.
    The prefix is what the tokenizer itself puts before a text: its begin token, or nothing.
    Raises ConfigError for a tokenizer without an end-of-sequence token.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int | None) -> None:
        eos = tokenizer.special_tokens_map.get("eos_token")
        if eos is None:
            raise ConfigError("the tokenizer has no end-of-sequence token, so the model could never learn to stop.")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.eos_id = int(tokenizer.convert_tokens_to_ids(str(eos)))
        self.prefix = self._find_prefix()
        special = _special_tokens(tokenizer)
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        self.chat = Chat(tokenizer, self.tokens, self.prefix, frozenset(special.values()), self.eos_id)

    def encode(self, row: Row) -> Document:
        """Returns the row's document; raises DataError `file:line: reason` where it cannot be trained on as it is."""
        try:
            self._refuse_special(row.value)
            return self._document(*_KINDS[row.kind].parts(self, row.value))
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error

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
        return self.chat.prompt(source, tools)

    def tokens(self, text: str) -> list[int]:
        """Returns the ids of a text as it stands, nothing added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def _find_prefix(self) -> list[int]:
        bare, full = self.tokens("a"), list(self.tokenizer.encode("a"))
        for start in range(len(full)):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        raise ConfigError(
            f"the tokenizer encodes 'a' as {bare}, but as {full} with special tokens: expected it inside."
        )

    def _document(self, ids: list[int], spans: list[Span]) -> Document:
        trained = np.zeros(len(ids), dtype=np.bool_)
        for start, end in spans:
            trained[start:end] = True
        trained[:1] = False
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            raise DataError(
                f"the row is {len(ids)} tokens long, the limit is {self.max_tokens}. "
                "Rows are never cut: shorten or split it."
            )
        if not trained.any():
            raise DataError("no token of the row would be trained.")
        return Document(np.asarray(ids, dtype=np.int32), trained)

    def _refuse_special(self, value: Any) -> None:
        for text in strings(value):
            if found := self._special.search(text):
                around = text[max(0, found.start() - 20) : found.end()]
                raise DataError(
                    f"the text spells out the special token {found[0]!r} (in {around!r}), which the tokenizer would "
                    "take for a control token; remove or rewrite it."
                )


Parts = tuple[list[int], list[Span]]


@dataclass(frozen=True)
class _Kind:
    parts: Callable[[Encoder, dict[str, Any]], Parts]
    prompt: Callable[[Encoder, dict[str, Any]], list[int]]


def _completion_parts(encoder: Encoder, value: dict[str, Any]) -> Parts:
    prompt = encoder.prompt(value["prompt"])
    ids = prompt + _some(encoder.tokens(value["completion"]), "completion") + [encoder.eos_id]
    return ids, [(len(prompt), len(ids))]


def _completion_prompt(encoder: Encoder, value: dict[str, Any]) -> list[int]:
    return encoder.prompt(value["prompt"])


def _text_parts(encoder: Encoder, value: dict[str, Any]) -> Parts:
    ids = encoder.prefix + _some(encoder.tokens(value["text"]), "text") + [encoder.eos_id]
    return ids, [(len(encoder.prefix), len(ids))]


def _text_prompt(encoder: Encoder, value: dict[str, Any]) -> list[int]:
    return list(encoder.prefix)


def _messages_parts(encoder: Encoder, value: dict[str, Any]) -> Parts:
    return encoder.chat.conversation(value["messages"], value.get("tools"))


def _messages_prompt(encoder: Encoder, value: dict[str, Any]) -> list[int]:
    messages = value["messages"]
    last = max(k for k, message in enumerate(messages) if message["role"] == "assistant")
    return encoder.prompt(messages[:last], value.get("tools"))


_KINDS: dict[str, _Kind] = {
    "prompt_completion": _Kind(_completion_parts, _completion_prompt),
    "messages": _Kind(_messages_parts, _messages_prompt),
    "text": _Kind(_text_parts, _text_prompt),
}


def _some(ids: list[int], name: str) -> list[int]:
    if not ids:
        raise DataError(f"the tokenizer makes no token of the {name}.")
    return ids


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    added = tokenizer.added_tokens_decoder
    flagged = {str(token.content): int(i) for i, token in added.items() if token.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
    return named | flagged
