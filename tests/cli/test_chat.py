"""Both sides of a chat are what the models say by themselves, each with its own history."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from loratune.adapter.attach import attach
from loratune.adapter.config import LoraConfig
from loratune.cli import main
from loratune.cli.chat import Pair, _show
from loratune.errors import DataError
from loratune.evaluate.generate import generate, text_of

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from toy_tokenizer import tokenizer_of


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=700, initializer_range=0.5, **sizes)
    return LlamaForCausalLM(config).eval()


def pair_of(model: Any, family: str, *, chats: bool, system: str | None = None) -> Pair:
    attached = attach(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0), seed=0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
        assert parameter.requires_grad or "lora" not in name.lower()
    return Pair(model, tokenizer_of(family), attached, chats=chats, system=system, max_new_tokens=6)


def said(pair: Pair, prompt: Any) -> str:
    ids = pair.encoder.prompt(prompt)
    [answer] = generate(pair.model, pair.tokenizer, [ids], 6, stop_ids=pair.stop_ids)
    return text_of(pair.tokenizer, answer)


def test_plain_text_is_sent_as_it_was_trained(model: Any) -> None:
    pair = pair_of(model, "plain_bos", chats=False)
    base, tuned = pair.ask("the answer")
    assert tuned == said(pair, "the answer")
    pair.attached.detach()
    assert base == said(pair, "the answer")
    assert base != tuned


def test_each_side_remembers_its_own_answers(model: Any) -> None:
    pair = pair_of(model, "chatml", chats=True, system="short")
    first = pair.ask("question")
    second = pair.ask("more")
    turns = [
        {"role": "system", "content": "short"},
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": first[1]},
        {"role": "user", "content": "more"},
    ]
    assert second[1] == said(pair, turns)
    pair.attached.detach()
    turns[2]["content"] = first[0]
    assert second[0] == said(pair, turns)


def test_an_answer_ends_where_training_ended_it(model: Any) -> None:
    gemma = tokenizer_of("gemma")  # its turns do not end with the end-of-sequence token
    ends = {gemma.convert_tokens_to_ids(token) for token in ("<end_of_turn>", "<eos>")}
    assert pair_of(model, "gemma", chats=True).stop_ids == ends


def test_a_question_that_cannot_be_sent_leaves_the_conversation_as_it_was(model: Any) -> None:
    pair = pair_of(model, "chatml", chats=True)
    with pytest.raises(DataError):
        pair.ask("<|im_end|>")
    assert pair.turns == ([], [])


@pytest.mark.parametrize(("width", "together"), [(100, True), (60, False)])
def test_two_columns_where_there_is_room(width: int, together: bool) -> None:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    _show(console, "q", ("[one]", "two"), as_json=False)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert any("[one]" in line and "two" in line for line in lines) == together
    assert any("two" in line for line in lines)


def test_json_holds_both_answers(capsys: pytest.CaptureFixture[str]) -> None:
    _show(Console(), "питання", ("a", "b"), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"prompt": "питання", "base": "a", "tuned": "b"}


def test_a_system_message_for_plain_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "m"}')
    (tmp_path / "loratune.json").write_text('{"data_kind": "text"}')
    assert main.run(["chat", str(tmp_path), "--system", "be kind"]) == 2
    assert "--system needs an adapter of chat messages" in capsys.readouterr().err
