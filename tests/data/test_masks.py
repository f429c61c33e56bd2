"""Boundaries in ids: the short way round gives what tokenising the whole prefix gives, for tokenizers of every kind."""

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from toy_tokenizer import FAMILIES, build
from transformers import PreTrainedTokenizerFast

from loratune.data.masks import Cuts, Marks, _any_of


def sentencepiece_like(scheme: str) -> PreTrainedTokenizerFast:
    """Writes a space before the text ("first") or before every piece of it ("always"), as Llama 2's kind do."""
    vocab = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁a", -1.5), ("ab", -1.5), ("\n", -2.5)]
    vocab += [(letter, -3.0) for letter in "abc <s>END[/]"]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def writes_special() -> PreTrainedTokenizerFast:
    """Its model makes the end token of a letter, so that the id stands for text that is not the token's."""
    tokenizer = sentencepiece_like("never")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("c", "</s>")
    return tokenizer


def with_tokens(*tokens: AddedToken) -> PreTrainedTokenizerFast:
    tokenizer = build(FAMILIES["plain"])
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def lower_case() -> PreTrainedTokenizerFast:
    tokenizer = with_tokens(AddedToken("<sep>", normalized=True, special=True))
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": lambda: with_tokens(AddedToken("<sep>", normalized=False, special=True)),
    "strip_right": lambda: with_tokens(AddedToken("<sep>", normalized=False, special=True, rstrip=True)),
    "strip_left": lambda: with_tokens(AddedToken("<sep>", normalized=False, special=True, lstrip=True)),
    "single_word": lambda: with_tokens(AddedToken("<sep>", normalized=False, special=True, single_word=True)),
    "nested": lambda: with_tokens(AddedToken("<sep>", special=True), AddedToken("<sep><sep>", special=True)),
    "lower_case": lower_case,
    "first": lambda: sentencepiece_like("first"),
    "always": lambda: sentencepiece_like("always"),
    "writes_special": writes_special,
}
MADE = {name: make() for name, make in TOKENIZERS.items()}
MARKS = {name: Marks.of(tokenizer) for name, tokenizer in MADE.items()}
texts = st.lists(
    st.sampled_from(
        ["<sep>", "</s>", "<|endoftext|>", "<SEP>", "a", "ab", " ", "\n", "\n\n", "c", "й", "<", "sep>", "∞"]
    ),
    min_size=1,
    max_size=12,
).map("".join)


def ids_of(name: str, text: str) -> list[int]:
    return MADE[name].encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@given(texts, st.data())
@settings(max_examples=150, deadline=None)
def test_a_boundary_is_where_the_prefix_alone_has_the_same_ids(name: str, text: str, data: st.DataObject) -> None:
    characters = data.draw(st.lists(st.integers(0, len(text)), min_size=1, max_size=4).map(sorted))
    cuts = Cuts.of(text, characters, MARKS[name])
    found = cuts.positions(lambda part: ids_of(name, part), MARKS[name])
    whole = ids_of(name, text)
    for character, position in zip(characters, found, strict=True):
        prefix = ids_of(name, text[:character])
        if position is not None:
            assert whole[:position] == prefix
        elif not inside_a_special_token(name, text, character):
            assert whole[: len(prefix)] != prefix


def inside_a_special_token(name: str, text: str, character: int) -> bool:
    return any(match.start() < character < match.end() for match in MARKS[name].pattern.finditer(text))


def test_only_the_tail_is_tokenised_again() -> None:
    text = "aaaa<sep>bbbb<sep>answer"
    cuts = Cuts.of(text, [len("aaaa<sep>bbbb<sep>"), len(text)], MARKS["bytes"])
    assert cuts.texts == [text, "<sep>", "<sep>answer"]
    assert Cuts.of(text, [4], MARKS["bytes"]).texts == [text, "aaaa"]


def test_tokens_that_do_not_always_cut_are_no_anchors() -> None:
    assert {name: bool(marks.anchors.search("<sep>")) for name, marks in MARKS.items()} == {
        "bytes": True, "strip_right": True, "strip_left": True, "nested": True,
        "single_word": False, "lower_case": False, "first": False, "always": False, "writes_special": False,
    }  # fmt: skip
    assert not MARKS["first"].anchors.search("<unk>") and MARKS["first"].pattern.search("<unk>")


@given(st.lists(st.text("ab<.|*", max_size=4), max_size=8), st.text("ab<.|*", max_size=20))
def test_the_tree_of_tokens_finds_the_longest_of_the_first(tokens: list[str], text: str) -> None:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    flat = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    spans = [match.span() for match in flat.finditer(text)]
    assert [match.span() for match in _any_of(tokens).finditer(text)] == spans
