"""The rows of bench/tasks: where a tag stands, and that no writer, story or text is on both sides."""

import sys
from collections import defaultdict
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench" / "tasks"))

import rows

WORDS = [(0, 3), (4, 7), (8, 12)]


@pytest.mark.parametrize(
    ("errors", "tags"),
    [
        ([], ["O", "O", "O"]),
        ([(4, 7, "Spelling")], ["O", "B-Spelling", "O"]),
        ([(3, 3, "Punctuation")], ["B-Punctuation", "O", "O"]),  # a comma that is missing behind the first word
        ([(4, 4, "Punctuation")], ["B-Punctuation", "O", "O"]),  # put before the second word: still behind the first
        ([(12, 12, "Punctuation")], ["O", "O", "B-Punctuation"]),
        ([(3, 9, "Fluency")], ["O", "B-Fluency", "I-Fluency"]),
        ([(0, 3, "Grammar"), (4, 7, "Grammar")], ["B-Grammar", "B-Grammar", "O"]),
        ([(4, 7, "Spelling"), (7, 7, "Punctuation")], ["O", "B-Spelling", "O"]),  # the first of a word counts
        ([(20, 24, "Spelling")], ["O", "O", "O"]),  # of another sentence
    ],
)
def test_an_error_is_on_the_words_that_it_touches_or_on_the_word_before(
    errors: list[tuple[int, int, str]], tags: list[str]
) -> None:
    assert rows.tag(WORDS, errors) == tags


def test_documents_of_one_author_and_of_one_story_are_one_group() -> None:
    story = "перукар стрижка дзеркало пелерина ножиці гребінець одеколон"
    sources = ["пшениця", story, f"інакше: {story}", "жито"]
    assert rows.group(["anna", "ivan", "olha", "anna"], sources) == [0, 1, 1, 0]
    assert rows.group(["anna", "ivan", "ivan", "olha"], ["пшениця", story, "жито", story]) == [0, 1, 1, 1]


def test_a_row_is_chosen_once_and_held_out_rows_have_no_tag_that_training_lacks() -> None:
    found = [
        rows.Found("train", "a", {"tokens": ["a"], "tags": ["O"]}),
        rows.Found("test", "a", {"tokens": ["a"], "tags": ["O"]}),
        rows.Found("test", "b", {"tokens": ["b"], "tags": ["B-Rare"]}),
        rows.Found("test", "c", {"tokens": ["c"], "tags": ["O"]}),
    ]
    chosen = rows.choose(iter(found), {"train": 1, "validation": 0, "test": 1})
    assert [row["tokens"] for row in chosen["test"]] == [["c"]]
    with pytest.raises(SystemExit, match="2 rows are asked for, 1 are there"):
        rows.choose(iter(found), {"train": 1, "validation": 0, "test": 2})


@pytest.mark.slow
def test_no_author_of_the_corpus_is_on_both_sides() -> None:
    sides: dict[str, set[str]] = defaultdict(set)
    with (rows.corpus() / "metadata.csv").open(encoding="utf-8") as file:
        about = [row for row in rows.csv.DictReader(file) if row["is_sensitive"] == "0"]
    for row, text in zip(about, rows.texts(), strict=True):
        sides[row["author_id"]].add(text.split)
    assert len(sides) > 800
    assert all(len(each) == 1 for each in sides.values())
    assert {next(iter(each)) for each in sides.values()} == set(rows.SPLITS)
