"""Chat messages through the tokenizer's own template, with a mask that is proven turn by turn or refused.

For the assistant message k the template renders two prefixes: messages[:k] with the generation prompt (what a server
sends when it asks for that answer) and messages[:k+1]. Both must be prefixes of the whole, as text and as token ids.
The turn is trained from the end of the first to the turn's own end token, so what is trained is what will be sampled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from loratune.errors import DataError

Message = dict[str, Any]
Span = tuple[int, int]  # token positions [start, end)

# For models that bring no template: "### Role", newline, content, end-of-sequence after each assistant turn.
PLAIN_TEMPLATE = (
    "{% if tools %}{{ raise_exception('the plain template has no place for tools') }}{% endif %}"
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + '\n' + message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\n\n' }}"
    "{% endfor %}"
    "{{ '### Assistant\n' if add_generation_prompt else '' }}"
)


class Tokenizer(Protocol):
    """What this part needs of a `transformers` tokenizer."""

    @property
    def special_tokens_map(self) -> dict[str, Any]: ...
    @property
    def all_special_tokens(self) -> list[str]: ...
    @property
    def all_special_ids(self) -> list[int]: ...
    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...
    @property
    def chat_template(self) -> Any: ...
    def convert_tokens_to_ids(self, tokens: str, /) -> Any: ...
    def encode(self, text: str, *, add_special_tokens: bool = ..., **kwargs: Any) -> list[int]: ...
    def decode(self, token_ids: list[int], /) -> Any: ...
    def apply_chat_template(self, conversation: list[Message], /, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template as a function from messages to token ids and trained spans.

    `tokens` encodes text without adding special tokens (the template owns them). `prefix` is what the tokenizer itself
    puts before a text (usually the begin token, or nothing): it is added only where the template did not write it.
    """

    tokenizer: Tokenizer
    tokens: Callable[[str], list[int]]
    prefix: list[int]
    special_ids: frozenset[int]
    eos_id: int

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """Returns the ids that generation gets to answer `messages`; DataError where the template refuses them."""
        return self._ids(self._render(messages, tools, open_turn=True))

    def conversation(self, messages: Sequence[Message], tools: list[Any] | None = None) -> tuple[list[int], list[Span]]:
        """Returns the ids of a whole conversation and the span of each assistant turn, its end token included.

        Where the template ends turns without a special token, one end-of-sequence token follows the last turn.
        Raises DataError where the template drops a message or a turn cannot be masked exactly.
        """
        text = self._render(messages, tools)
        self._check_nothing_dropped(messages, tools, text)
        ids = self._ids(text)
        turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [self._turn(messages, tools, k, text, ids) for k in turns]
        start, end = spans[-1]
        if turns[-1] == len(messages) - 1 and ids[end - 1] not in self.special_ids:
            ids = [*ids[:end], self.eos_id]
            spans[-1] = (start, end + 1)
        return ids, spans

    def _turn(self, messages: Sequence[Message], tools: list[Any] | None, k: int, text: str, ids: list[int]) -> Span:
        opened = self._render(messages[:k], tools, open_turn=True)
        closed = self._render(messages[: k + 1], tools)
        name = f"message {k + 1} (assistant) cannot be masked exactly"
        if not closed.startswith(opened):
            raise DataError(
                f"{name}: {_parting(opened, closed)} the template's generation prompt and its own turn differ."
            )
        if not text.startswith(closed):
            raise DataError(
                f"{name}: {_parting(closed, text)} the template rewrites the turn once later messages follow."
            )
        opened_ids, closed_ids = self._ids(opened), ids if closed == text else self._ids(closed)
        end = self._end_of_turn(closed_ids, len(opened_ids))
        if ids[: len(opened_ids)] != opened_ids or ids[:end] != closed_ids[:end]:
            raise DataError(
                f"{name}: a token spans the turn's boundary, so generation would see other tokens than training; "
                "remove white space at the ends of the message."
            )
        return len(opened_ids), end

    def _end_of_turn(self, ids: list[int], start: int) -> int:
        """Returns the position after the turn's end token: its last special token with only white space behind it."""
        for last in range(len(ids) - 1, start - 1, -1):
            if ids[last] in self.special_ids:
                blank = not str(self.tokenizer.decode(ids[last + 1 :])).strip()
                return last + 1 if blank else len(ids)
        return len(ids)

    def _check_nothing_dropped(self, messages: Sequence[Message], tools: list[Any] | None, text: str) -> None:
        """A template may skip a role it does not know, or tools, without a word."""
        position = 0
        for number, message in enumerate(messages, 1):
            content = message["content"].strip()
            found = text.find(content, position)
            if found >= 0:
                position = found + len(content)
            elif message["role"] != "tool":  # tool results may be re-encoded as JSON
                raise DataError(f"the chat template leaves out or rewrites message {number} ({message['role']}).")
        if tools and self._render(messages, None) == text:
            raise DataError(
                "the chat template has no place for tools; remove them from the row or use another template."
            )

    def _ids(self, text: str) -> list[int]:
        ids = self.tokens(text)
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, open_turn: bool = False) -> str:
        template = None if self.tokenizer.chat_template else PLAIN_TEMPLATE
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=tools or None,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=open_turn,
                )
            )
        except Exception as error:  # a template is a program from elsewhere: whatever it raises is about this row
            raise DataError(f"the chat template refuses the messages: {error}.") from error


def _parting(prefix: str, text: str) -> str:
    """Shows where two renderings part, 20 characters of each."""
    at = next((i for i, (a, b) in enumerate(zip(prefix, text)) if a != b), min(len(prefix), len(text)))
    return f"at character {at} {prefix[at : at + 20]!r} becomes {text[at : at + 20]!r}:"
