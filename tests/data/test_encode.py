"""Rows without a template: which tokens stand where, which are trained, and what is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from toy_tokenizer import FAMILIES, build, tokenizer_of

from loratune.data.encode import Encoder
from loratune.data.rows import Row
from loratune.errors import ConfigError, DataError

ENCODERS = {name: Encoder(tokenizer_of(name), None) for name in FAMILIES}
names = st.sampled_from(sorted(FAMILIES))
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    [" Київ", "the answer", "\n\n\n", "🙂"]
)


def row(kind: str, **value: Any) -> Row:
    return Row("rows.jsonl", 7, kind, value)


def pieces(name: str, ids: list[int]) -> list[str]:
    return [tokenizer_of(name).decode([i]) for i in ids]


def test_prompt_and_completion_golden() -> None:
    document = ENCODERS["gemma"].encode(row("prompt_completion", prompt=" answer", completion=" the"))
    assert pieces("gemma", document.input_ids.tolist()) == ["<bos>", " answer", " the", "<eos>"]
    assert document.trained.tolist() == [False, False, True, True]
    assert (document.input_ids.dtype, document.trained.dtype) == (np.int32, np.bool_)
    assert (document.num_tokens, document.num_labels) == (4, 2)


def test_text_golden() -> None:
    document = ENCODERS["gemma"].encode(row("text", text=" the answer"))
    assert pieces("gemma", document.input_ids.tolist()) == ["<bos>", " the", " answer", "<eos>"]
    assert document.trained.tolist() == [False, True, True, True]
    without_bos = ENCODERS["chatml"].encode(row("text", text=" the answer"))
    assert pieces("chatml", without_bos.input_ids.tolist()) == [" the", " answer", "<|im_end|>"]
    assert without_bos.trained.tolist() == [False, True, True]  # nothing predicts the first token


@given(names, words, words.filter(str.strip))
@settings(deadline=None)
def test_a_prompt_is_what_training_saw(name: str, prompt: str, completion: str) -> None:
    encoder, tokenizer = ENCODERS[name], tokenizer_of(name)
    document = encoder.encode(row("prompt_completion", prompt=prompt, completion=completion))
    ids, sent = document.input_ids.tolist(), encoder.prompt(prompt)
    assert ids[: len(sent)] == sent == encoder.prompt(row("prompt_completion", prompt=prompt, completion=completion))
    assert sent == tokenizer(prompt)["input_ids"]  # the begin token exactly as the tokenizer itself sets it
    assert tokenizer.decode(ids[len(sent) :]) == completion + str(tokenizer.eos_token)
    assert document.trained.tolist() == [i >= max(1, len(sent)) for i in range(len(ids))]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids.count(tokenizer.bos_token_id) == int(FAMILIES[name].prepends)


@given(names, words.filter(str.strip))
@settings(deadline=None)
def test_a_text_is_trained_whole(name: str, text: str) -> None:
    encoder, tokenizer = ENCODERS[name], tokenizer_of(name)
    document = encoder.encode(row("text", text=text))
    assert document.input_ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert document.trained.tolist() == [i >= max(1, len(encoder.prefix)) for i in range(document.num_tokens)]
    assert document.input_ids.tolist()[: len(encoder.prefix)] == encoder.prompt(row("text", text=text))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_text_that_spells_a_special_token_is_refused(name: str) -> None:
    tokenizer, encoder = tokenizer_of(name), ENCODERS[name]
    for token in tokenizer.all_special_tokens + list(FAMILIES[name].special):
        spelt = f"a {token} b"
        chat = [{"role": "user", "content": spelt}, {"role": "assistant", "content": "b"}]
        rows = [
            row("text", text=spelt),
            row("prompt_completion", prompt=spelt, completion="c"),
            row("prompt_completion", prompt="c", completion=spelt),
            row("messages", messages=chat),
            row("messages", messages=chat[1:], tools=[{"deep": [{spelt: 1}]}]),
        ]
        for bad in rows:
            with pytest.raises(DataError, match=r"^rows.jsonl:7: the text spells out the special token") as caught:
                encoder.encode(bad)
            assert repr(token) in str(caught.value)
        with pytest.raises(DataError, match=r"^the text spells out"):
            encoder.prompt(spelt)


def test_a_long_document_is_refused_and_never_cut() -> None:
    fits = row("text", text=" the answer" * 3)
    assert Encoder(tokenizer_of("gemma"), 8).encode(fits).num_tokens == 8
    with pytest.raises(
        DataError, match=r"^rows.jsonl:7: the row is 8 tokens long, the limit is 7\. Rows are never cut"
    ):
        Encoder(tokenizer_of("gemma"), 7).encode(fits)


def test_a_tokenizer_without_end_token_is_refused() -> None:
    tokenizer = build(FAMILIES["gemma"])
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        Encoder(tokenizer, None)


def test_a_text_that_the_tokenizer_drops_is_refused() -> None:
    tokenizer = build(FAMILIES["gemma"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    encoder = Encoder(tokenizer, None)
    for bad in (row("text", text="xx"), row("prompt_completion", prompt="a", completion="x")):
        with pytest.raises(DataError, match="the tokenizer makes no token of the"):
            encoder.encode(bad)


def test_pad_equal_to_eos_does_not_unlearn_the_end() -> None:
    tokenizer = build(FAMILIES["plain"], pad_token="<|endoftext|>")
    document = Encoder(tokenizer, None).encode(row("prompt_completion", prompt="a", completion="b"))
    assert document.input_ids[-1] == tokenizer.pad_token_id and document.trained[-1]
