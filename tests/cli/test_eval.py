"""`loratune eval`: runs, PEFT adapters and floors on a file, the paired test, predictions, and errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune import api
from loratune.cli.main import run as command
from loratune.tasks.floors import fit_linear
from loratune.tasks.labels import MULTI, REGRESSION, SINGLE
from loratune.train.config import load_run_config
from tasks.toy_tasks import save_model, sentiment, write
from tiny_run import copy_rows, write_rows
from tiny_run import save_model as save_causal


def trained(folder: Path, base: Path, data: Path, task_type: str, **settings: Any) -> Path:
    overrides = {f"train.{name}": value for name, value in settings.items()} | {
        "model": str(base), "data.train": str(data), "output": str(folder), "adapter.task_type": task_type,
        "adapter.preset": "deep",
    }  # fmt: skip
    api.run(load_run_config(None, overrides))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    base = save_model(folder / "base", "llama")
    data = write(folder / "rows.jsonl", sentiment(160))
    write(folder / "test.jsonl", sentiment(60, seed=5))
    trained(folder / "good", base, data, "SEQ_CLS", epochs=6.0, learning_rate=5e-3)
    trained(folder / "short", base, data, "SEQ_CLS", max_steps=1)
    return folder


def test_runs_and_floors_are_compared_on_the_same_rows(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = runs / "said.jsonl"
    arguments = f"eval {runs / 'good'} {runs / 'short'} --data {runs / 'test.jsonl'} --predictions {said}"
    assert command([*arguments.split(), "--baseline", "majority", "--baseline", "probe", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    good, short, majority, probe = (each["figures"]["accuracy"]["value"] for each in shown["results"])
    assert good > 0.85 > short and majority == 0.5 and probe > 0.5
    tests = {each["other"]: each for each in shown["paired"]}
    test = tests[str(runs / "short")]
    assert test["figure"] == "accuracy" and test["value"] == pytest.approx(short - good)
    assert test["low"] <= test["value"] <= test["high"] < 0
    lines = [json.loads(line) for line in said.read_text().splitlines()]
    mine = [line for line in lines if line["model"] == str(runs / "good")]
    assert len(mine) == 60 and len(lines) == 240
    assert mine[3]["where"] == f"{runs / 'test.jsonl'}:4"
    assert sum(line["predicted"] == line["label"] for line in mine) == pytest.approx(60 * good)


def test_what_is_shown_is_a_table_and_a_confusion(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"eval {runs / 'good'} --data {runs / 'test.jsonl'} --baseline majority".split()) == 0
    shown = capsys.readouterr().out
    assert "confusion" in shown and "negative" in shown and "a clear difference" in shown and "matthews" in shown


def test_a_base_without_a_head_is_no_comparison(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"eval {runs / 'good'} --data {runs / 'test.jsonl'} --base".split()) == 2
    assert "has no head for SEQ_CLS: compare with --baseline probe instead" in capsys.readouterr().err


def test_a_label_that_training_does_not_know_is_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = write(runs / "odd.jsonl", [*sentiment(3), {"text": "the", "label": "neutral"}])
    assert command(f"eval {runs / 'good'} --data {odd}".split()) == 2
    assert "odd.jsonl:4: the label 'neutral' is not one of the 2" in capsys.readouterr().err


def test_adapters_of_two_tasks_are_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", copy_rows(20))
    other = trained(tmp_path / "text", save_causal(tmp_path / "base"), data, "CAUSAL_LM", max_steps=1)
    assert command(f"eval {runs / 'good'} {other} --data {data}".split()) == 2
    assert "not of one task: SEQ_CLS, CAUSAL_LM" in capsys.readouterr().err


def test_text_is_judged_by_loss_and_by_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_causal(tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl", copy_rows(40))
    run = trained(tmp_path / "run", base, data, "CAUSAL_LM", max_steps=20, learning_rate=1e-2)
    assert command(f"eval {run} --base --data {data} --answers 5 --json".split()) == 0
    shown = json.loads(capsys.readouterr().out)
    tuned, plain = (each["figures"] for each in shown["results"])
    assert tuned["loss"]["value"] < plain["loss"]["value"] and set(tuned) == {"loss", "chrf", "bleu", "exact_match"}
    [test] = shown["paired"]
    assert test["value"] == pytest.approx(plain["loss"]["value"] - tuned["loss"]["value"]) and test["low"] > 0


@pytest.mark.parametrize("problem", [SINGLE, MULTI, REGRESSION])
def test_the_probe_is_scikit_learns(problem: str) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 5, generator=generator, dtype=torch.float64) * 3 + 1
    scaled = ((x - x.mean(0)) / x.std(0)).numpy()
    if problem == REGRESSION:
        y = (x @ torch.arange(5.0, dtype=torch.float64) + torch.randn(80, generator=generator))[:, None]
        found = fit_linear(x, y, problem, 1)(x)
        expected = linear_model.Ridge(alpha=1.0).fit(scaled, y.numpy()).predict(scaled).reshape(-1, 1)
    elif problem == MULTI:
        y = (x[:, :2] + torch.randn(80, 2, generator=generator) > 1).float()
        found = fit_linear(x, y, problem, 2)(x)
        fits = [linear_model.LogisticRegression(tol=1e-9, max_iter=9999).fit(scaled, y[:, k].numpy()) for k in (0, 1)]
        expected = torch.tensor([fit.predict_proba(scaled)[:, 1].tolist() for fit in fits]).T.numpy()
    else:
        y = (x[:, :3] + torch.randn(80, 3, generator=generator) * 3).argmax(1, keepdim=True)
        found = fit_linear(x, y, problem, 3)(x)
        fit = linear_model.LogisticRegression(tol=1e-9, max_iter=9999).fit(scaled, y[:, 0].numpy())
        expected = fit.predict_proba(scaled)
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), atol=2e-4, rtol=1e-3)


BAD = {
    "no rows": (["eval", "--base"], "no rows are given"),
    "nothing": (["eval", "--data", "x.jsonl"], "nothing to evaluate"),
    "no model": (["eval", "--data", "x.jsonl", "--base"], "no base model is known"),
    "no training rows": (["eval", "--data", "x.jsonl", "--baseline", "probe", "--model", "x"], "learns from training"),
    "unknown": (["eval", "--data", "x.jsonl", "--baseline", "luck", "--model", "x"], "luck is not known"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_use_is_told(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[name]
    assert command(arguments) == 2 and message in capsys.readouterr().err


def test_a_model_that_continues_text_chooses_a_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is trained on the labels as completions, then asked to choose: the same rows as those of a classifier."""
    base = save_causal(tmp_path / "base")
    labelled = [{"text": f"{k} {'aaa' if k % 2 else 'bbb'} =", "label": "x" if k % 2 else "y"} for k in range(40)]
    written = [{"prompt": row["text"], "completion": f" {row['label']}"} for row in labelled]
    run = trained(
        tmp_path / "run", base, write(tmp_path / "said.jsonl", written), "CAUSAL_LM", epochs=8.0, learning_rate=1e-2
    )
    data = write(tmp_path / "rows.jsonl", labelled)
    assert command(f"eval {run} --base --data {data} --json".split()) == 0
    tuned, plain = json.loads(capsys.readouterr().out)["results"]
    assert tuned["figures"]["accuracy"]["value"] == 1.0 > plain["figures"]["accuracy"]["value"]
    assert [row["class"] for row in tuned["tables"]["classes"]] == ["x", "y"]
