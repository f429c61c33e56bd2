"""Texts, edits and spans against sacrebleu, SQuAD's rules and seqeval's published definition."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.evaluate import metrics, text

sacrebleu = pytest.importorskip("sacrebleu")

WORDS = ["кіт", "the", "dog,", "3.5", "it's", "U.S.", "a-b", "&amp;", "(so)", "end.", "x", "!"]
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), min_size=2, max_size=6)


@settings(max_examples=120, deadline=None)
@given(TEXTS, st.randoms(use_true_random=False))
def test_chrf_and_bleu_are_sacrebleus(asked: list[str], generator: random.Random) -> None:
    asked = [each or "x" for each in asked]
    said = [" ".join(w for w in each.split() if generator.random() < 0.7) for each in asked]
    found = text.text_figures(said, asked)
    assert found["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(said, [asked]).score, abs=1e-9)
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(said, [asked]).score, abs=1e-9)


def test_answers_are_compared_as_squad_does() -> None:
    assert text.answer_scores("The  Cat!", ["a cat"]) == (1.0, 1.0)
    assert text.answer_scores("big red cat", ["red cat", "dog"]) == (0.0, pytest.approx(0.8))
    assert text.answer_scores("", []) == (1.0, 1.0)
    assert text.answer_scores("something", []) == (0.0, 0.0)


def test_edits_are_the_words_that_change() -> None:
    assert text.edits("he go home", "he goes home .") == {(1, 2, ("goes",)), (3, 3, (".",))}
    counts = text.edit_counts(["he go home"] * 3, ["he goes home", "he go home", "she go home"], ["he goes home ."] * 3)
    assert counts.tolist() == [[1, 1, 2], [0, 0, 2], [0, 1, 2]]
    figures = text.correction_figures(["a b"] * 2, ["a c", "a b"], ["a c", "a b"])
    assert figures["f0_5"].value == 1


def seqeval_spans(tags: list[str]) -> list[tuple[str, int, int]]:
    """Seqeval's `get_entities`, written from its published rules: a chunk ends and begins by (prefix, type) pairs."""

    def split(tag: str) -> tuple[str, str]:
        return (tag[0], tag[2:] or "_") if tag != "O" else ("O", "_")

    def ends(before: str, kind_before: str, now: str, kind: str) -> bool:
        if before in "ES":
            return True
        if before in "BI" and now in "BSO":
            return True
        return before != "O" and before != "." and kind_before != kind

    def begins(before: str, kind_before: str, now: str, kind: str) -> bool:
        if now in "BS":
            return True
        if before in "ESO" and now in "EI":
            return True
        return now != "O" and now != "." and kind_before != kind

    found, start, before, kind_before = [], 0, "O", ""
    for index, tag in enumerate([*tags, "O"]):
        now, kind = split(tag)
        if ends(before, kind_before, now, kind) and before != "O":
            found.append((kind_before, start, index))
        if begins(before, kind_before, now, kind):
            start = index
        before, kind_before = now, kind
    return found


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["O", "B-X", "I-X", "E-X", "S-X", "B-Y", "I-Y", "E-Y", "S-Y"]), max_size=9))
def test_spans_are_seqevals(tags: list[str]) -> None:
    assert text.spans(tags) == seqeval_spans(tags)


def test_tags_without_marks_are_runs() -> None:
    assert text.spans(["NOUN", "NOUN", "VERB", "O"]) == [("NOUN", 0, 2), ("VERB", 2, 3)]
    assert text.types(["O", "B-PER", "I-PER", "B-LOC", "NOUN"]) == ("LOC", "NOUN", "PER")


def test_span_f1_counts_whole_spans() -> None:
    asked = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "O", "O"]]
    said = [["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC", "O", "B-PER"]]
    counts = text.span_counts(said, asked, ("LOC", "PER"))
    assert counts.sum(0).tolist() == [2, 0, 2, 2, 2, 1]
    assert metrics.additive(counts, metrics.micro_f1).value == pytest.approx(2 * 2 / (4 + 3))
    assert np.isclose(metrics.class_table(counts, ("LOC", "PER"))[0]["f1"], 1.0)
