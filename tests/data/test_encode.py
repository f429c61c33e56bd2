"""Rows without a template: which tokens stand where, which are trained, and what is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from toy_tokenizer import FAMILIES, build, tokenizer_of

from loratune.data.encode import LONG, TRAIN_ON, Encoder, LongRow
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
    [document] = ENCODERS["gemma"].encode(row("prompt_completion", prompt=" answer", completion=" the"))
    assert pieces("gemma", document.input_ids.tolist()) == ["<bos>", " answer", " the", "<eos>"]
    assert document.trained.tolist() == [False, False, True, True]
    assert (document.input_ids.dtype, document.trained.dtype) == (np.int32, np.bool_)
    assert (document.num_tokens, document.num_labels) == (4, 2)


def test_text_golden() -> None:
    [document] = ENCODERS["gemma"].encode(row("text", text=" the answer"))
    assert pieces("gemma", document.input_ids.tolist()) == ["<bos>", " the", " answer", "<eos>"]
    assert document.trained.tolist() == [False, True, True, True]
    [without_bos] = ENCODERS["chatml"].encode(row("text", text=" the answer"))
    assert pieces("chatml", without_bos.input_ids.tolist()) == [" the", " answer", "<|im_end|>"]
    assert without_bos.trained.tolist() == [False, True, True]  # nothing predicts the first token


@given(names, words, words.filter(str.strip))
@settings(deadline=None)
def test_a_prompt_is_what_training_saw(name: str, prompt: str, completion: str) -> None:
    encoder, tokenizer = ENCODERS[name], tokenizer_of(name)
    [document] = encoder.encode(row("prompt_completion", prompt=prompt, completion=completion))
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
    [document] = encoder.encode(row("text", text=text))
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
    assert [d.num_tokens for d in Encoder(tokenizer_of("gemma"), 8).encode(fits)] == [8]
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
    [document] = Encoder(tokenizer, None).encode(row("prompt_completion", prompt="a", completion="b"))
    assert document.input_ids[-1] == tokenizer.pad_token_id and document.trained[-1]


rows_of_every_kind = st.one_of(
    st.builds(lambda prompt, text: row("prompt_completion", prompt=prompt, completion=text), words, words),
    st.builds(lambda text: row("text", text=text), words),
    st.builds(
        lambda ask, answer, end: row("messages", messages=turns(ask, answer) * 2 + turns(end, end)[: len(end) % 2 + 1]),
        words,
        words,
        words,
    ),
    st.just(row("text", text="a <|im_end|> b <eos>")),
    st.just(row("classification", text="a", label="b")),
)


def turns(ask: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]


def outcome(result: Any) -> Any:
    if isinstance(result, DataError):
        return type(result), str(result)
    return [(d.input_ids.tolist(), d.trained.tolist(), d.input_ids.dtype, d.trained.dtype) for d in result]


def one_by_one(encoder: Encoder, rows: list[Row]) -> list[Any]:
    results: list[Any] = []
    for each in rows:
        try:
            results.append(encoder.encode(each))
        except DataError as error:
            results.append(error)
    return results


@given(names, st.lists(rows_of_every_kind, max_size=8), st.sampled_from(LONG), st.sampled_from(TRAIN_ON))
@settings(max_examples=150, deadline=None)
def test_many_rows_give_what_each_alone_gives(name: str, rows: list[Row], long: str, train_on: str) -> None:
    encoder = Encoder(tokenizer_of(name), 25, long=long, train_on=train_on)
    assert list(map(outcome, encoder.encode_many(rows))) == list(map(outcome, one_by_one(encoder, rows)))


def test_groups_come_back_in_order() -> None:
    rows = [
        row("text", text=f"the {i}") if i % 3 else row("messages", messages=turns(f"what is {i}?", f"answer {i}"))
        for i in range(1000)
    ]
    results = ENCODERS["gemma"].encode_many(rows)
    assert list(map(outcome, results)) == list(map(outcome, one_by_one(ENCODERS["gemma"], rows)))
    assert ENCODERS["gemma"].encode_many([]) == []


class Backend:
    """A tokenizer's Rust part that counts what it is asked."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.calls = backend, list[list[str]]()

    def encode_batch_fast(self, texts: list[str], **kwargs: Any) -> Any:
        self.calls.append(texts)
        return self.backend.encode_batch_fast(texts, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


def test_a_batch_is_one_call_of_the_tokenizer_and_no_text_is_tokenised_twice() -> None:
    tokenizer = build(FAMILIES["gemma"])
    encoder = Encoder(tokenizer, None)
    tokenizer._tokenizer = Backend(tokenizer._tokenizer)
    encoder.encode_many([row("messages", messages=turns(f"what is {i}?", "yes")) for i in range(50)])
    [texts] = tokenizer._tokenizer.calls
    # 50 conversations, the generation prompt, and the end token: the boundaries of all turns.
    assert len(texts) == 52 and {"<start_of_turn>model\n", "<end_of_turn>"} < set(texts)


def test_what_another_user_of_the_tokenizer_set_does_not_matter() -> None:
    tokenizer = build(FAMILIES["gemma"], pad_token="<eos>")
    encoder = Encoder(tokenizer, None)
    rows = [row("text", text="the answer is " * n) for n in (1, 5)]
    rows += [row("messages", messages=turns("what is it?", "the answer"))]
    expected = list(map(outcome, encoder.encode_many(rows)))
    tokenizer(["a", "b " * 9], padding=True, truncation=True, max_length=3, split_special_tokens=True)
    assert list(map(outcome, encoder.encode_many(rows))) == expected


@given(names, words.filter(str.strip), st.integers(4, 12))
@settings(deadline=None)
def test_a_long_text_is_split_into_pieces_that_hold_each_token_once(name: str, text: str, limit: int) -> None:
    whole = ENCODERS[name].encode(row("text", text=text * 3))[0].input_ids.tolist()
    encoder = Encoder(tokenizer_of(name), limit, long="split")
    pieces = encoder.encode(row("text", text=text * 3))
    skip = len(encoder.prefix)
    assert whole[:skip] + [i for piece in pieces for i in piece.input_ids.tolist()[skip:]] == whole
    assert all(piece.num_tokens <= limit and piece.input_ids.tolist()[:skip] == encoder.prefix for piece in pieces)
    lengths = [piece.num_tokens for piece in pieces]
    assert max(lengths) - min(lengths) <= 1 and len(pieces) == -(-(len(whole) - skip) // (limit - skip))
    first, *rest = (piece.trained.tolist() for piece in pieces)
    assert first == [i >= max(1, skip) for i in range(len(first))]
    assert all(trained == [i >= skip + 1 for i in range(len(trained))] for trained in rest)


@pytest.mark.parametrize("long", LONG)
def test_a_long_row_is_told_apart_and_only_a_text_is_split(long: str) -> None:
    encoder = Encoder(tokenizer_of("gemma"), 7, long=long)
    for bad in (
        row("prompt_completion", prompt="the " * 9, completion="a"),
        row("messages", messages=turns("a" * 9, "b")),
    ):
        with pytest.raises(LongRow, match=r"tokens long, the limit is 7\. Rows are never cut"):
            encoder.encode(bad)


@given(names, words, words.filter(str.strip))
@settings(deadline=None)
def test_all_trains_the_prompt_too(name: str, prompt: str, completion: str) -> None:
    encoder = Encoder(tokenizer_of(name), None, train_on="all")
    [document] = encoder.encode(row("prompt_completion", prompt=prompt, completion=completion))
    [usual] = ENCODERS[name].encode(row("prompt_completion", prompt=prompt, completion=completion))
    assert document.input_ids.tolist() == usual.input_ids.tolist()
    assert document.trained.tolist() == [i >= max(1, len(encoder.prefix)) for i in range(document.num_tokens)]


def test_an_unknown_choice_and_a_row_of_another_task_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train_on is 'answers'; expected one of completion, all, last\."):
        Encoder(tokenizer_of("gemma"), None, train_on="answers")
    with pytest.raises(ConfigError, match=r"long is 'cut'; expected one of stop, drop, split\."):
        Encoder(tokenizer_of("gemma"), None, long="cut")
    with pytest.raises(
        DataError, match=r"^rows.jsonl:7: a classification row has no text to generate; expected one of"
    ):
        ENCODERS["gemma"].encode(row("classification", text="a", label="b"))
