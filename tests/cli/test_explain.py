"""`loratune explain` as a user meets it: quick, within the terminal's width, in the locale's language, and as JSON."""

import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES
from loratune.cli import main
from loratune.cli.explain import cell_width, groups
from loratune.explain.texts import TOPICS
from quickness import is_quick

HEAVY = ("torch", "transformers", "yaml", "numpy", "pyarrow", "safetensors")
CODE = "import sys; from loratune.cli.main import run; code = run({args!r}); {then}; sys.exit(code)"


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder without weights."""
    model = FAMILIES["gemma3_text"]()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def shown(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main.run(["explain", *args]) == 0
    return capsys.readouterr().out


def columns(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in line)


def test_without_a_model_nothing_heavy_is_imported_and_it_answers_in_half_a_second() -> None:
    code = CODE.format(args=["explain"], then=f"print('HEAVY', sorted(set(sys.modules) & {set(HEAVY)!r}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("HEAVY []")
    assert is_quick(code, 0.5)


@pytest.mark.parametrize("language", ["en", "uk"])
@pytest.mark.parametrize("width", [80, 120])
def test_every_page_fits_the_terminal(
    language: str, width: int, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(folder.parent)
    for args in ([], ["--model", "m"], *(["--model", "m", topic] for topic in TOPICS)):
        out = shown([*args, "--lang", language], capsys)
        assert max(columns(line.rstrip()) for line in out.splitlines()) <= width, args
        assert "…" not in out and "`" not in out, args  # nothing cut off, no marks left


def test_all_of_it_is_on_the_first_page(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown([], capsys)
    words = ["W x + s B A x", "q_proj", "lm_head", "target_modules", "task_type", "To begin", "loratune demo"]
    places = [out.index(word) for word in words]
    assert places == sorted(places)


def test_the_language_is_the_locales_unless_it_is_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "rank" in shown(["r"], capsys)
    monkeypatch.setenv("LANG", "uk_UA.UTF-8")
    assert "ранг" in shown(["r"], capsys)
    assert "rank" in shown(["r", "--lang", "en"], capsys)


def test_a_model_is_shown_in_its_own_names_and_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(["--model", str(folder)], capsys)
    report = json.loads(shown(["--model", str(folder), "--json"], capsys))["model"]
    assert report["class"] == "Gemma3ForCausalLM" and f"{report['num_parameters']:,}" in out
    assert len(report["roles"]) == 8 and len(report["coverage"]["reached"]) == 8
    for each in report["presets"]:
        assert re.search(rf"^ +{each['setting']} +{each['num_parameters']:,} ", out, re.MULTILINE)
    assert "unties" in out  # Gemma's head is tied


def test_a_topic_on_a_model_shows_each_doubling(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = json.loads(shown(["rank", "--model", str(folder), "--json"], capsys))["model"]["steps"]
    assert [step["setting"] for step in steps] == ["r = 8", "r = 16", "r = 32"]
    out = shown(["r", "--model", str(folder)], capsys)
    assert all(f"{step['num_parameters']:,}" in out for step in steps)
    out = shown(["bias", "--model", str(folder)], capsys)
    assert out.count("none here") == 2  # Gemma has no biases


def test_json_holds_the_texts_of_both_languages(capsys: pytest.CaptureFixture[str]) -> None:
    pages = [json.loads(shown(["--json", "--lang", language], capsys)) for language in ("en", "uk")]
    assert [page["language"] for page in pages] == ["en", "uk"]
    assert all(set(page["text"]["topics"]) == set(TOPICS) for page in pages)
    one = json.loads(shown(["deep", "--json"], capsys))
    assert one["text"]["title"].startswith("deep") and "model" not in one


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["alhpa"], "error: nothing is explained under 'alhpa'; did you mean alpha?\n"),
        (["--model", "nowhere.gguf"], "error: cannot find the model 'nowhere.gguf': there is no such folder or file"),
    ],
)
def test_what_is_unknown_is_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["explain", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message) and err.count("\n") == 1


def test_the_map_has_room_for_any_number_of_layers() -> None:
    assert [cell_width(count, 60) for count in (1, 18, 30, 60, 120)] == [3, 3, 2, 1, 0.5]
    layers = ["encoder.block.0", "encoder.block.1", "decoder.block.0"]
    assert list(groups(layers)) == [(0, 2), (2, 3)]
