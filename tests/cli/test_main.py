"""The command as a user meets it: help at once, one clean line per error, and the exit codes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from loratune.cli import main
from loratune.errors import CheckpointError, TrainingError
from quickness import is_quick

HEAVY = ("torch", "transformers", "yaml", "numpy", "pyarrow", "safetensors")
CODE = "import sys; from loratune.cli.main import run; code = run({args!r}); {then}; sys.exit(code)"


def python(args: list[str], then: str = "pass") -> subprocess.CompletedProcess[str]:
    code = CODE.format(args=args, then=then)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("args", [["--help"], [], ["train", "--help"], ["adapters", "info", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    # Recent typer reads options other than --help with pydantic: that is not ours to hold.
    unwanted = {*HEAVY, "pydantic"} if args == ["--help"] else set(HEAVY)
    done = python(args, then=f"print('HEAVY', sorted(set(sys.modules) & {unwanted!r}))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("HEAVY []")


def test_help_answers_in_three_tenths_of_a_second() -> None:
    assert is_quick(CODE.format(args=["--help"], then="pass"), 0.3)


def test_help_shows_the_verbs_in_their_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--help"]) == 0
    out = capsys.readouterr().out
    places = [
        out.index(word) for word in ("Learn", "demo ", "─ Train", "train ", "Use", "chat ", "export ", "adapters ")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'? See 'loratune --help'."),
        (
            ["train", "--modle", "x"],
            "No such option: --modle (Possible options: --model, --target-modules). See 'loratune train --help'.",
        ),
        (
            ["train", "--epochs", "many"],
            "Invalid value for '--epochs': Input should be a valid number, unable to parse string as a number. "
            "See 'loratune train --help'.",
        ),
        (["adapters", "info"], "Missing argument 'RUN_OR_ADAPTER'. See 'loratune adapters info --help'."),
        (["chat", "nowhere"], "nowhere does not exist. Give a run directory (runs/NAME) or an adapter's folder."),
        (
            ["train", "--model", "m", "--data", "d", "--output", "o", "--bias", "both"],
            "--bias: adapter.bias is 'both'; expected one of none, all, lora_only.",
        ),
        (
            ["train", "nowhere.yaml"],
            "cannot read nowhere.yaml: No such file or directory. Give the path of a run's YAML file.",
        ),
        (
            ["train", "x.yaml", "--resume", "runs/x", "--batch-size", "4", "--data", "d"],
            "--resume goes on with the run's own configuration; remove x.yaml, --data, --batch-size.",
        ),
        (
            ["train", "--resume", "nowhere"],
            "nowhere is not a run directory. Give the folder that the stopped run wrote to.",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.run(args) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")
    assert main.run([*args, "--json"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert (error["message"], error["exit_code"], err) == (message, 2, "")
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_is_answered_before_torch_is_imported() -> None:
    done = python(["train", "--model", "m", "--epochs", "0"], then="print('torch' in sys.modules)")
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr.splitlines()[0].startswith("error: no training data is set")


def raising(error: BaseException) -> typer.Typer:
    """A command line whose only verb raises: what `run` makes of it is under test, not the verb."""
    app = typer.Typer()

    @app.command()
    def fail(as_json: bool = typer.Option(False, "--json")) -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "exit_code", "kind", "message"),
    [
        (TrainingError("loss is nan at step 3."), 1, "TrainingError", "loss is nan at step 3."),
        (CheckpointError("state.json is missing."), 2, "CheckpointError", "state.json is missing."),
        (
            ZeroDivisionError("oh"),
            1,
            "ZeroDivisionError",
            "ZeroDivisionError: oh\n"
            "This was not expected. Please report it with the lines above and the command you ran.",
        ),
    ],
)
def test_each_error_has_its_exit_code(
    error: Exception, exit_code: int, kind: str, message: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "app", raising(error))
    assert main.run([]) == exit_code
    out, err = capsys.readouterr()
    assert out == "" and err.endswith(f"error: {message}\n")
    assert ("Traceback" in err) == (kind == "ZeroDivisionError")
    assert main.run(["--json"]) == exit_code
    expected = {"error": {"type": kind, "message": message, "exit_code": exit_code}}
    assert json.loads(capsys.readouterr().out) == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_interrupted_at_once_is_130(error: BaseException, monkeypatch: Any) -> None:
    monkeypatch.setattr(main, "app", raising(error))
    assert main.run([]) == 130


def test_a_closed_pipe_is_no_traceback() -> None:
    code = CODE.format(args=["--help"], then="pass")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait()
