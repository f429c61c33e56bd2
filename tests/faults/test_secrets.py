"""A secret in the environment, or written into a configuration by mistake, appears in nothing that is shown or kept."""

import traceback
from pathlib import Path
from typing import Any

import pytest

from loratune.cli import main
from loratune.errors import ConfigError
from loratune.train.optim import Optimizer
from tiny_run import copy_rows, save_model, write_rows

CANARY = "hf_" + "CanaryCanaryCanaryCanaryCanary9z"
NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "MY_SECRET")
TRAIN = ("train", "--model", "model", "--data", "rows.jsonl", "--output")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model and rows, and a secret in the environment."""
    save_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", copy_rows(24))
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def leaks(folder: Path, shown: Any) -> list[str]:
    """Where the secret is: a stream, or a file that is not the one it was written into."""
    found = [name for name in ("out", "err") if CANARY in getattr(shown, name)]
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "secret.yaml")
    return found + [str(path) for path in files if CANARY.encode() in path.read_bytes()]


def test_the_search_finds_it(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    print(CANARY)
    (folder / "note").write_text(f"x{CANARY}x")
    assert leaks(folder, capfd.readouterr()) == ["out", str(folder / "note")]


@pytest.mark.parametrize("how", [["--json"], []], ids=["json", "panel"])
def test_a_run_keeps_nothing_of_the_environment(
    folder: Path, capfd: pytest.CaptureFixture[str], how: list[str]
) -> None:
    assert main.run([*TRAIN, "run", "--max-steps", "2", *how]) == 0
    assert len([path for path in (folder / "run").rglob("*") if path.is_file()]) > 8
    assert leaks(folder, capfd.readouterr()) == []


def test_a_bug_shows_its_lines_and_no_values(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback with local variables, as rich can print, would show it."""

    def step(self: Optimizer, rate: float) -> None:
        secret = CANARY
        raise ZeroDivisionError(f"a bug with {len(secret)} letters")

    monkeypatch.setattr(Optimizer, "step", step)
    assert main.run([*TRAIN, "broken"]) == 1
    shown = capfd.readouterr()
    assert "ZeroDivisionError: a bug with 35 letters" in shown.err
    assert leaks(folder, shown) == []


GOOD = "model: model\noutput: other\ndata: {train: rows.jsonl}\n"
FILES = {
    "a key of its own": GOOD + f"hf_token: {CANARY}\n",
    "in a section": "model: model\noutput: other\ndata: {train: rows.jsonl, token: " + CANARY + "}\n",
    "a key near a known one": GOOD + f"train: {{seeds: {CANARY}}}\n",
    "no mapping": CANARY + "\n",
    "a broken file": GOOD + f"hf_token: [{CANARY}\n",
    "a number": GOOD + f"train: {{learning_rate: {CANARY}}}\n",
    "in the address of a model": GOOD.replace("model: model", f"model: https://me:{CANARY}@example.org/model"),
    "in the address of the data": GOOD.replace("rows.jsonl", f"https://me:{CANARY}@example.org/rows.jsonl"),
    "where the model stands": GOOD.replace("model: model", f"model: {CANARY}"),
}  # fmt: skip


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_a_configuration_with_a_secret_is_refused_without_it(
    folder: Path, capfd: pytest.CaptureFixture[str], text: str
) -> None:
    (folder / "secret.yaml").write_text(text)
    assert main.run(["train", "secret.yaml"]) == 2
    shown = capfd.readouterr()
    assert shown.err.startswith("error: ") and leaks(folder, shown) == []


KEYS = ("hf_" + "a1" * 17, "sk-" + "proj-" + "b2" * 20, "ghp_" + "c3" * 18, "AKIA" + "Q7" * 8, "glpat-" + "d4" * 10)


@pytest.mark.parametrize("key", KEYS)
def test_what_looks_like_a_key_is_not_shown_again(key: str) -> None:
    error = ConfigError(f"cannot find the model {key!r}, nor '{key}/x'.")
    assert str(error) == "cannot find the model '***', nor '***/x'."
    assert key not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "text",
    [
        "runs/hf_model is no folder", "task-specific-heads-are-not-known-yet", "https://example.org/a@b/c",
        "adapter.lora_alpha is 'sk-learn'", "s3://bucket/name", "model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)  # fmt: skip
def test_what_is_none_is_shown_as_it_is(text: str) -> None:
    assert str(ConfigError(text)) == text
