"""Every row is trained or rejected; what is worth a look is noted with its place."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratune.data.ledger import Ledger, Note
from loratune.data.rows import Reject, Row, iter_rows
from loratune.errors import DataError

GOOD = '{"prompt": "Яка столиця?", "completion": " Київ"}'


def text_row(line: int, text: str, source: str = "a.jsonl") -> Row:
    return Row(source, line, "text", {"text": text})


def closed(*rows: Row) -> Ledger:
    ledger = Ledger()
    for _ in ledger.take(rows):
        ledger.train()
    ledger.close()
    return ledger


def test_rows_in_are_rows_trained_and_rows_rejected() -> None:
    ledger = Ledger()
    items = [text_row(1, "a"), Reject("a.jsonl", 2, "broken"), text_row(3, "b"), text_row(4, "c")]
    for row in ledger.take(items):
        if row.line == 3:
            ledger.reject(row, DataError("a.jsonl:3: the row is too long."))
        else:
            ledger.train()
    ledger.close()
    assert (ledger.rows_in, ledger.rows_trained) == (4, 2)
    assert ledger.rejects == [Reject("a.jsonl", 2, "broken"), Reject("a.jsonl", 3, "the row is too long.")]


@pytest.mark.parametrize("times", [0, 2])
def test_a_row_that_is_lost_or_counted_twice_is_caught(times: int) -> None:
    ledger = Ledger()
    for _ in ledger.take([text_row(1, "a")]):
        ledger.train(times)
    with pytest.raises(AssertionError, match=f"1 rows in, but {times} trained and 0 rejected"):
        ledger.close()


def test_the_message_says_how_many_which_and_what_to_do() -> None:
    ledger = Ledger()
    list(ledger.take(Reject("a.jsonl", line, f"reason {line}.") for line in range(1, 1008)))
    assert ledger.message() == (
        "1,007 of 1,007 rows cannot be trained on:\n"
        "  a.jsonl:1: reason 1.\n  a.jsonl:2: reason 2.\n  a.jsonl:3: reason 3.\n"
        "  a.jsonl:4: reason 4.\n  a.jsonl:5: reason 5.\n"
        "  ... and 1,002 more.\n"
        "Mend or remove them; or go on without them with --reject, which lists them in the run's ledger.jsonl."
    )


def test_duplicates_are_counted_and_placed_across_files() -> None:
    texts = ["x", "y", "x", "z", "x", "y"]
    rows = [text_row(line, text, "a.jsonl" if line < 4 else "b.jsonl") for line, text in enumerate(texts, 1)]
    assert closed(*rows).notes["duplicates"] == Note(
        3,
        [
            f"{a}: the same as {b}"
            for a, b in [("a.jsonl:3", "a.jsonl:1"), ("b.jsonl:5", "a.jsonl:3"), ("b.jsonl:6", "a.jsonl:2")]
        ],
    )
    assert closed(*rows[:2]).notes == {}


def test_rows_of_the_training_data_in_the_validation_data_are_noted() -> None:
    training = closed(*(text_row(line, str(line)) for line in range(1, 30)))
    validation = closed(*(text_row(line, str(line + 20), "v.jsonl") for line in range(1, 30)))
    validation.note_overlap(training)
    note = validation.notes["overlap"]
    assert note.count == 9 and note.examples[0] == "v.jsonl:1: also at a.jsonl:21" and len(note.examples) == 5


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("nul \x00", "U+0000"), ("bell \x07", "U+0007"), ("backspace \b", "U+0008"), ("feed \f", "U+000C"),
        ("escape \x1b[31m", "U+001B"), ("delete \x7f", "U+007F"), ("lost \ufffd", "U+FFFD"),
        ("zero\u200bwidth", "U+200B"),
        ("a\u2028b", "U+2028"), ("bidi \u202e", "U+202E"), ("mark \ufeff", "U+FEFF"), ("private \ue000", "U+E000"),
        ("tag \U000e0041", "U+E0041"), ("none \uffff", "U+FFFF"),
    ],
)  # fmt: skip
def test_unusual_characters_are_noted(text: str, found: str) -> None:
    assert closed(text_row(7, text)).notes == {"unusual characters": Note(1, [f"a.jsonl:7: {found}"])}


@pytest.mark.parametrize(
    "text",
    ["plain", "Привіт,\nсвіте\r\n\t", "a\xa0b", "👩\u200d🔬", "C:\\bin \\f \\u0041", "soft\xadhyphen", "日本語", "نص"],
)
def test_usual_characters_are_not(text: str) -> None:
    assert closed(text_row(1, text)).notes == {}


def test_unbalanced_labels_and_missing_answers_are_noted() -> None:
    rows = [Row("a", n, "classification", {"text": str(n), "label": int(n == 1)}) for n in range(1, 12)]
    assert closed(*rows).notes == {"unbalanced labels": Note(2, ["0: 10 rows", "1: 1 rows"])}
    assert closed(*rows[:10]).notes == {}
    many = [Row("a", n, "classification", {"text": str(n), "label": f"{n % 2000}"}) for n in range(1, 2011)]
    assert closed(*many).notes == {}
    answers = {"text": list[str](), "answer_start": list[int]()}
    question = Row("a", 3, "question", {"question": "q", "context": "c", "answers": answers})
    assert closed(question).notes == {"empty answers": Note(1, ["a:3"])}


def test_the_ledger_survives_its_file() -> None:
    ledger = closed(text_row(1, "x"), text_row(2, "x"))
    list(ledger.take([Reject("б\u2028.jsonl", 9, "причина")]))
    text = ledger.to_json_lines()
    assert [json.loads(line) for line in text.split("\n")[:-1]] == [
        {
            "rows_in": 3,
            "rows_trained": 2,
            "rejected": 1,
            "notes": {"duplicates": {"count": 1, "examples": ["a.jsonl:2: the same as a.jsonl:1"]}},
        },
        {"source": "б\u2028.jsonl", "line": 9, "reason": "причина"},
    ]
    again = Ledger.from_json_lines(text)
    assert again.to_json_lines() == text
    again.close()


keys = st.sampled_from(["prompt", "completion", "text", "messages", "tools", "role", "content", "id"]) | st.text()
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(keys, values | st.text(min_size=1), max_size=4)
odd = st.sampled_from(
    [
        *(b"\x00", b"\xef\xbb\xbf" + GOOD.encode(), b"\xff\xfe", b"  \t", GOOD.encode() + b"\r", GOOD.encode()[:20]),
        *(
            b'{"prompt": "a", "prompt": "b"}',
            b'{"text": "\\ud800"}',
            b'{"prompt": NaN, "completion": "b"}',
            b"[" * 2000,
        ),
    ]
)
lines = st.lists(objects.map(json.dumps).map(str.encode) | st.binary() | odd | st.just(GOOD.encode()), max_size=6)


@given(lines=lines)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzzed_json_lines_keep_the_identity(tmp_path: Path, lines: list[bytes]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([GOOD.encode(), *lines]))
    filled = [n for n, line in enumerate(file.read_bytes().split(b"\n"), 1) if line.strip()]
    ledger, read = Ledger(), list[int]()
    for row in ledger.take(iter_rows(file)):
        read.append(row.line)
        assert row.kind == "prompt_completion" and row.value["completion"].strip()
        ledger.train()
    ledger.close()
    assert ledger.rows_in == len(filled)
    assert sorted(read + [reject.line for reject in ledger.rejects]) == filled
    assert Ledger.from_json_lines(ledger.to_json_lines()).rejects == ledger.rejects
