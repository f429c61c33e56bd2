"""The templates of published models: renderings are transformers', masks are the answers, prompts are what is sent."""

import importlib.util
import json
import re
from collections.abc import Callable
from datetime import datetime
from functools import cache
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from chat_families import FAMILIES, NO_SYSTEM, ONE_DOCUMENT_A_TURN, REFUSED
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizer import build
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from loratune.data import sandbox
from loratune.data.encode import Document, Encoder
from loratune.data.rows import Row
from loratune.data.sandbox import Request
from loratune.data.templates import NOW
from loratune.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "templates"
ALL = FAMILIES | REFUSED
names = st.sampled_from(sorted(FAMILIES))
Messages = list[dict[str, Any]]

contents = (
    (
        st.text(st.characters(exclude_categories=["Cs"]), max_size=25)
        | st.sampled_from(["Київ", "a\n\n\nb", "2 + 2 = 4", "user", "<b>&'\"</b>", "{{ 1 }}"])
    )
    .map(str.strip)
    .filter(bool)
)


class FixedClock(datetime):
    """What transformers' templates are told, so that they can be compared."""

    @classmethod
    def now(cls, tz: Any = None) -> "FixedClock":
        return cls(NOW.year, NOW.month, NOW.day)


@pytest.fixture(autouse=True, scope="module")
def fixed_clock() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", FixedClock)
        yield


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return build(ALL[name])


@cache
def encoder_of(name: str, train_on: str = "completion") -> Encoder:
    return Encoder(tokenizer_of(name), None, train_on=train_on)


@st.composite
def conversations(draw: Callable[..., Any], name: str) -> Messages:
    system = [{"role": "system", "content": draw(contents)}] if name not in NO_SYSTEM and draw(st.booleans()) else []
    turns: Messages = []
    for _ in range(draw(st.integers(1, 4))):
        turns += [{"role": "user", "content": draw(contents)}, {"role": "assistant", "content": draw(contents)}]
    trailing = [{"role": "user", "content": draw(contents)}] if draw(st.integers(0, 4)) == 0 else []
    return system + turns + trailing


families_and_conversations = names.flatmap(lambda name: st.tuples(st.just(name), conversations(name)))


def documents_of(name: str, messages: Messages, train_on: str = "completion") -> list[Document]:
    return encoder_of(name, train_on).encode(Row("chat.jsonl", 3, "messages", {"messages": messages}))


def apart(name: str, messages: Messages) -> bool:
    """Mistral's shows the system message with the last question, and only as long as that awaits its answer."""
    return name in ONE_DOCUMENT_A_TURN or (name == "mistral_v3" and messages[0]["role"] == "system")


def runs(document: Document) -> list[list[int]]:
    pairs = zip(document.input_ids.tolist(), document.trained.tolist())
    return [[i for i, _ in run] for trained, run in groupby(pairs, key=lambda pair: pair[1]) if trained]


def turns_of(messages: Messages) -> list[int]:
    return [k for k, message in enumerate(messages) if message["role"] == "assistant"]


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Погода <b>", "parameters": {}}}]


@pytest.mark.parametrize("open_turn", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("name", sorted(ALL))
@given(st.data())
@settings(max_examples=4, deadline=None)
def test_a_rendering_is_that_of_transformers(
    name: str, tools: list[Any] | None, open_turn: bool, data: st.DataObject
) -> None:
    messages = data.draw(conversations(name))
    expected = tokenizer_of(name).apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=open_turn
    )
    template = encoder_of(name).chat._template(tools)
    request = Request(messages, tools, [(len(messages), open_turn, True)])
    assert sandbox.shared().render(template, [request]) == [[expected]]


@given(families_and_conversations)
@settings(max_examples=300, deadline=None)
def test_masks_are_exactly_the_answers_and_one_end_token_each(case: tuple[str, Messages]) -> None:
    name, messages = case
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    documents = documents_of(name, messages)
    expected = [family.turn.format(messages[k]["content"]) for k in turns_of(messages)]
    found = [run for document in documents for run in runs(document)]
    assert [tokenizer.decode(run) for run in found] == expected
    end = tokenizer.convert_tokens_to_ids(family.end)
    assert [run.count(end) for run in found] == [1] * len(found) and all(run[-1] == end for run in found)
    assert len(documents) == (len(expected) if apart(name, messages) else 1)


@given(families_and_conversations)
@settings(max_examples=300, deadline=None)
def test_ids_are_those_of_the_template_with_one_begin_token(case: tuple[str, Messages]) -> None:
    name, messages = case
    tokenizer = tokenizer_of(name)
    lengths = [k + 1 for k in turns_of(messages)] if apart(name, messages) else [len(messages)]
    for document, length in zip(documents_of(name, messages), lengths, strict=True):
        ids = tokenizer.apply_chat_template(messages[:length], return_dict=False)
        owed = [tokenizer.eos_token_id] * (name == "glm4moe")  # the template ends no turn
        if name != "mistral_v3" or not apart(name, messages):
            assert document.input_ids.tolist() == ids + owed
        if tokenizer.bos_token_id is not None:
            assert document.input_ids.tolist().count(tokenizer.bos_token_id) == 1


@given(families_and_conversations)
@settings(max_examples=300, deadline=None)
def test_what_is_trained_is_what_a_prompt_and_its_generation_are(case: tuple[str, Messages]) -> None:
    name, messages = case
    encoder, tokenizer = encoder_of(name), tokenizer_of(name)
    spans = [(d.input_ids.tolist(), span) for d in documents_of(name, messages) for span in spans_of(d)]
    for k, (ids, (start, end)) in zip(turns_of(messages), spans, strict=True):
        sent = tokenizer.apply_chat_template(messages[:k], add_generation_prompt=True, return_dict=False)
        assert encoder.prompt(messages[:k]) == sent == ids[:start]
        answer = FAMILIES[name].turn.format(messages[k]["content"])
        assert tokenizer.decode(ids[start:end]) == answer
    last = encoder.prompt(Row("chat.jsonl", 3, "messages", {"messages": messages}))
    ids, (start, _) = spans[-1]
    assert last == ids[:start]


def spans_of(document: Document) -> list[tuple[int, int]]:
    trained = [False, *document.trained.tolist(), False]
    edges = [i for i in range(len(trained) - 1) if trained[i] != trained[i + 1]]
    return list(zip(edges[::2], edges[1::2]))


@given(families_and_conversations, st.data())
@settings(max_examples=200, deadline=None)
def test_only_the_chosen_turns_are_trained(case: tuple[str, Messages], data: st.DataObject) -> None:
    name, messages = case
    turns = turns_of(messages)
    chosen = data.draw(st.lists(st.sampled_from(turns), min_size=1, unique=True).map(sorted))
    flagged = [m | {"train": k in chosen} if k in turns else m for k, m in enumerate(messages)]
    full = [(d.input_ids.tolist(), span) for d in documents_of(name, messages) for span in spans_of(d)]
    part = [(d.input_ids.tolist(), span) for d in documents_of(name, flagged) for span in spans_of(d)]
    expected = [full[turns.index(k)] for k in chosen]
    assert [(ids[s:e], ids[:s]) for ids, (s, e) in part] == [(ids[s:e], ids[:s]) for ids, (s, e) in expected]
    last = [(d.input_ids.tolist(), span) for d in documents_of(name, messages, "last") for span in spans_of(d)]
    assert [(ids[s:e], ids[:s]) for ids, (s, e) in last] == [
        (full[-1][0][s:e], full[-1][0][:s]) for s, e in [full[-1][1]]
    ]


@given(families_and_conversations)
@settings(max_examples=100, deadline=None)
def test_all_trains_every_token_but_the_begin(case: tuple[str, Messages]) -> None:
    name, messages = case
    if name == "mistral_v3" and messages[0]["role"] == "system":
        messages = messages[1:]
    [document] = documents_of(name, messages, "all")
    ids = tokenizer_of(name).apply_chat_template(messages, return_dict=False)
    assert document.input_ids.tolist()[: len(ids)] == ids
    skipped = max(1, len(encoder_of(name).prefix))
    assert document.trained.tolist() == [i >= skipped for i in range(document.num_tokens)]


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Kyiv"}}}
CALLS = {
    "glm4moe": "\n<think></think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Kyiv</arg_value>\n"
    "</tool_call><|endoftext|>",
    "gptoss": ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Kyiv"}<|call|>',
    "lfm2_2_5": "<|tool_call_start|>[weather(city='Kyiv')]<|tool_call_end|><|im_end|>",
    "llama3_1": '{"name": "weather", "parameters": {"city": "Kyiv"}}<|eot_id|>',
    "llama4": '<|python_start|><|python_end|>{"name": "weather", "parameters": {"city": "Kyiv"}}<|eot|>',
    "mistral_v3": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Kyiv"}, "id": "abcdefghi"}]</s>',
    "qwen2_5": '<tool_call>\n{"name": "weather", "arguments": {"city": "Kyiv"}}\n</tool_call><|im_end|>',
    "qwen3": '<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Kyiv"}}\n</tool_call>'
    "<|im_end|>",
}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "c"}}, "required": ["city"]}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_tool_is_called_and_its_answer_is_not_trained(name: str) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": PARAMETERS}}]
    messages = [
        {"role": "user", "content": "hi?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "rainy", "tool_call_id": "abcdefghi", "name": "weather"},
        {"role": "assistant", "content": "sunny"},
    ]
    documents = encoder_of(name).encode(Row("f", 1, "messages", {"messages": messages, "tools": tools}))
    trained = [tokenizer_of(name).decode(run) for document in documents for run in runs(document)]
    assert trained == [CALLS[name], FAMILIES[name].turn.format("sunny")]
    assert "rainy" in tokenizer_of(name).decode(documents[-1].input_ids)
    ids, (start, _) = documents[-1].input_ids.tolist(), spans_of(documents[-1])[-1]
    assert encoder_of(name).prompt(messages[:3], tools) == ids[:start]


@pytest.mark.parametrize("name", sorted(ALL))
def test_an_answer_ends_where_training_ended_it(name: str) -> None:
    tokenizer, family = tokenizer_of(name), ALL[name]
    ends = {tokenizer.convert_tokens_to_ids(family.end), tokenizer.eos_token_id}
    assert encoder_of(name).turn_ends() == ends


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_template_whose_prompt_begins_a_thought_is_refused(name: str) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    reason = r"^chat.jsonl:3: message 2 \(assistant\) cannot be masked exactly: .*'<think>\\n' becomes 'yes"
    with pytest.raises(DataError, match=reason):
        documents_of(name, messages)


def golden_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_golden_masks(name: str) -> None:
    assert (
        golden_script("make_masks").documents(name)
        == json.loads((GOLDEN / "masks.json").read_text(encoding="utf-8"))[name]
    )


@pytest.mark.parametrize("name", ["lfm2_2_5", "phi_4"])
@given(st.data())
@settings(max_examples=50, deadline=None)
def test_masks_agree_with_a_template_that_marks_its_own_answers(name: str, data: st.DataObject) -> None:
    messages = data.draw(conversations(name))
    tokenizer = tokenizer_of(name)
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    [document] = documents_of(name, messages)
    assert document.input_ids.tolist() == theirs["input_ids"]
    # LFM2.5 marks the line break behind the end token too, which is never sampled.
    marked = [
        mark == 1 and not (tokenizer.decode([token]) == "\n" and previous == tokenizer.eos_token_id)
        for mark, token, previous in zip(theirs["assistant_masks"], theirs["input_ids"], [0, *theirs["input_ids"]])
    ]
    assert document.trained.tolist() == marked


# Where TRL trains what is not sampled, or leaves out what is: (what TRL has, what is sampled), by family.
EVERYWHERE = (r"(\s+)»", r"»\1")  # the line break behind the end token
DIFFERENCES = {
    "qwen2_5": (r"(<\|im_start\|>assistant)«\n", r"\1\n«"),  # the line break that the prompt ends with
    "gptoss": (r"«<\|start\|>assistant", "<|start|>assistant«"),  # what the prompt ends with
    "phi3": (r"\n<\|endoftext\|>»", "»\n<|endoftext|>"),  # the end of the text, behind the end of the turn
}


def as_sampled(name: str, marked: str) -> str:
    marked = re.sub(*EVERYWHERE, marked)
    return re.sub(*DIFFERENCES[name], marked) if name in DIFFERENCES else marked


TRL = json.loads((GOLDEN / "trl_masks.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(TRL.keys() & FAMILIES.keys()))
def test_masks_agree_with_trl(name: str) -> None:
    show = golden_script("make_masks").marked
    for entry in TRL[name]:
        documents = [show(tokenizer_of(name), d) for d in documents_of(name, entry["messages"])]
        theirs = as_sampled(name, entry["marked"])
        if name not in ONE_DOCUMENT_A_TURN:
            assert documents == [theirs]
            continue
        ours = [run for text in documents for run in re.findall("«(.*?)»", text, re.DOTALL)]
        end = re.compile(r"(<\|[a-z]+\|>)?$")  # TRL has the next turn's beginning, or <|end|>, where a server stops
        assert [end.sub("", run) for run in ours] == [end.sub("", r) for r in re.findall("«(.*?)»", theirs, re.DOTALL)]
