"""The guides do what they say: every command and every line of Python in them runs, on a tiny model and few rows."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import tiny_run
from loratune.cli import main
from loratune.plan import machine

ROOT = Path(__file__).parent.parent
GUIDES = {"en": ROOT / "docs" / "guide.md", "uk": ROOT / "docs" / "guide.uk.md"}
READMES = (ROOT / "README.md", ROOT / "README.uk.md")
MODEL = "google/gemma-3-270m"  # what the guides name; here a tiny one stands in its place
_BLOCK = re.compile(r"(?:<!-- exit ([\d or]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


class Block(NamedTuple):
    """A fenced block: its language, its text, and the exit codes that its commands may end with."""

    language: str
    text: str
    exits: tuple[int, ...]


def blocks(path: Path) -> Iterator[Block]:
    for exits, language, text in _BLOCK.findall(path.read_text("utf-8")):
        yield Block(language, text, tuple(int(each) for each in exits.split(" or ")) if exits else (0,))


def commands(text: str) -> list[list[str]]:
    """Returns the words of each command that begins with `loratune`, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("loratune")]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model and what the demo leaves, so that the guide's paths are there."""
    tiny_run.save_model(tmp_path / "tiny", max_position_embeddings=2048)
    for seed, (split, count) in enumerate({"train": 480, "validation": 48, "test": 32}.items()):
        tiny_run.write_rows(tmp_path / "runs" / "demo-data" / f"{split}.jsonl", tiny_run.copy_rows(count, seed))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "_MATRIX_SECONDS", 0.02)
    monkeypatch.setattr(machine, "_READ_SECONDS", 0.02)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("language", list(GUIDES))
def test_everything_in_the_guide_runs_in_its_order(
    language: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in blocks(GUIDES[language]):
        if block.language == "python":
            exec(compile(block.text.replace(MODEL, "tiny"), GUIDES[language].name, "exec"), {"__name__": "guide"})
        for words in commands(block.text) if block.language == "sh" else ():
            code = main.run([word.replace(MODEL, "tiny") for word in words[1:]])
            assert code in block.exits, f"{shlex.join(words)}: {code}\n{capsys.readouterr().err}"
    for made in ("first.yaml", "runs/first/report.html", "runs/python", "compare.html", "merged", "runs/climb/adapter"):
        assert (place / made).exists(), made


def test_both_guides_give_the_same_commands_and_python() -> None:
    def runnable(path: Path) -> list[Block]:
        found = [each for each in blocks(path) if each.language in ("sh", "python")]
        return [Block(each.language, re.sub(r"(?m)\s*#.*$", "", each.text), each.exits) for each in found]

    assert runnable(GUIDES["en"]) == runnable(GUIDES["uk"])
    assert sum(len(commands(each.text)) for each in runnable(GUIDES["en"])) >= 20


@pytest.mark.parametrize("path", [*GUIDES.values(), *READMES], ids=lambda path: path.name)
def test_every_link_to_a_file_leads_somewhere(path: Path) -> None:
    links = _LINK.findall(path.read_text("utf-8"))
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_every_flag_of_a_readme_exists(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [words for block in blocks(path) for words in commands(block.text)]
    assert len(found) >= 8
    for words in found:
        verb = words[1:3] if words[1] in ("data", "runs", "adapters") else words[1:2]
        assert main.run([*verb, "--help"]) == 0, words
        shown = capsys.readouterr().out
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", shown), f"{shlex.join(words)}: {flag}"


@pytest.mark.parametrize(
    "word",
    [
        "W", "A", "B", "r", "lora_alpha", "target_modules", "lora_dropout", "bias", "modules_to_save", "task_type",
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
        "fast", "quality", "deep", "arxiv.org/abs/2106.09685", "huggingface.co/docs/peft", "A B x", "B A x",
    ],
)  # fmt: skip
@pytest.mark.parametrize("language", list(GUIDES))
def test_nothing_that_a_reader_should_know_is_left_out(language: str, word: str) -> None:
    text = GUIDES[language].read_text("utf-8")
    assert word in text
    assert not re.search(r"@[a-z]+@", text), "a figure is missing"
