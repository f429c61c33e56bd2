"""`loratune chat`: the base model and the tuned one answer side by side."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratune.adapter.config import ABOUT
from loratune.cli.options import (
    AsJson,
    BaseModelName,
    RunOrAdapter,
    adapter_folder,
    base_model_of,
    print_json,
    read_record,
)
from loratune.errors import ConfigError, LoratuneError

if TYPE_CHECKING:
    from rich.console import Console

_TWO_COLUMNS_WIDTH = 80  # below, columns hold too few words to read


def chat(
    source: RunOrAdapter,
    model: BaseModelName = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this once, and end.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message, for adapters of chats.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 200,
    raw: Annotated[bool, typer.Option("--raw", help="Send the text as it is, without a chat template.")] = False,
    as_json: AsJson = False,
) -> int:
    """Ask the base model and the tuned one the same, and read both answers side by side."""
    folder = adapter_folder(source)
    name = base_model_of(folder, model)
    from rich.console import Console

    console = Console(stderr=as_json)
    pair = _load(folder, name, raw, system, max_new_tokens)
    if prompt is not None:
        _show(console, prompt, pair.ask(prompt), as_json)
        return 0
    for text in _questions(console, as_json):
        try:
            with console.status("answering"):
                answers = pair.ask(text)
        except LoratuneError as error:  # this question cannot be asked; the next one can
            console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        else:
            _show(console, text, answers, as_json)
    return 0


class Pair:
    """A base model and its tuned self, each with its own conversation so far."""

    def __init__(
        self, model: Any, tokenizer: Any, attached: Any, *, chats: bool, system: str | None, max_new_tokens: int
    ) -> None:
        from loratune.data.encode import Encoder

        self.model, self.tokenizer, self.attached = model, tokenizer, attached
        self.max_new_tokens = max_new_tokens
        self.encoder = Encoder(tokenizer, None)
        self.chats = chats
        opening = [{"role": "system", "content": system}] if system else []
        self.turns: tuple[list[dict[str, str]], list[dict[str, str]]] = (opening, list(opening))
        self.stop_ids = self.encoder.turn_ends() if chats else None

    def ask(self, text: str) -> tuple[str, str]:
        """Returns the base model's answer and the tuned model's; raises DataError for a text that cannot be sent."""
        with self.attached.disabled():
            base = self._answer(self.turns[0], text)
        answers = (base, self._answer(self.turns[1], text))
        for turns, answer in zip(self.turns, answers):
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return answers

    def _answer(self, turns: list[dict[str, str]], text: str) -> str:
        from loratune.evaluate.generate import generate, text_of

        ids = self.encoder.prompt([*turns, {"role": "user", "content": text}] if self.chats else text)
        [answer] = generate(self.model, self.tokenizer, [ids], self.max_new_tokens, stop_ids=self.stop_ids)
        return text_of(self.tokenizer, answer)


def _load(folder: Path, name: str, raw: bool, system: str | None, max_new_tokens: int) -> Pair:
    """Loads both models; what the adapter was trained on (loratune.json) says what is sent."""
    record = folder / ABOUT
    kind = read_record(record).get("data_kind") if record.is_file() else None
    if system and (raw or kind in ("prompt_completion", "text")):
        raise ConfigError("--system needs an adapter of chat messages, and no --raw: plain text has no system message.")
    from loratune import api

    model, tokenizer = api.load_model(name)
    attached = api.load_adapter(model, folder)
    # Adapters from elsewhere have no record: their model's own template is the likelier guess.
    chats = not raw and (kind == "messages" or (kind is None and bool(tokenizer.chat_template)))
    return Pair(model, tokenizer, attached, chats=chats, system=system, max_new_tokens=max_new_tokens)


def _questions(console: "Console", as_json: bool) -> Iterator[str]:
    """Yields one question a line, until the end of input."""
    talks = sys.stdin.isatty() and not as_json
    if talks:
        console.print("Ask both. Ctrl-D ends.", style="dim")
    while True:
        try:
            text = console.input("[bold]> [/bold]") if talks else input()
        except EOFError:
            return
        if text.strip():
            if not talks:  # nobody saw it typed
                console.print(f"> {text}", style="bold", markup=False, highlight=False, soft_wrap=True)
            yield text


def _show(console: "Console", prompt: str, answers: tuple[str, str], as_json: bool) -> None:
    if as_json:
        print_json({"prompt": prompt, "base": answers[0], "tuned": answers[1]})
        return
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    boxes = [
        Panel(Text(answer.strip() or "(nothing)"), title=title, title_align="left", border_style=style)
        for answer, title, style in zip(answers, ("base", "tuned"), ("dim", "cyan"))
    ]
    if console.width < _TWO_COLUMNS_WIDTH:
        console.print(*boxes, sep="\n")
        return
    columns = Table.grid(expand=True)
    columns.add_column(ratio=1)
    columns.add_column(ratio=1)
    columns.add_row(*boxes)
    console.print(columns)
