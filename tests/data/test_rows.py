"""Every line of a file is a row or an error that names file, line and reason."""

import gzip
import hashlib
from pathlib import Path

import pytest

from loratune.data.rows import read_rows, write_rows
from loratune.errors import ConfigError, DataError

GOOD = '{"prompt": "Яка столиця?", "completion": " Київ"}'
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def write(path: Path, *lines: str | bytes) -> Path:
    file = path / "rows.jsonl"
    file.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return file


def test_three_formats_keep_their_values_and_lines(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "", GOOD, "   \r", GOOD + "\r"))
    assert [(row.line, row.kind) for row in rows] == [(2, "prompt_completion"), (4, "prompt_completion")]
    assert rows[0].value == {"prompt": "Яка столиця?", "completion": " Київ"}
    assert rows[0].where == f"{tmp_path}/rows.jsonl:2"
    assert read_rows(write(tmp_path, CHAT))[0].value["messages"][1] == {"role": "assistant", "content": "b"}
    assert read_rows(write(tmp_path, '{"text": "t", "id": 7}'))[0].value == {"text": "t"}


def test_a_byte_order_mark_is_tolerated_at_the_start_only(tmp_path: Path) -> None:
    assert len(read_rows(write(tmp_path, b"\xef\xbb\xbf" + GOOD.encode(), GOOD))) == 2
    with pytest.raises(DataError, match=r"rows.jsonl:2: not valid JSON at column 1"):
        read_rows(write(tmp_path, GOOD, b"\xef\xbb\xbf" + GOOD.encode()))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            '{"prompt": "a", "completion": "b"',
            "not valid JSON at column 34: Expecting ',' delimiter; expected one object",
        ),
        ("[1, 2]", r"the row is a list, \[1, 2\]; expected one JSON object a line"),
        ('"text"', 'the row is a string, "text"; expected'),
        ('{"text": NaN}', "NaN is not JSON"),
        ('{"text": "a", "id": -Infinity}', "-Infinity is not JSON"),
        ('{"text": "a", "text": "b"}', "the key 'text' stands twice"),
        (
            '{"question": "a"}',
            r"a prompt_completion row needs 'prompt' and 'completion'\.",
        ),
        ('{"prompts": "a", "completion": "b"}', "Did you mean 'prompt' by 'prompts'?"),
        ("{}", "a prompt_completion row needs 'prompt' and 'completion'"),
        ('{"prompt": "a", "completion": "b", "text": "c"}', "unknown key 'text' in a prompt_completion row"),
        ('{"text": "a", "source": "b"}', "this row is text, but the file's rows are prompt_completion; use one format"),
        ('{"prompt": "a", "completion": 1e999}', "1e999 is beyond the range of a number"),
        ('{"prompt": "a", "completion": "b", "' + "k" * 1000 + '": 1}', "unknown key 'kkk"),
        ('{"prompt": ["a"], "completion": "b"}', "message 1 of the prompt is a string"),
        ('{"prompt": "a", "completion": "b", "system": "c"}', "unknown key 'system' in a prompt_completion row"),
        ('{"prompt": 1, "completion": "b"}', "prompt is a number, 1; expected a string"),
        ('{"prompt": "a", "completion": null}', "completion is null, null; expected a string"),
        ('{"prompt": "a", "completion": " \\n"}', "completion is empty"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ('{"text": "a' + "\t" + 'b"}', "Invalid control character"),
        (CHAT, "this row is messages, but the file's rows are prompt_completion"),
        ('{"text": ' + "9" * 5000 + "}", "not valid JSON: Exceeds the limit"),
        ("[" * 100_000, "nested too deeply"),
        ('{"messages": ' + "[" * 900 + "]" * 900 + "}", "nested more than 64 levels"),
    ],
)
def test_a_bad_line_stops_with_file_line_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    file = write(tmp_path, GOOD, "", line)
    with pytest.raises(DataError, match=rf"^{file}:3: .*{reason}") as caught:
        read_rows(file)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": "hello"}', 'messages is a string, "hello"; expected a list'),
        ('{"messages": []}', "messages is an empty list"),
        ('{"messages": [3]}', "message 1 is a number, 3; expected an object"),
        ('{"messages": [{"role": "user"}]}', "message 1 has the keys 'role'; expected role and content"),
        ('{"messages": [{"role": "usr", "content": "a"}]}', r"message 1 has the role 'usr'; .* Did you mean 'user'?"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "message 1 has the role"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message is from the assistant"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "is from assistant; expected user"),
        (CHAT.replace('"b"', '""'), r"message 2 \(assistant\) is empty"),
        (CHAT.replace('"a"', '["a"]'), r"message 1 \(user\) is a list"),
        (CHAT[:-1] + ', "tools": [1]}', "tool 1 is a number, 1; expected an object"),
        ('{"messages": "[1"}', "messages is a string that is not JSON: not valid JSON at column 3"),
        (CHAT.replace('"b"', "null"), r"message 2 \(assistant\) is null"),
        (CHAT.replace('"b"', '"b", "train": "no"'), "has train: 'no'; expected true or false"),
        (CHAT.replace('"b"', '"b", "weight": 0.5'), r"has the weight 0.5; expected 0 \(not trained on\) or 1"),
        (CHAT.replace('"b"', '"b", "weight": 1, "train": true'), "has both train and weight"),
        (CHAT.replace('"b"', '"b", "train": false'), "every assistant's message has train: false"),
        (CHAT.replace('"b"', '"b", "loss": 1'), r"'loss'; expected role and content \(and tool_calls, train, weight\)"),
        (CHAT.replace('"a"', '"a", "weight": 1'), r"message 1 has the keys .*; expected role and content\."),
        (CHAT.replace('"b"', 'null, "tool_calls": [{"id": "1"}]'), "call 1 has no name of a function"),
        (
            CHAT.replace('"b"', 'null, "tool_calls": [{"name": "f", "arguments": "{x"}]'),
            "call 1: arguments is a string that is not JSON",
        ),
        (CHAT.replace('"a"', '[{"type": "image_url", "image_url": "x"}]'), "a part of the type 'image_url'; only text"),
    ],
)
def test_a_bad_conversation_stops_with_file_line_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl:2: .*{reason}") as caught:
        read_rows(write(tmp_path, CHAT, line))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "content",
    [gzip.compress(GOOD.encode(), mtime=0), GOOD.encode("utf-16"), GOOD.encode("cp1251")],
    ids=["gzip", "utf-16", "cp1251"],
)
def test_a_file_that_is_not_utf8_is_refused_at_its_line(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: byte \d+ of the line, 0x.., is not UTF-8"):
        read_rows(write(tmp_path, content))


def test_empty_missing_and_unknown(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        read_rows(write(tmp_path, "", "  "))
    with pytest.raises(ConfigError, match="No such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="unknown data format 'alpacca'; expected one of prompt_completion"):
        read_rows(write(tmp_path, GOOD), format="alpacca")


def test_a_named_format_settles_an_ambiguous_row(tmp_path: Path) -> None:
    file = write(tmp_path, '{"prompt": "a", "completion": "b", "text": "c"}')
    assert read_rows(file, format="text")[0].value == {"text": "c"}
    with pytest.raises(DataError, match=r":1: a messages row needs 'messages'"):
        read_rows(file, format="messages")


def test_the_hasher_sees_the_bytes_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, b"\xef\xbb\xbf" + GOOD.encode(), "", GOOD + "\r\n")
    state = hashlib.sha256()
    read_rows(file, hasher=state)
    assert state.hexdigest() == hashlib.sha256(file.read_bytes()).hexdigest()


def test_rows_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, GOOD, GOOD.replace("Київ", "Львів")))
    assert write_rows(tmp_path / "same.jsonl", rows) == 2
    assert (tmp_path / "same.jsonl").read_text("utf-8").splitlines()[0] == GOOD
    write_rows(tmp_path / "chat.jsonl", rows, "messages")
    assert read_rows(tmp_path / "chat.jsonl")[1].value["messages"] == [
        {"role": "user", "content": "Яка столиця?"},
        {"role": "assistant", "content": " Львів"},
    ]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"rows.jsonl:1: a prompt_completion row cannot be written as text"):
        write_rows(tmp_path / "text.jsonl", rows, "text")
    with pytest.raises(ConfigError, match="expected one of messages, prompt_completion, text"):
        write_rows(tmp_path / "text.jsonl", rows, "alpaca")
    with pytest.raises(ConfigError, match=r"same.jsonl: it exists already"):
        write_rows(tmp_path / "same.jsonl", rows)
    with pytest.raises(ConfigError, match=r"it does not end with .jsonl"):
        write_rows(tmp_path / "same.csv", rows)
    assert sorted(tmp_path.iterdir()) == before
