"""The same rows come out of every file type; samples, folders and digests are stable."""

import csv
import gzip
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from loratune.data.rows import read_rows
from loratune.data.sources import digest, read_records
from loratune.errors import ConfigError, DataError

ROWS = [{"prompt": f'Питання {i},\n"{i}"', "completion": f"так\t{i}"} for i in range(700)]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": True}]},
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "c"},
        ]
    },
]


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    kind = path.name.split(".", 1)[1]
    if kind in ("parquet", "arrow", "stream.arrow"):
        table = pa.Table.from_pylist(rows)
        if kind == "parquet":
            parquet.write_table(table, path, row_group_size=100)
            return path
        opened = ipc.new_file if kind == "arrow" else ipc.new_stream
        with opened(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
        return path
    if "json" in kind:
        spelled = json.dumps(rows, indent=2 if "pretty" in path.name else None)
        text = spelled if kind.startswith("json.") or kind == "json" else "\n".join(map(json.dumps, rows)) + "\n"
    else:
        text = table_text(rows, "," if kind.startswith("csv") else "\t")
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def table_text(rows: list[dict[str, Any]], delimiter: str) -> str:
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows({key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} for row in rows)
    return out.getvalue()


KINDS = [
    *("a.jsonl", "a.ndjson", "a.json", "pretty.json", "a.csv", "a.tsv"),
    *("a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.tsv.gz", "a.parquet", "a.arrow", "a.stream.arrow"),
]


@pytest.mark.parametrize("name", KINDS)
def test_every_file_type_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    read = read_rows(save(tmp_path / name, ROWS))
    assert [row.value for row in read] == ROWS
    lines = [row.line for row in read]
    assert len(set(lines)) == len(ROWS) and lines == sorted(lines)
    if ".csv" not in name and ".tsv" not in name:
        assert lines == list(range(1, 701))


@pytest.mark.parametrize("name", KINDS)
def test_every_file_type_holds_conversations(tmp_path: Path, name: str) -> None:
    assert [row.value for row in read_rows(save(tmp_path / name, CHATS))] == [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        CHATS[1],
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_field_that_arrow_made_up_is_not_there(tmp_path: Path, name: str) -> None:
    schemas = [{"city": {"type": "string"}}, {"day": {"type": "number", "minimum": 1}}]
    rows = [CHATS[0] | {"tools": [{"name": "f", "parameters": schema}]} for schema in schemas]
    read = read_rows(save(tmp_path / name, rows))
    assert [row.value["tools"][0]["parameters"] for row in read] == schemas


def test_a_csv_row_stands_where_its_first_line_stands(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(
        b'\xef\xbb\xbftext,label\r\n"two\r\nlines",1\r\n\r\nc,2,3\r\n"un"quoted,1\r\nd,\xff\r\ne,4\r\n"open,5\r\nend'
    )
    records = list(read_records(file))
    assert [record.line for record in records] == [2, 5, 6, 7, 8, 9]
    assert records[0].value == {"text": "two\r\nlines", "label": "1"}
    assert records[4].value == {"text": "e", "label": "4"}
    reasons = ["3 cells, the header 2", "not valid CSV", "byte 3 of the line, 0xff", "the row goes on to line 10"]
    for record, reason in zip([records[1], records[2], records[3], records[5]], reasons, strict=True):
        assert isinstance(record.value, DataError) and reason in str(record.value)


@pytest.mark.parametrize(
    ("header", "reason"),
    [("a,b,a", "the column 'a' stands twice"), ("text;label", "it is one column, 'text;label'; .* not ';'")],
)
def test_a_header_that_cannot_be_is_one_record(tmp_path: Path, header: str, reason: str) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\n1,2,3\n4,5,6\n")
    (record,) = read_records(tmp_path / "a.csv")
    with pytest.raises(DataError, match=f"the header cannot be read, so no row can: {reason}"):
        raise record.value if isinstance(record.value, DataError) else AssertionError(record)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("mark", ["", "#50"])
def test_the_digest_is_that_of_the_bytes(tmp_path: Path, name: str, mark: str) -> None:
    file = save(tmp_path / name, ROWS)
    state = hashlib.sha256()
    assert len(list(read_records(f"{file}{mark}", state))) == (50 if mark else 700)
    expected = hashlib.sha256(file.read_bytes() + mark.encode()).hexdigest()
    assert state.hexdigest() == expected == digest(f"{file}{mark}")


def test_a_sample_is_stable_and_in_the_order_of_the_file(tmp_path: Path) -> None:
    file = save(tmp_path / "a.jsonl", ROWS)
    sample = [record.line for record in read_records(f"{file}#100")]
    assert sample == sorted(sample) and len(sample) == 100 and max(sample) > 500
    values = {record.value["prompt"] for record in read_records(f"{file}#100") if isinstance(record.value, dict)}
    more = save(tmp_path / "more.jsonl", [{"prompt": "new", "completion": str(i)} for i in range(70)] + ROWS)
    later = {record.value["prompt"] for record in read_records(f"{more}#100") if isinstance(record.value, dict)}
    assert len(values & later) >= 80  # 770 rows: each old row stays with probability 700/770
    assert len(list(read_records(f"{file}#9000"))) == 700


def test_a_file_whose_name_has_a_number_sign_is_that_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl#3"
    with pytest.raises(ConfigError, match="No such file"):
        list(read_records(file))
    save(tmp_path / "a#3.jsonl", ROWS[:2])
    assert len(list(read_records(tmp_path / "a#3.jsonl"))) == 2
    with pytest.raises(ConfigError, match=r"expected a number of rows after '#', such as .*a#500; found '3x.jsonl'"):
        list(read_records(tmp_path / "a#3x.jsonl"))


def test_a_folder_is_its_splits(tmp_path: Path) -> None:
    for shard in (0, 1):
        save(tmp_path / f"train-0000{shard}-of-00002.parquet", ROWS[shard * 10 : shard * 10 + 10])
    save(tmp_path / "dev.jsonl", ROWS[:3])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "dataset_info.json").write_text("{}")
    train = list(read_records(tmp_path))
    assert [record.value for record in train] == ROWS[:20]
    assert train[12].source.endswith("train-00001-of-00002.parquet") and train[12].line == 3
    assert train == list(read_records(tmp_path / "train"))
    assert len(list(read_records(tmp_path / "validation"))) == 3
    assert len(list(read_records(f"{tmp_path}/validation#2"))) == 2
    with pytest.raises(ConfigError, match="a folder without test data: found validation and train files"):
        list(read_records(tmp_path / "test"))
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(ConfigError, match="1 of 2 train shards are there"):
        list(read_records(tmp_path))
    save(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"train-00001-of-00002.parquet, train.jsonl are all train data; keep one"):
        list(read_records(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"x", r"the name does not say what kind of file it is; expected it to end with .jsonl"),
        ("a.parquet.gz", b"x", "the name does not say"),
        ("a.parquet", b"PAR1 no", "cannot read .*a.parquet as a .parquet file"),
        ("a.arrow", b"ARROW1 no", "cannot read .*a.arrow as a .arrow file"),
        ("a.arrow", b"", "cannot read .*a.arrow as a .arrow file"),
        ("a.parquet", b"", "cannot read .*a.parquet as a .parquet file"),
    ],
)
def test_a_file_that_cannot_be_opened_is_a_config_error(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        list(read_records(tmp_path / name))
    with pytest.raises(ConfigError, match="No such file or directory"):
        list(read_records(tmp_path / "none" / "a.parquet"))


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="the column 'a' stands twice"):
        list(read_records(tmp_path / "a.parquet"))


def test_an_arrow_value_that_python_cannot_hold_spoils_its_row_only(tmp_path: Path) -> None:
    far = pa.array([1, 10**15, 3], pa.timestamp("ms"))
    parquet.write_table(pa.table({"text": ["a", "b", "c"], "when": far}), tmp_path / "a.parquet")
    values = [record.value for record in read_records(tmp_path / "a.parquet")]
    assert [isinstance(value, DataError) for value in values] == [False, True, False]


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the datasets library is installed")
def test_the_hub_needs_its_extra() -> None:
    with pytest.raises(ConfigError, match=r"hub:org/name: .* pip install 'loratune\[datasets\]'"):
        list(read_records("hub:org/name"))


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the datasets library")
def test_the_hub_gives_the_rows_of_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    save(tmp_path / "set" / "train.jsonl", ROWS)
    save(tmp_path / "set" / "test.jsonl", ROWS[:5])
    assert [record.value for record in read_records("hub:./set")] == ROWS
    records = list(read_records("hub:./set:test"))
    assert [record.value for record in records] == ROWS[:5]
    assert (records[4].source, records[4].line) == ("hub:./set:test", 5)
    with pytest.raises(ConfigError, match=r"hub:./set:none: cannot be loaded from the hub: Unknown split"):
        list(read_records("hub:./set:none"))
    with pytest.raises(ConfigError, match="expected hub:NAME, hub:NAME:SPLIT"):
        list(read_records("hub:a:b:c:d"))
