"""Chat templates: ids are the template's, masks are the assistant's turns, what cannot be proven is refused."""

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizer import CHATML, FAMILIES, LLAMA3, build, tokenizer_of

from loratune.data.encode import Document, Encoder
from loratune.data.rows import Row
from loratune.data.templates import PLAIN_TEMPLATE
from loratune.errors import DataError

ENCODERS = {name: Encoder(tokenizer_of(name), None) for name in FAMILIES}
Messages = list[dict[str, str]]

contents = (
    (
        st.text(st.characters(exclude_categories=["Cs"]), max_size=25)
        | st.sampled_from(["Київ", "a\n\n\nb", "2 + 2 = 4", "user"])
    )
    .map(str.strip)
    .filter(bool)
)


@st.composite
def conversations(draw: Callable[..., Any]) -> Messages:
    system = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    turns = [
        [{"role": "user", "content": draw(contents)}, {"role": "assistant", "content": draw(contents)}]
        for _ in range(draw(st.integers(1, 4)))
    ]
    trailing = [{"role": "user", "content": draw(contents)}] if draw(st.integers(0, 4)) == 0 else []
    return system + [message for turn in turns for message in turn] + trailing


def encode(name: str, messages: Messages, **more: Any) -> Document:
    [document] = ENCODERS[name].encode(Row("chat.jsonl", 3, "messages", {"messages": messages, **more}))
    return document


def runs(document: Document) -> list[list[int]]:
    pairs = zip(document.input_ids.tolist(), document.trained.tolist())
    return [[i for i, _ in run] for trained, run in groupby(pairs, key=lambda pair: pair[1]) if trained]


GOLDEN = {
    "chatml": "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    "«yes<|im_end|>»\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n«so<|im_end|>»\n",
    "gemma": "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n«yes<end_of_turn>»\n"
    "<start_of_turn>user\nwhy<end_of_turn>\n<start_of_turn>model\n«so<end_of_turn>»\n",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«yes<|eot_id|>»<|start_header_id|>user<|end_header_id|>\n\nwhy"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«so<|eot_id|>»",
    "mistral": "<s>[INST] hi [/INST]« yes</s>»[INST] why [/INST]« so</s>»",
    "plain_bos": "<s>### User\nhi\n\n### Assistant\n«yes</s>»\n\n### User\nwhy\n\n### Assistant\n«so</s>»\n\n",
    "plain": "### User\nhi\n\n### Assistant\n«yes<|endoftext|>»\n\n"
    "### User\nwhy\n\n### Assistant\n«so<|endoftext|>»\n\n",
}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_golden_masks(name: str) -> None:
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "why"), ("assistant", "so")]
    document = encode(name, [{"role": role, "content": content} for role, content in turns])
    shown, last = "", False
    for token, trained in zip(document.input_ids.tolist(), document.trained.tolist()):
        shown += ("»" if last else "«") * (trained != last) + tokenizer_of(name).decode([token])
        last = trained
    assert shown + "»" * last == GOLDEN[name]


@given(st.sampled_from(sorted(FAMILIES)), conversations())
@settings(max_examples=300, deadline=None)
def test_masks_cover_exactly_the_assistant_turns(name: str, messages: Messages) -> None:
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    document = encode(name, messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert [tokenizer.decode(run) for run in runs(document)] == [family.turn.format(answer) for answer in answers]
    end = tokenizer.convert_tokens_to_ids(family.end)
    assert [run.count(end) for run in runs(document)] == [1] * len(answers)
    ids = document.input_ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == int(family.bos is not None)


@given(st.sampled_from(sorted(FAMILIES)), conversations())
@settings(max_examples=200, deadline=None)
def test_ids_are_those_of_the_template(name: str, messages: Messages) -> None:
    tokenizer = tokenizer_of(name)
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    rendered = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False)
    if name == "plain_bos":  # the plain template leaves the begin token to the tokenizer
        rendered = [tokenizer.bos_token_id, *rendered]
    assert encode(name, messages).input_ids.tolist() == rendered


@given(st.sampled_from(sorted(FAMILIES)), conversations())
@settings(max_examples=200, deadline=None)
def test_every_prompt_is_what_training_saw(name: str, messages: Messages) -> None:
    encoder, document = ENCODERS[name], encode(name, messages)
    ids = document.input_ids.tolist()
    starts = [i for i in range(1, len(ids)) if document.trained[i] and not document.trained[i - 1]]
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [encoder.prompt(messages[:k]) for k in turns]
    assert [len(prompt) for prompt in prompts] == starts
    assert all(ids[: len(prompt)] == prompt for prompt in prompts)
    assert encoder.prompt(Row("chat.jsonl", 3, "messages", {"messages": messages})) == prompts[-1]


ASK = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}
TWO_TURNS = [ASK, ANSWER, {"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
THINKS_LAST = CHATML.replace(
    "'\n' + message", "'\n' + ('(thinks) ' if loop.last and message['role'] == 'assistant' else '') + message"
)
NO_END = CHATML.replace("<|im_end|>\n", "\n\n")


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (CHATML.replace("<|im_start|>assistant\n", "<|im_start|>bot\n"), TWO_TURNS, "generation prompt and its own"),
        (CHATML, [ASK, {"role": "assistant", "content": "\n\n\nyes"}],
         r"a token spans the turn's boundary \(in 'im_start\|>assistant(\\n){4}yes<\|im_end\|>\\n'\)"),
        (CHATML.replace("message['content']", "message['content'][:2]"), TWO_TURNS, "or rewrites message 2"),
        (FAMILIES["gemma"].template, [ASK, ASK, ANSWER], "refuses the messages: Conversation roles must alternate"),
        (FAMILIES["mistral"].template, [{"role": "developer", "content": "x"}, ASK, ANSWER], "unknown role developer"),
        ("{{ messages[5]['role'] + 1 }}", TWO_TURNS, "the chat template refuses the messages"),
        ("{% for m in messages %}", TWO_TURNS, "the chat template refuses the messages"),
        (LLAMA3.replace("message in messages", "message in messages if message.role != 'system'"),
         [{"role": "system", "content": "be brief"}, ASK, ANSWER], r"leaves out or rewrites message 1 \(system\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_masked_exactly_is_refused(template: str, messages: Messages, reason: str) -> None:
    family = (
        FAMILIES["mistral"]
        if "[INST]" in template
        else FAMILIES["gemma"]
        if "turn>" in template
        else FAMILIES["chatml"]
    )
    encoder = Encoder(build(replace(family, template=template)), None)
    with pytest.raises(DataError, match=rf"^chat.jsonl:3: .*{reason}"):
        encoder.encode(Row("chat.jsonl", 3, "messages", {"messages": messages}))


def test_a_template_that_reads_only_the_last_turn_may_still_be_trained_on_one() -> None:
    tokenizer = build(replace(FAMILIES["chatml"], template=THINKS_LAST))
    [document] = Encoder(tokenizer, None).encode(Row("f", 1, "messages", {"messages": [ASK, ANSWER]}))
    assert [tokenizer.decode(run) for run in runs(document)] == ["(thinks) yes<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_gives_a_document_for_each() -> None:
    tokenizer = build(replace(FAMILIES["chatml"], template=THINKS_LAST))
    encoder = Encoder(tokenizer, None)
    documents = encoder.encode(Row("f", 1, "messages", {"messages": TWO_TURNS}))
    assert [[tokenizer.decode(run) for run in runs(document)] for document in documents] == [
        ["(thinks) yes<|im_end|>"],
        ["(thinks) so<|im_end|>"],
    ]
    assert "yes<|im_end|>" in tokenizer.decode(documents[1].input_ids)  # the history, without its thought
    silent = [ASK, ANSWER | {"train": False}, *TWO_TURNS[2:]]
    whole = Encoder(tokenizer, None, train_on="all")
    with pytest.raises(DataError, match=r'message 2 \(assistant\) cannot be told apart: .*train_on="completion"'):
        whole.encode(Row("f", 1, "messages", {"messages": silent}))
    assert len(encoder.encode(Row("f", 1, "messages", {"messages": silent}))) == 1


def test_a_template_without_end_tokens_gets_one_after_each_trained_turn() -> None:
    tokenizer = build(replace(FAMILIES["chatml"], template=NO_END))
    for messages in (TWO_TURNS, [*TWO_TURNS, ASK]):
        documents = Encoder(tokenizer, None).encode(Row("f", 1, "messages", {"messages": messages}))
        found = [[tokenizer.decode(run) for run in runs(document)] for document in documents]
        assert found == [["yes\n\n<|im_end|>"], ["so\n\n<|im_end|>"]]
        assert [document.input_ids.tolist().count(tokenizer.eos_token_id) for document in documents] == [1, 1]


def test_the_begin_token_is_added_only_where_the_template_did_not() -> None:
    without = build(replace(FAMILIES["llama3"], template=LLAMA3.replace("{{- bos_token -}}", "")))
    row = Row("f", 1, "messages", {"messages": TWO_TURNS})
    [document] = Encoder(without, None).encode(row)
    assert document.input_ids.tolist() == ENCODERS["llama3"].encode(row)[0].input_ids.tolist()


def test_tools_reach_the_template_or_are_refused() -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    with pytest.raises(DataError, match="has no place for tools"):
        encode("chatml", TWO_TURNS, tools=tools)
    with pytest.raises(DataError, match="the plain template has no place for tools"):
        encode("plain", TWO_TURNS, tools=tools)
    tokenizer = build(replace(FAMILIES["chatml"], template="{{ (tools | tojson + '\n') if tools else '' }}" + CHATML))
    [document] = Encoder(tokenizer, None).encode(Row("f", 1, "messages", {"messages": TWO_TURNS, "tools": tools}))
    assert '"name": "weather"' in tokenizer.decode(document.input_ids)
    assert [tokenizer.decode(run) for run in runs(document)] == ["yes<|im_end|>", "so<|im_end|>"]


def test_a_template_cannot_reach_python() -> None:
    tokenizer = build(replace(FAMILIES["chatml"], template="{{ messages.__class__.__mro__[1].__subclasses__() }}"))
    with pytest.raises(DataError, match="refuses the messages: access to attribute '__class__'"):
        Encoder(tokenizer, None).encode(Row("f", 1, "messages", {"messages": TWO_TURNS}))


def test_a_template_that_drops_tool_calls_is_refused() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Kyiv"}}}
    messages = [ASK, {"role": "assistant", "content": "let me see", "tool_calls": [call]}]
    with pytest.raises(DataError, match=r"leaves out or rewrites message 2 \(assistant\)"):
        encode("chatml", messages)
    shows = CHATML.replace("message['content']", "message['content'] + (message.tool_calls | default('') | tojson)")
    tokenizer = build(replace(FAMILIES["chatml"], template=shows))
    [document] = Encoder(tokenizer, None).encode(Row("f", 1, "messages", {"messages": messages}))
    assert '"name": "weather"' in tokenizer.decode(runs(document)[0])


def test_a_row_of_which_nothing_is_trained_is_refused() -> None:
    messages = [ASK, ANSWER | {"train": False}]
    for train_on in ("completion", "last"):
        with pytest.raises(DataError, match=r"^f:1: no token of the row would be trained"):
            Encoder(tokenizer_of("gemma"), None, train_on=train_on).encode(
                Row("f", 1, "messages", {"messages": messages})
            )
    [document] = Encoder(tokenizer_of("gemma"), None, train_on="all").encode(
        Row("f", 1, "messages", {"messages": messages})
    )
    shown = [tokenizer_of("gemma").decode(run) for run in runs(document)]
    assert shown == ["<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n", "\n"]


def test_named_templates_are_chosen_as_transformers_does() -> None:
    tokenizer = build(FAMILIES["chatml"])
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools | tojson }}\n" + CHATML}
    tools = [{"type": "function", "function": {"name": "weather"}}]
    encoder = Encoder(tokenizer, None)
    rows = [
        Row("f", i, "messages", {"messages": TWO_TURNS} | more) for i, more in enumerate([{}, {"tools": tools}, {}])
    ]
    texts = [tokenizer.decode(encoder.encode(row)[0].input_ids) for row in rows]
    assert ["weather" in text for text in texts] == [False, True, False]
    assert [encoder.encode(row)[0].input_ids.tolist() for row in rows] == [
        result[0].input_ids.tolist() for result in encoder.encode_many(rows) if not isinstance(result, DataError)
    ]
    tokenizer.chat_template = {"tool_use": CHATML}
    with pytest.raises(DataError, match="the tokenizer has no chat template for the row"):
        encoder.encode(rows[0])


def test_a_template_may_change_the_blanks_of_what_it_is_given() -> None:
    template = CHATML.replace("message['content']", "message['content'] | replace('\n', ' ')")
    tokenizer = build(replace(FAMILIES["chatml"], template=template))
    messages = [{"role": "user", "content": "2 +\n2?"}, ANSWER]
    [document] = Encoder(tokenizer, None).encode(Row("f", 1, "messages", {"messages": messages}))
    assert "2 + 2?" in tokenizer.decode(document.input_ids.tolist())


def test_a_template_that_ends_no_turn_leaves_the_end_of_sequence_alone() -> None:
    tokenizer = build(replace(FAMILIES["chatml"], template=NO_END))
    encoder = Encoder(tokenizer, None)
    assert encoder.turn_ends() == {encoder.eos_id}
