"""Chat messages through the tokenizer's own template: documents as text, each turn proven to follow its prompt.

For the assistant message k the template renders two prefixes: messages[:k] with the generation prompt (what a server
sends when it asks for that answer) and messages[:k+1]. Both must be prefixes of the document, as text and as tokens
(see `masks`). The turn is trained from the end of the first to the turn's own end token: what is trained is what will
be sampled. A template that rewrites a turn once later messages follow (as those that drop old thoughts do), or ends
turns by the next one's beginning, gives one document for each trained turn: the conversation up to that turn, which is
what generation saw when it was due.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import takewhile
from typing import Any

from loratune.data import sandbox
from loratune.data.masks import Marks, Tokenizer
from loratune.data.sandbox import Job, Request, Template
from loratune.errors import DataError

Message = dict[str, Any]

# For models that bring no template: "### Role", newline, content, end-of-sequence after each assistant turn.
PLAIN_TEMPLATE = (
    "{% if tools %}{{ raise_exception('the plain template has no place for tools') }}{% endif %}"
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + '\n' + message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\n\n' }}"
    "{% endfor %}"
    "{{ '### Assistant\n' if add_generation_prompt else '' }}"
)
# What `strftime_now` tells every template, in training and in `chat`: a date that moved on would make today's prompts
# other tokens than yesterday's. It is the date that Llama 3's own templates use where there is no clock.
NOW = datetime(2024, 7, 26)


@dataclass(frozen=True)
class Turn:
    """An assistant message as characters [start, end) of its document; `closed` says that an end token is the last."""

    message: int
    trained: bool
    start: int
    end: int
    closed: bool


@dataclass(frozen=True)
class Transcript:
    """A document as text: `turns` are trained or not as each says, the rest is trained where `everything` is.

    `answered` says that the last of `turns` ends it, so that an end token is owed where the template writes none.
    """

    text: str
    turns: list[Turn]
    everything: bool
    answered: bool


@dataclass(frozen=True)
class Conversation:
    """A messages row, and which assistant messages of it need a mask and whether they are trained (see `plan`)."""

    messages: list[Message]
    tools: list[Any] | None
    turns: dict[int, bool]
    everything: bool

    @property
    def request(self) -> Request:
        """The whole, for each turn its prompt and its end, and the whole without the tools where there are any."""
        jobs: list[Job] = [(len(self.messages), False, True)]
        for k in self.turns:
            jobs += [(k, True, True), (k + 1, False, True)]
        if self.tools:
            jobs.append((len(self.messages), False, False))
        return _request(self.messages, self.tools, jobs)


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template as a function from messages to text."""

    tokenizer: Tokenizer
    marks: Marks
    now: datetime = NOW
    _trailers: dict[str, str] = field(default_factory=dict[str, str])

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> str:
        """Returns the text that generation gets to answer `messages`; DataError where the template refuses them."""
        request = _request(messages, tools, [(len(messages), True, True)])
        result = sandbox.shared().render(self._template(request.tools), [request])[0]
        if isinstance(result, DataError):
            raise result
        return result[0]

    def transcripts(self, conversations: Sequence[Conversation]) -> list[list[Transcript] | DataError]:
        """Renders all conversations at once; DataError for one that is refused, changed or cannot be masked exactly."""
        results: list[list[Transcript] | DataError] = [[] for _ in conversations]
        for with_tools in (False, True):  # they may have a template of their own
            chosen = [i for i, conversation in enumerate(conversations) if bool(conversation.tools) == with_tools]
            if chosen:
                found = self._transcripts_alike([conversations[i] for i in chosen])
                for index, transcripts in zip(chosen, found, strict=True):
                    results[index] = transcripts
        return results

    def _transcripts_alike(self, conversations: list[Conversation]) -> list[list[Transcript] | DataError]:
        try:
            template = self._template(conversations[0].tools)
        except DataError as error:
            return [error] * len(conversations)
        rendered = sandbox.shared().render(template, [conversation.request for conversation in conversations])
        return [self._checked(conversation, texts, template) for conversation, texts in zip(conversations, rendered)]

    def _checked(
        self, conversation: Conversation, texts: list[str] | DataError, template: Template
    ) -> list[Transcript] | DataError:
        if isinstance(texts, DataError):
            return texts
        if template.source not in self._trailers:
            self._trailers[template.source] = _find_trailer(template, self.marks)
        try:
            return _transcripts(conversation, texts, self._trailers[template.source], self.marks)
        except DataError as error:
            return error

    def _template(self, tools: list[Any] | None) -> Template:
        try:
            source = self.tokenizer.get_chat_template(None, tools) if self.tokenizer.chat_template else None
        except ValueError as error:  # several named templates and none for this
            raise DataError(f"the tokenizer has no chat template for the row: {error}") from error
        variables = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        named = f"chat template of {self.tokenizer.name_or_path}" if self.tokenizer.name_or_path else "chat template"
        return Template(source or PLAIN_TEMPLATE, variables, self.now, named if source else "plain chat template")


def plan(messages: Sequence[Message], tools: list[Any] | None, train_on: str) -> Conversation:
    """Returns which turns need a mask: the trained ones; with "all" those that are not, and an answer at the end."""
    turns = {k: bool(m.get("train", True)) for k, m in enumerate(messages) if m["role"] == "assistant"}
    last, everything = max(turns), train_on == "all"
    if everything:
        chosen = {k: trained for k, trained in turns.items() if not trained or k == len(messages) - 1}
    else:
        chosen = {k: True for k, trained in turns.items() if trained and (train_on != "last" or k == last)}
    return Conversation(list(messages), tools, chosen, everything)


def _request(messages: Sequence[Message], tools: list[Any] | None, jobs: list[Job]) -> Request:
    """Templates see no `train`, and no key whose value is null (as `transformers` has it)."""
    shown = [{k: v for k, v in message.items() if k != "train" and v is not None} for message in messages]
    return Request(shown, tools or None, jobs)


def _find_trailer(template: Template, marks: Marks) -> str:
    """Returns what a template writes at the end of a conversation only: Phi-3's is "\\n<|endoftext|>" after <|end|>.

    It is where a conversation that ends parts from the same one that goes on, back to the last end token before that.
    """
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    texts = sandbox.shared().render(template, [Request(messages, None, [(2, False, False), (2, True, False)])])[0]
    if isinstance(texts, DataError) or texts[1].startswith(texts[0]):
        return ""
    ended, going_on = texts
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ended, going_on)))
    ends = [match.end() for match in marks.anchors.finditer(ended) if match.end() <= shared]
    return ended[ends[-1] :] if ends and "b" not in ended[ends[-1] :] else ""


def _transcripts(conversation: Conversation, texts: list[str], trailer: str, marks: Marks) -> list[Transcript]:
    whole, last = texts[0], len(conversation.messages) - 1
    if conversation.tools and texts[-1] == whole:
        raise DataError("the chat template has no place for tools; remove them from the row or use another template.")
    renderings = dict(zip(conversation.turns, zip(texts[1::2], texts[2::2])))
    alone = {k: _alone(k, opened, closed, marks) for k, (opened, closed) in renderings.items()}
    turns = [
        _turn(k, trained, len(renderings[k][0]), alone[k].removesuffix(trailer), marks)
        for k, trained in conversation.turns.items()
    ]
    rewritten = [turn.message for turn in turns if not whole.startswith(alone[turn.message][: turn.end])]
    if conversation.everything and rewritten:
        raise DataError(
            f"message {rewritten[0] + 1} (assistant) cannot be told apart: the template shows it otherwise once later "
            'messages follow; with train_on="completion" it can be trained.'
        )
    unended = [turn.message for turn in turns if turn.trained and not turn.closed and turn.message != last]
    if not rewritten and not unended:
        return [_transcript(conversation, last + 1, whole, turns)]
    return [_transcript(conversation, turn.message + 1, alone[turn.message], [turn]) for turn in turns]


def _alone(k: int, opened: str, closed: str, marks: Marks) -> str:
    """Returns the prompt and what the model answers.

    Mostly that is the conversation up to the turn. A template may show the history otherwise once the turn stands
    behind it (Mistral's moves the system message): then it is the prompt, and what follows in the rendering after the
    words that the prompt ends with, from its last special token on.
    """
    if closed.startswith(opened):
        return closed
    anchors = [match.start() for match in marks.anchors.finditer(opened)]
    header = opened[anchors[-1] :] if anchors else ""
    if not header or opened.count(header) != closed.count(header):  # else it might be an earlier turn's
        raise DataError(
            f"message {k + 1} (assistant) cannot be masked exactly: {_parting(opened, closed)} "
            "the template's generation prompt and its own turn differ."
        )
    return opened + closed.rpartition(header)[2]


def _turn(k: int, trained: bool, start: int, text: str, marks: Marks) -> Turn:
    """A turn ends with its last special token if only blanks follow it, else with its text."""
    ends = [match.end() for match in marks.anchors.finditer(text, start)]
    closed = bool(ends) and not text[ends[-1] :].strip()
    return Turn(k, trained, start, ends[-1] if closed else len(text), closed)


def _transcript(conversation: Conversation, count: int, text: str, turns: list[Turn]) -> Transcript:
    """Of the history, the template may rewrite what the assistant said: generation sees it so too."""
    messages, masked = conversation.messages[:count], {turn.message for turn in turns}
    parts = {
        k: _parts(message)
        for k, message in enumerate(messages)
        if conversation.everything or k in masked or message["role"] != "assistant"
    }
    missing = _missing(messages, parts, text)
    if missing is not None:
        squeezed = {k: [_squeezed(part) for part in found] for k, found in parts.items()}
        missing = _missing(messages, squeezed, _squeezed(text))
    if missing is not None:
        raise DataError(
            f"the chat template leaves out or rewrites message {missing + 1} ({messages[missing]['role']})."
        )
    return Transcript(text, turns, conversation.everything, count - 1 in masked)


def _parts(message: Message) -> list[str]:
    """What a rendering must hold: the content, the names of called tools. A tool's answer may be encoded as JSON."""
    content = "" if message["role"] == "tool" else str(message.get("content") or "").strip()
    return [content, *(str(call.get("function", call).get("name", "")) for call in message.get("tool_calls") or ())]


def _missing(messages: Sequence[Message], parts: Mapping[int, Sequence[str]], text: str) -> int | None:
    """Returns the first message that does not follow those before it; a system message may stand anywhere."""
    position = 0
    for k, (content, *names) in parts.items():
        movable = messages[k]["role"] in ("system", "developer")
        found = text.find(content, 0 if movable else position)
        if found < 0 or any(text.find(name, position) < 0 for name in names):
            return k
        position = position if movable else found + len(content)
    return None


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _parting(prefix: str, text: str) -> str:
    """Shows where two renderings part, 20 characters of each."""
    at = next((i for i, (a, b) in enumerate(zip(prefix, text)) if a != b), min(len(prefix), len(text)))
    return f"at character {at} {prefix[at : at + 20]!r} becomes {text[at : at + 20]!r}:"
