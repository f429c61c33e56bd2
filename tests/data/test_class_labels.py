"""Parquet and Arrow files whose schema names the numbers of labels, as the `datasets` library writes it."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from loratune.data.rows import Row, iter_rows
from loratune.errors import ConfigError, DataError
from loratune.tasks.labels import find_classes, find_tags

NAMES = {"names": ["neg", "pos", "odd"], "_type": "ClassLabel"}
TAGS = {"names": ["O", "B-PER"], "_type": "ClassLabel"}
VALUE = {"dtype": "string", "_type": "Value"}


def save(path: Path, rows: list[dict[str, Any]], features: Any) -> Path:
    content = features if isinstance(features, bytes) else json.dumps({"info": {"features": features}}).encode()
    table = pa.Table.from_pylist(rows).replace_schema_metadata({b"huggingface": content})
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
        return path
    with ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    return path


def read(path: Path) -> list[Row]:
    rows = list(iter_rows(path))
    assert all(isinstance(row, Row) for row in rows)
    return [row for row in rows if isinstance(row, Row)]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_labels_have_their_names(name: str, tmp_path: Path) -> None:
    rows = [{"text": f"t{k}", "label": k % 2} for k in range(6)]
    path = save(tmp_path / name, rows, {"text": VALUE, "label": NAMES})
    assert [row.value["label"] for row in read(path)] == ["neg", "pos"] * 3
    assert find_classes(iter(read(path)), name).names == ("neg", "pos")


@pytest.mark.parametrize("kind", ["Sequence", "List"])
def test_tags_in_lists_have_their_names(kind: str, tmp_path: Path) -> None:
    rows = [{"tokens": ["anna", "went"], "ner_tags": [1, 0]}]
    features = {"tokens": {"feature": VALUE, "_type": kind}, "ner_tags": {"feature": TAGS, "_type": kind}}
    read_back = read(save(tmp_path / "rows.parquet", rows, features))
    assert read_back[0].value["tags"] == ["B-PER", "O"]
    assert find_tags(iter(read_back), "rows.parquet").names == ("O", "B-PER")


def test_a_row_without_a_label_is_named(tmp_path: Path) -> None:
    """Test splits have -1."""
    path = save(tmp_path / "rows.parquet", [{"text": "a", "label": 0}, {"text": "b", "label": -1}], {"label": NAMES})
    with pytest.raises(DataError, match=r"rows.parquet:2: the label is '-1', but .*rows.parquet:1 has a text"):
        find_classes(iter(read(path)), "rows.parquet")


@pytest.mark.parametrize("features", [None, {"label": VALUE}, {"label": None}, [], {"label": {"feature": {}}}])
def test_other_features_change_nothing(features: Any, tmp_path: Path) -> None:
    path = save(tmp_path / "rows.parquet", [{"text": "a", "label": 1}], features)
    assert [row.value["label"] for row in read(path)] == [1]


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_broken_features_are_refused(content: bytes, tmp_path: Path) -> None:
    path = save(tmp_path / "rows.parquet", [{"text": "a", "label": 1}], content)
    with pytest.raises(ConfigError, match=r"cannot read .*rows.parquet as a .parquet file"):
        read(path)
