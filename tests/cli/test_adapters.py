"""`loratune adapters` as a user meets it: tables that fit, JSON that parses, files, and exit codes."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.cli import main
from loratune.cli.adapters import bars
from stored_adapters import saved


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two adapters, a and b, in the working directory; a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    saved(tmp_path / "a", seed=1)
    saved(tmp_path / "b", seed=2, r=8, use_rslora=True)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> str:
    assert main.run(["adapters", *args]) == code
    out, err = capsys.readouterr()
    assert err == ""
    assert all(len(line) <= 80 for line in out.splitlines()) or "--json" in args
    return out


def run_json(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> Any:
    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(run(capsys, *args, "--json", code=code), parse_constant=refuse)


def test_info(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "info", "a")
    for words in ("size of the update", "effective rank", "singular values", "layers 0 to 1", "self_attn.q_proj"):
        assert words in out
    assert "model.layers.0.self_attn.q_proj" not in out
    assert "model.layers.0.self_attn.q_proj" in run(capsys, "info", "a", "--sites")
    report = run_json(capsys, "info", "a")
    assert len(report["sites"]) == 4 and report["roles"]["query"] == 2


def test_diff_with_a_figure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "diff", "a", "b", "--figure", "out.svg")
    assert "sites   4 in both, 0 only in the first, 0 only in the second" in out
    assert ["r", "4", "8"] in [line.split() for line in out.splitlines()]
    assert "wrote out.svg" in out
    assert ElementTree.parse("out.svg").getroot().tag.endswith("svg")
    assert len(run_json(capsys, "diff", "a", "b")["groups"]) == 2


def test_check_has_exit_code_2_where_something_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "check", "a").split() == ["peft", "ok", "vllm", "ok", "llama.cpp", "ok"]
    out = run(capsys, "check", "b", code=2)
    assert (
        "llama.cpp refuses or misreads it: 1 reason" in out
        and "loratune adapters convert b NEW --to peft --rank 8\n" in out
    )
    report = run_json(capsys, "check", "b", "--for", "vllm, llama.cpp", code=2)
    assert report["refused"] is True and list(report["consumers"]) == ["vllm", "llama.cpp"]
    assert run_json(capsys, "check", "b", "--for", "peft,vllm")["refused"] is False


def test_convert(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "wrote m" in run(capsys, "convert", "b", "m", "--to", "mlx")
    report = run_json(capsys, "convert", "m", "p", "--to", "peft", "--rank", "2", "--dtype", "bfloat16")
    assert (report["from"], report["dtype"]) == ("mlx", ["bfloat16"]) and 0 < report["energy_kept"]["least"] < 1
    assert run_json(capsys, "check", "p")["refused"] is False
    assert "p exists already" in run_json(capsys, "convert", "a", "p", "--to", "mlx", code=2)["error"]["message"]


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=100), st.integers(1, 40))
def test_bars_are_one_a_value_or_as_many_as_fit(values: list[float | None], width: int) -> None:
    assert len(bars(values, width, 0.0, 1.0)) == min(len(values), width)


def test_bars() -> None:
    assert bars([0.0, 0.5, 1.0, None], 9, 0.0, 1.0) == "▁▅█·"
    assert bars([0.0, 0.0, 1.0, 1.0], 2, 0.0, 1.0) == "▁█"
    assert bars([3.0, 3.0], 9, 3.0, 3.0) == "▅▅"
