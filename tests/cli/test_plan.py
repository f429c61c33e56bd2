"""`loratune plan` as a user meets it: the verdict first, its exit codes, JSON, and the file that train goes on with."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_run
from loratune.cli import main
from loratune.cli.plan import parse_bytes
from loratune.errors import ConfigError
from loratune.plan import machine


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_run.save_model(tmp_path / "m")
    tiny_run.write_rows(tmp_path / "rows.jsonl", tiny_run.copy_rows(80))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(machine, "_MATRIX_SECONDS", 0.02)
    monkeypatch.setattr(machine, "_READ_SECONDS", 0.02)
    return tmp_path


WORDS = ["plan", "--model", "m", "--data", "rows.jsonl"]


def test_the_verdict_stands_first(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([*WORDS, "--no-measure"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Fits: ")
    for word in ("memory at the peak", "base model", "time to finish", "disk afterwards", "vllm: loads"):
        assert word in out
    assert "the run has 10 steps" in out
    assert max(map(len, out.splitlines())) <= 80
    assert sorted(path.name for path in here.iterdir()) == ["m", "rows.jsonl"], "nothing is written"


def test_what_does_not_fit_ends_in_one_with_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--memory", "1MB", "--preset", "deep", "--output", "run.yaml"]
    assert main.run(words) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("Does not fit: ")
    assert "What each change gives" in shown.out and "preset: fast" in shown.out
    assert "run.yaml was not written" in shown.err and not Path("run.yaml").exists()


def test_the_file_is_what_train_then_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([*WORDS, "--preset", "quality", "--max-steps", "3", "--output", "run.yaml"]) == 0
    shown = capsys.readouterr()
    assert "written: run.yaml" in shown.err
    text = Path("run.yaml").read_text("utf-8")
    assert re.search(r"^# memory: .* \(measured; .* estimated\)", text, re.MULTILINE)
    assert "output: runs/run" in text
    assert main.run(["train", "run.yaml", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["event"] == "end" and lines[-1]["steps"] == 3
    assert main.run([*WORDS, "--no-measure", "--output", "run.yaml"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert Path("run.yaml").read_text("utf-8") == text
    assert main.run([*WORDS, "--no-measure", "--output", "run.yaml", "--force"]) == 0


def test_a_directory_as_output_is_the_runs_own(capsys: pytest.CaptureFixture[str]) -> None:
    """A train command with another verb: the output is the same, and nothing is written."""
    assert main.run([*WORDS, "--no-measure", "--output", "m"]) == 0
    assert "the output directory m exists already" in " ".join(capsys.readouterr().out.split())


def test_json_holds_the_whole_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([*WORDS, "--preset", "deep", "--json"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    plan = json.loads(line)
    assert plan["fits"] is True and plan["advice"] is None
    assert plan["memory_bytes"] == plan["measured"]["peak_bytes"]
    assert set(plan["estimate"]["memory"]) == {"held", "weights", "trained", "step"}
    assert plan["estimate"]["work"]["num_steps"] == 10
    vllm = next(each for each in plan["consumers"] if each["name"] == "vllm")
    assert vllm["verdict"] == "loads, with a note" and "rank 32" in vllm["findings"][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target-modules", "q_prj"], "q_prj"),
        (["--memory", "lots"], "--memory is 'lots'; expected a size such as 8GB or 500MB."),
        (["--format", "nonsense"], "data.format"),
        (["--resume", "x"], "No such option: --resume"),
    ],
)
def test_what_cannot_be_planned_ends_in_two(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([*WORDS, "--no-measure", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_file_is_planned_with_flags_over_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("model: m\ndata: {train: rows.jsonl}\noutput: runs/x\ntrain: {epochs: 4}\n")
    assert main.run(["plan", "run.yaml", "--batch-size", "4", "--no-measure", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["estimate"]["work"]["num_steps"] == 76


def test_every_option_of_train_is_there_but_those_that_go_on_with_a_run() -> None:
    def options(verb: str) -> set[str]:
        code = f"from loratune.cli.main import run; run([{verb!r}, '--help'])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return set(re.findall(r"--[a-z][a-z-]*", done.stdout))

    assert options("train") - options("plan") == {"--resume", "--allow-changed", "--verify-resume"}
    assert options("plan") - options("train") == {"--no-measure", "--memory", "--force"}


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("8GB", 8 * 10**9), ("8 GiB", 8 * 2**30), ("500M", 5 * 10**8), ("1.5gb", 1_500_000_000), ("1000", 1000)],
)
def test_sizes_are_read_as_they_are_written(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8XB", "0"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a size"):
        parse_bytes(text)
