"""Hostile files end in located errors, in bounded memory, and never in a crash."""

import gzip
import io
import json
import random
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from loratune.data.ledger import Ledger
from loratune.data.rows import Reject, Row, iter_rows
from loratune.errors import ConfigError, DataError

GOOD = '{"prompt": "a", "completion": "b"}'


def items(path: Path) -> list[Row | Reject]:
    """The rows of a file, the ledger's identity checked."""
    ledger, found = Ledger(), list(iter_rows(path))
    for _ in ledger.take(found):
        ledger.train()
    ledger.close()
    return found


def rejects(path: Path) -> list[tuple[int, str]]:
    return [(item.line, item.reason) for item in items(path) if isinstance(item, Reject)]


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_each_kind_of_broken_line_is_one_reject_with_its_line(tmp_path: Path) -> None:
    bad = {
        b"\x00\x00\x00": "not valid JSON at column 1",
        GOOD.encode("utf-16"): "is not UTF-8",
        b'{"prompt": "\xed\xa0\x80", "completion": "b"}': "byte 13 of the line, 0xed, is not UTF-8",
        b'{"prompt": "\\udc00", "completion": "b"}': "half of a surrogate pair",
        b'{"id": "\\udc00", "prompt": "a", "completion": "b"}': "half of a surrogate pair",
        b'{"prompt": "a", "prompt": "a", "completion": "b"}': "the key 'prompt' stands twice",
        b'{"prompt": "a", "completion": "b", "id": {"x": 1, "x": 2}}': "the key 'x' stands twice",
        b'{"prompt": "a", "completion": "b", "id": Infinity}': "Infinity is not JSON",
        b'{"prompt": "a", "completion": "b", "id": ' + b"[" * 65 + b"]" * 65 + b"}": "nested more than 64 levels",
        b"[" * 1_000_000: "nested too deeply",
        b'{"a":' * 100_000: "nested too deeply",
        b'{"prompt": "a", "completion": "b"} {}': "Extra data",
        b'{"prompt": "a", "completion": "b"}\r' + GOOD.encode(): "Extra data",
        b'{"prompt": "a", "completion": "b", "id": ' + b"9" * 5000 + b"}": "Exceeds the limit",
        b"\xef\xbb\xbf" + GOOD.encode(): "not valid JSON at column 1",
    }
    file = write(tmp_path / "a.jsonl", *(line for each in bad for line in (GOOD, each.replace(b"\n", b""))))
    found = rejects(file)
    assert [line for line, _ in found] == list(range(2, 2 * len(bad) + 1, 2))
    for (_, reason), expected in zip(found, bad.values(), strict=True):
        assert expected in reason and len(reason) < 400


def test_line_separators_of_unicode_do_not_split_a_line(tmp_path: Path) -> None:
    lines = ['{"text": "a\u2028b\u2029c\u0085d"}', '{"text": "e"}']
    rows = items(write(tmp_path / "a.jsonl", "\r\n".join(lines)))
    assert [(row.line, row.value["text"]) for row in rows if isinstance(row, Row)] == [
        (1, "a\u2028b\u2029c\x85d"),
        (2, "e"),
    ]
    rows = items(write(tmp_path / "a.csv", "text", "a\u2028b\x85", "c"))
    assert [row.value["text"] for row in rows if isinstance(row, Row)] == ["a\u2028b\x85", "c"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_cut_gzip_gives_its_rows_and_one_last_reject(tmp_path: Path, name: str) -> None:
    noise = random.Random(0)
    rows = [{"prompt": str(n), "completion": noise.randbytes(50).hex()} for n in range(20_000)]
    text = {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "a.json": json.dumps(rows),
        "a.csv": "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows),
    }[name]
    whole = gzip.compress(text.encode())
    file = tmp_path / f"{name}.gz"
    file.write_bytes(whole[: len(whole) // 2])
    *good, last = items(file)
    readable = zlib.decompressobj(31).decompress(file.read_bytes()).decode()
    complete = readable.count("}") if name == "a.json" else readable.count("\n") - (name == "a.csv")
    assert len(good) == complete > 5_000 and all(isinstance(row, Row) for row in good)
    assert [row.value["prompt"] for row in good if isinstance(row, Row)] == [str(n) for n in range(len(good))]
    assert isinstance(last, Reject) and last.line == good[-1].line + 1
    assert "the compressed file cannot be read: Compressed file ended before" in last.reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no gzip at all", "Not a gzipped file"),
        (b"ab", "Not a gzipped file"),
        (gzip.compress(GOOD.encode(), mtime=0)[:5], "ended before"),
        (gzip.compress(GOOD.encode() + b"\n", mtime=0) + b"trailing", "Not a gzipped file"),
        (gzip.compress(GOOD.encode() + b"\n", mtime=0)[:-8] + b"\0" * 8, "CRC check failed"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_a_damaged_gzip_is_one_reject(tmp_path: Path, content: bytes, reason: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    found = rejects(tmp_path / name)
    assert len(found) == 1 and reason in found[0][1]


def test_a_broken_array_gives_the_rows_before_the_damage(tmp_path: Path) -> None:
    cases: dict[str, tuple[int, list[tuple[int, str]]]] = {
        f"[{GOOD}, {GOOD}": (2, [(3, "the array goes on with the file's end")]),
        f"[{GOOD}, {GOOD[:-3]}": (1, [(2, "Unterminated string")]),
        f"[{GOOD}, {GOOD[:-5]}": (1, [(2, "not valid JSON at the end of the file: Expecting value")]),
        f"[{GOOD}, {{'a': 1}}, {GOOD}]": (1, [(2, "Expecting property name enclosed in double quotes")]),
        f"[{GOOD} {GOOD}]": (1, [(2, "the array goes on with '{'")]),
        f"[{GOOD}] {GOOD}": (1, [(2, "text follows the array's closing bracket")]),
        f"[{GOOD},]": (1, [(2, "Expecting value")]),
        f"[{GOOD}, 3, {GOOD}]": (2, [(2, "the row is a number, 3")]),
        f'[{GOOD}, {{"a": 1, "a": 2}}, {GOOD}]': (2, [(2, "the key 'a' stands twice")]),
        f'[{GOOD}, {{"a": [NaN]}}, {GOOD}]': (2, [(2, "NaN is not JSON")]),
        f'[{GOOD}, {{"a": "\\ud800"}}, {GOOD}]': (2, [(2, "half of a surrogate pair")]),
        f"[{GOOD}, {'[' * 66}{']' * 66}, {GOOD}]": (2, [(2, "nested more than 64 levels")]),
        f"[{GOOD}, {'[' * 100_000}": (1, [(2, "nested too deeply")]),
        f"[{GOOD}, {{\"prompt\": \"\udcff\"}}, {GOOD}]": (2, [(2, "holds the byte 0xff, which is not UTF-8")]),
        "[]": (0, []),
        "[ ": (0, [(1, "Expecting value")]),
    }  # fmt: skip
    for text, (count, expected) in cases.items():
        file = write(tmp_path / "a.json", text.encode("utf-8", "surrogateescape"))
        found = items(file)
        assert sum(isinstance(row, Row) for row in found) == count, text[:80]
        assert [line for line, _ in rejects(file)] == [line for line, _ in expected], text[:80]
        assert all(part in reason for (_, reason), (_, part) in zip(rejects(file), expected)), rejects(file)


def test_an_array_may_be_cut_into_chunks_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"text": f'і{n}\\"\u20ac😀', "metadata": {"x": [1.5, True, None]}} for n in range(40)]
    file = write(tmp_path / "a.json", json.dumps(values, ensure_ascii=False, indent=1))
    for size in (1, 2, 3, 7, 64, 1000):
        monkeypatch.setattr("loratune.data.json_array.BLOCK_BYTES", size)
        assert [row.value["text"] for row in items(file) if isinstance(row, Row)] == [value["text"] for value in values]


def test_nothing_but_noise_stops_after_64_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *[b"\xff"] * 64)
    with pytest.raises(DataError, match=rf"^{file}:1: byte 1 .*none of the first 64 rows can be read"):
        iter_rows(file)
    assert len(rejects(write(tmp_path / "a.jsonl", *[b"\xff"] * 63))) == 63


MEASURE = """
import resource, sys
from loratune.data.ledger import Ledger
from loratune.data.rows import iter_rows
list(iter_rows(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ledger = Ledger()
for row in ledger.take(iter_rows(sys.argv[1])):
    ledger.train()
ledger.close()
print(ledger.rows_in, [(reject.line, reject.reason[:40]) for reject in ledger.rejects])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def measured(path: Path) -> tuple[str, int]:
    """What a fresh process says of a file, and how many MiB its peak grew by."""
    small = write(path.parent / "small.jsonl", GOOD)
    command = [sys.executable, "-c", MEASURE, str(path), str(small)]
    said, kib = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return said, int(kib) >> 10


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
def test_a_line_of_100_megabytes_is_a_reject_in_bounded_memory(tmp_path: Path, name: str) -> None:
    long = "x" * (100 << 20)
    text = {
        "a.jsonl": f'{GOOD}\n{{"prompt": "{long}", "completion": "b"}}\n{GOOD}\n',
        "a.json": f'[{GOOD}, {{"prompt": "{long}", "completion": "b"}}, {GOOD}]',
        "a.csv": f"prompt,completion\na,b\n{long},b\na,b\n",
    }[name.removesuffix(".gz")]
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith(".gz") else data)
    said, mebibytes = measured(tmp_path / name)
    line = 3 if name == "a.csv" else 2
    rows = 2 if name == "a.json" else 3  # nothing can step over a row inside an array
    assert said == f"{rows} [({line}, 'the row is longer than 16 MiB; split it,')]"
    assert mebibytes < 100


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_an_open_quote_and_a_large_file_stay_in_bounded_memory(tmp_path: Path) -> None:
    row = "a," + "b" * 1000 + "\n"
    write(tmp_path / "a.csv", 'prompt,completion\na,b\n"open,' + "\n" + row * 60_000)
    said, mebibytes = measured(tmp_path / "a.csv")
    assert "(3, 'the row is longer than 16 MiB" in said and mebibytes < 100
    with gzip.open(tmp_path / "b.jsonl.gz", "wb", 1) as file:
        for _ in range(100):
            file.write(f'{{"prompt": "{"x" * 10_000}", "completion": "b"}}\n'.encode() * 100)
    said, mebibytes = measured(tmp_path / "b.jsonl.gz")
    assert said == "10000 []" and mebibytes < 30


def spoiled(good: bytes, noise: random.Random) -> bytes:
    data = bytearray(good[: noise.randrange(len(good))] if noise.random() < 0.2 else good)
    for _ in range(noise.randint(1, 4)):
        if data:
            data[noise.randrange(len(data))] = noise.randrange(256)
    return bytes(data)


FUZZ = """
import random, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_hostile_files import items, spoiled
from loratune.errors import ConfigError, DataError
path, noise = Path(sys.argv[1]), random.Random(7)
good, ends = path.read_bytes(), []
for _ in range(400):
    path.write_bytes(spoiled(good, noise))
    try:
        items(path)
        ends.append("read")
    except (ConfigError, DataError):
        ends.append("refused")
print({end: ends.count(end) for end in ends})
"""


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "b.arrow", "a.jsonl.gz", "a.csv", "a.json"])
def test_random_damage_never_crashes(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"п{n}", "completion": "c" * n + "d"} for n in range(40)]
    table, out = pa.Table.from_pylist(rows), io.BytesIO()
    if name == "a.parquet":
        parquet.write_table(table, out)
    elif name.endswith("arrow"):
        with (ipc.new_file if name == "a.arrow" else ipc.new_stream)(out, table.schema) as writer:
            writer.write_table(table)
    else:
        lines = "\n".join(json.dumps(row) for row in rows).encode()
        table_lines = "\n".join(["prompt,completion", *(f"{r['prompt']},{r['completion']}" for r in rows)]).encode()
        out.write({"a.jsonl.gz": gzip.compress(lines), "a.csv": table_lines, "a.json": json.dumps(rows).encode()}[name])
    (tmp_path / name).write_bytes(out.getvalue())
    command = [sys.executable, "-c", FUZZ, str(tmp_path / name), str(Path(__file__).parent)]
    ended = subprocess.run(command, capture_output=True, text=True)  # its own process: a crash is a signal
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "read" in ended.stdout


def test_errors_of_one_file_are_config_errors_of_the_library(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        iter_rows(tmp_path / "none.jsonl")
