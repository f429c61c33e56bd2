"""Every line of a file is a row or an error that names file, line and reason."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratune.data.rows import FORMATS, read_rows
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
            "unknown format: found the keys 'question'; expected prompt and completion, or messages, or",
        ),
        ('{"prompts": "a", "completion": "b"}', "Did you mean 'prompt' by 'prompts'?"),
        ("{}", "unknown format: found the keys none"),
        ('{"prompt": "a", "completion": "b", "text": "c"}', "fit two formats, prompt_completion and text"),
        ('{"prompt": "a", "completion": "b", "system": "c"}', "unknown key 'system' in a prompt_completion row"),
        ('{"prompt": 1, "completion": "b"}', "prompt is a number, 1; expected a string"),
        ('{"prompt": "a", "completion": null}', "completion is null, null; expected a string"),
        ('{"prompt": "a", "completion": " \\n"}', "completion is empty"),
        ('{"text": ""}', "text is empty"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ('{"text": "a' + "\t" + 'b"}', "Invalid control character"),
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
        (CHAT, "this row is messages, but line 1 is prompt_completion"),
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
    "content",
    [gzip.compress(GOOD.encode()), GOOD.encode("utf-16"), GOOD.encode("cp1251")],
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
    with pytest.raises(ConfigError, match="Is a directory"):
        read_rows(tmp_path)
    with pytest.raises(ConfigError, match="unknown data format 'alpaca'; expected one of prompt_completion"):
        read_rows(write(tmp_path, GOOD), format="alpaca")


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


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)
keys = st.sampled_from(["prompt", "completion", "text", "messages", "tools", "role", "content", "id"]) | st.text()
objects = st.dictionaries(keys, values | st.text(min_size=1), max_size=4)


@given(lines=st.lists(objects.map(json.dumps) | st.text() | st.binary() | st.just(GOOD), max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_rows_or_one_located_error(tmp_path: Path, lines: list[str | bytes]) -> None:
    encoded = [line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass") for line in lines]
    file = write(tmp_path, *encoded)
    content = file.read_bytes().split(b"\n")
    try:
        rows = read_rows(file)
    except DataError as error:
        assert str(error).startswith(str(file))
    else:
        filled = [n for n, line in enumerate(content, 1) if line.removeprefix(b"\xef\xbb\xbf").strip()]
        assert [row.line for row in rows] == filled
        assert all(set(FORMATS[row.kind].required) <= row.value.keys() for row in rows)
