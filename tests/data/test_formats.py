"""Each format in a golden file; how a format is found, and what is said where it is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from loratune.data.formats import FORMATS, KINDS
from loratune.data.layouts import find_layout
from loratune.data.rows import Reject, detect, iter_rows, read_rows
from loratune.errors import ConfigError, DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "formats"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.jsonl"))


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@pytest.mark.parametrize("name", NAMES)
def test_golden_rows(name: str) -> None:
    expected = json.loads((GOLDEN / f"{name}.expected.json").read_text("utf-8"))
    layout = detect(GOLDEN / f"{name}.jsonl")
    assert layout is not None and layout.name == expected["format"]
    rows = read_rows(GOLDEN / f"{name}.jsonl")
    assert [{"kind": row.kind, "value": row.value} for row in rows] == expected["rows"]


def test_every_format_and_kind_has_a_golden_file() -> None:
    golden = [json.loads((GOLDEN / f"{name}.expected.json").read_text("utf-8")) for name in NAMES]
    assert {each["format"] for each in golden} == FORMATS.keys()
    assert {row["kind"] for each in golden for row in each["rows"]} == set(KINDS)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ("instruction input output", "alpaca"),
        ("instruction output", "alpaca"),
        ("instruction response", "prompt_completion"),
        ("input target", "prompt_completion"),
        ("query response", "prompt_completion"),
        ("problem solution", "prompt_completion"),
        ("prompt completion source", "prompt_completion"),
        ("question context answers id", "question"),
        ("question context answer", "question"),
        ("text label", "classification"),
        ("text source", "text"),
        ("source target", "source_target"),
        ("src tgt", "source_target"),
        ("sentence1 sentence2 label idx", "pair"),
        ("anchor positive", "pair"),
        ("words labels", "tagging"),
        ("conversations system tools", "sharegpt"),
    ],
)
def test_the_format_that_uses_most_of_the_row_wins(keys: str, name: str) -> None:
    assert find_layout(dict.fromkeys(keys.split())).name == name


@pytest.mark.parametrize(
    ("keys", "error", "reason"),
    [
        ("prompt completion text", ConfigError, "fit 2 formats: prompt_completion, text. Name the format"),
        ("instruction input output text", ConfigError, "fit 2 formats: alpaca, text"),
        ("messages prompt completion", ConfigError, "fit 2 formats: prompt_completion, messages"),
        (
            "input question answer",
            ConfigError,
            r"'input' and 'question' may each be it. Say which, as columns: {prompt",
        ),
        ("tokens pos_tags ner_tags", ConfigError, "tagging rows have one tags, but 'ner_tags' and 'pos_tags' may each"),
        (
            "prompt chosen rejected",
            DataError,
            "unknown format: found the keys 'prompt', 'chosen', 'rejected'; expected",
        ),
        ("prompts completion", DataError, "Did you mean 'prompt' by 'prompts'?"),
        ("", DataError, "found the keys none"),
    ],
)
def test_what_fits_no_format_or_several_is_refused(keys: str, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        find_layout(dict.fromkeys(keys.split()))


def test_a_file_that_fits_two_formats_is_refused_with_the_candidates(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "a", "completion": "b", "text": "c"})
    with pytest.raises(ConfigError, match=rf"^{file}:1: the keys 'prompt', 'completion', 'text' fit 2 formats"):
        iter_rows(file)
    assert read_rows(file, format="text")[0].value == {"text": "c"}
    assert read_rows(file, format="prompt_completion")[0].value == {"prompt": "a", "completion": "b"}


def test_a_mapping_names_the_columns_and_leaves_the_others_out(tmp_path: Path) -> None:
    file = write(tmp_path, {"question_text": "a", "reply": "b", "answer": "c", "difficulty": 3})
    (row,) = iter_rows(file, columns={"prompt": "question_text", "completion": "reply"})
    assert not isinstance(row, Reject) and row.value == {"prompt": "a", "completion": "b"}
    (row,) = iter_rows(file, columns={"prompt": "question_text"})  # the answer is found by its name
    assert not isinstance(row, Reject) and row.value == {"prompt": "a", "completion": "c"}
    (row,) = iter_rows(file, columns={"text": "reply"})
    assert not isinstance(row, Reject) and row.value == {"text": "b"}
    (row,) = iter_rows(file, "alpaca", {"instruction": "question_text", "output": "reply", "input": "answer"})
    assert not isinstance(row, Reject) and row.value["messages"][0]["content"] == "a\n\nc"


@pytest.mark.parametrize(
    ("format", "columns", "error", "reason"),
    [
        (None, {"promt": "a"}, ConfigError, "every format lacks a column 'promt'. Did you mean 'prompt'?"),
        ("text", {"prompt": "a"}, ConfigError, "text lacks a column 'prompt'. Expected text."),
        (
            None,
            {"prompt": "question", "completion": "b"},
            DataError,
            "'question' is not there: found the keys 'a', 'b'",
        ),
        (None, {"text": "aa"}, DataError, "'aa' is not there: .* Did you mean 'a' by 'aa'?"),
        ("messages", {}, DataError, "a messages row needs 'messages'."),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(
    tmp_path: Path, format: str | None, columns: dict[str, str], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        iter_rows(write(tmp_path, {"a": "x", "b": "y"}), format, columns)


def test_an_unknown_key_in_every_row_stops_at_once_in_one_row_is_a_reject(tmp_path: Path) -> None:
    good, odd = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "sytem": "c"}
    file = write(tmp_path, odd, odd)
    with pytest.raises(DataError, match=rf"^{file}:1: unknown key 'sytem' in a prompt_completion row"):
        iter_rows(file)
    rejects = [row for row in iter_rows(write(tmp_path, odd, good, odd)) if isinstance(row, Reject)]
    assert [reject.line for reject in rejects] == [1, 3]


def test_rows_of_two_kinds_do_not_mix(tmp_path: Path) -> None:
    lists = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    row, reject = iter_rows(write(tmp_path, {"prompt": "a", "completion": "b"}, lists))
    assert not isinstance(row, Reject) and row.kind == "prompt_completion"
    assert isinstance(reject, Reject) and "this row is messages, but" in reject.reason


SQUAD = {"question": "Where?", "context": "In Kyiv."}


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        ({"text": "a", "label": 1}, {"text": "a", "label": None}, "label is null, null; expected a label"),
        ({"text": "a", "label": 1}, {"text": "a", "label": ""}, "label is empty"),
        ({"text": "a", "label": 1}, {"text": " ", "label": 1}, "text is empty"),
        ({"tokens": ["a"], "tags": [0]}, {"tokens": ["a", "b"], "tags": [0]}, "has 2 tokens and 1 tags"),
        ({"tokens": ["a"], "tags": [0]}, {"tokens": [], "tags": []}, "has 0 tokens and 0 tags; expected as many"),
        ({"tokens": ["a"], "tags": [0]}, {"tokens": [""], "tags": [0]}, "token 1 is empty"),
        (SQUAD | {"answers": "Kyiv"}, SQUAD | {"answers": "Lviv"}, "the answer 'Lviv' does not stand in the context"),
        (
            SQUAD | {"answers": "Kyiv"},
            SQUAD | {"answers": {"text": ["Kyiv"], "answer_start": [2]}},
            "the answer 'Kyiv' does not stand at character 2",
        ),
        (
            SQUAD | {"answers": "Kyiv"},
            SQUAD | {"answers": {"text": ["Kyiv"], "answer_start": [-5]}},
            "must hold one position",
        ),
        (
            {"sentence1": "a", "sentence2": "b", "score": 1},
            {"sentence1": "a", "sentence2": "b", "score": "x"},
            "finite",
        ),
        ({"source": "a", "target": "b"}, {"source": "a", "target": ""}, "target is empty"),
        ({"text": "a"}, {"text": ""}, "text is empty, so nothing could be learnt from it"),
        (
            {"instruction": "a", "output": "b"},
            {"instruction": "", "input": " ", "output": "b"},
            "instruction and input are both empty",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"conversations": [{"from": "gpt", "value": "a"}]},
            "is from assistant; expected user",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"conversations": [{"from": "alien", "value": "a"}]},
            "message 1 has the role 'alien'",
        ),
    ],
)
def test_a_bad_value_is_a_reject(tmp_path: Path, good: dict[str, Any], bad: dict[str, Any], reason: str) -> None:
    _, reject = iter_rows(write(tmp_path, good, bad))
    assert isinstance(reject, Reject) and reject.line == 2 and reason in reject.reason
