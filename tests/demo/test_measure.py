"""The task measure on cases counted by hand, and its properties on real sentences."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.demo import corpus
from loratune.demo.measure import Marks, Restoration, compare, marks_restored, measure
from loratune.errors import DataError

REFERENCE = "Так, п'ять хвилин — це Київ!"  # capitals Так, Київ; signs , — !
WORDS = st.lists(st.sampled_from(["так", "Так", "ні", "Київ", "київ", "п'ять", "це", "ЗСУ"]), min_size=1, max_size=12)
GAPS = st.lists(st.sampled_from([" ", ", ", " — ", ": ", "... "]), min_size=12, max_size=12)
REFERENCES = st.builds(
    lambda words, gaps, end: "".join(a + b for a, b in zip(words, gaps, strict=False)).rstrip(" ,—:.") + end,
    WORDS,
    GAPS,
    st.sampled_from([".", "?", "!", "...", "?!"]),
)


@pytest.mark.parametrize(
    ("predicted", "marks"),
    [
        (REFERENCE, Marks(5, 5, 5, True)),
        ("  Так,  п’ять хвилин – це Київ! ", Marks(5, 5, 5, True)),  # kinds of dash, apostrophe, space
        ("так п'ять хвилин це київ", Marks(0, 5, 0, False)),
        ("Так п'ять хвилин, це Київ.", Marks(2, 5, 4, False)),  # comma at the wrong word, wrong end
        ("Так, п'ять років — це Київ!", Marks(4, 5, 5, False)),  # the dash stands after another word
        ("Ну Так, п'ять хвилин — це Київ!", Marks(5, 5, 6, False)),  # an added word moves nothing
        ("Так, П'ЯТЬ хвилин — це КИЇВ!", Marks(4, 5, 6, False)),
        ('"Так", п\'ять хвилин — це Київ!', Marks(5, 5, 7, False)),
        ("", Marks(0, 5, 0, False)),
    ],
)
def test_marks_counted_by_hand(predicted: str, marks: Marks) -> None:
    assert compare(predicted, REFERENCE) == marks
    assert marks_restored(predicted, REFERENCE) == (marks.restored, marks.total)


def test_three_dots_are_one_mark_and_not_a_full_stop() -> None:
    assert compare("ось так.", "ось так...") == Marks(0, 1, 1, False)
    assert compare("ось так…", "ось так...") == Marks(1, 1, 1, True)


def test_marks_before_the_first_word_count() -> None:
    assert compare('"Так.', '«Так."') == Marks(3, 4, 3, False)
    assert compare("— Так.", '"Так."') == Marks(2, 4, 3, False)


def test_long_repetitive_text_is_aligned_in_full() -> None:
    """difflib's default takes words that are frequent in 200 or more for junk and aligns none of them."""
    text = "Так, ні. " * 150
    assert marks_restored(text, text) == (450, 450)


@given(REFERENCES)
def test_perfect_prediction_restores_all_and_stripped_text_nothing(reference: str) -> None:
    assert measure([reference], [reference]) == Restoration(1.0, 1.0, 1.0, 1)
    assert measure([corpus.strip_marks(reference)], [reference]) == Restoration(0.0, 0.0, 0.0, 1)


@given(st.text(max_size=40), REFERENCES)
def test_counts_stay_within_bounds_for_any_prediction(predicted: str, reference: str) -> None:
    marks = compare(predicted, reference)
    assert 0 <= marks.restored <= min(marks.total, marks.placed)
    assert not marks.exact or marks.restored == marks.total == marks.placed


def test_rambling_scores_low_on_real_sentences() -> None:
    """The base model's failure: it goes on about something else, here another document's sentence."""
    texts = [sentence.text for sentence in corpus.sentences("test")]
    others = random.Random(0).sample(texts, len(texts))
    apart = [(one, other) for one, other in zip(texts, others, strict=True) if one != other]
    result = measure([other for _, other in apart], [one for one, _ in apart])
    assert result.marks_share < 0.05 and result.precision < 0.05 and result.exact_share == 0.0


def test_measure_sums_marks_over_sentences() -> None:
    result = measure(["так, п'ять хвилин — це Київ!", "Ні"], [REFERENCE, "Ні."])
    assert result == Restoration(marks_share=5 / 7, exact_share=0.0, precision=1.0, num_sentences=2)


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["а"], ["А.", "Б."]), (["а"], ["а"])])
def test_nothing_to_measure_is_an_error(predictions: list[str], references: list[str]) -> None:
    with pytest.raises(DataError, match=r"expected one for each|no mark"):
        measure(predictions, references)
