"""The page of a run: true to its files, whole without a network, in both languages, and drawn without an error."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from loratune import api, files
from loratune.cli.main import run as command
from loratune.data.dataset import Dataset
from loratune.data.ledger import Ledger, Reject
from loratune.errors import ConfigError
from loratune.language import language
from loratune.report import charts, run_texts
from loratune.report.run_files import RunFiles, paired
from loratune.report.run_page import compare_page, differences, paired_test, run_page, verdict
from loratune.train.config import load_run_config
from loratune.train.datasets import ledger_lines
from tiny_run import copy_rows, save_model, write_rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two short real runs on the same rows, the second with a higher rank."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_model(folder / "base")
    data = write_rows(folder / "rows.jsonl", copy_rows(60))
    for name, r in (("first", 2), ("second", 4)):
        given = {"model": str(model), "output": str(folder / name), "data.train": str(data), "adapter.r": r}
        settings = {"train.epochs": 3.0, "train.eval_every": 5, "train.learning_rate": 0.02, "train.save_every": 5}
        api.run(load_run_config(None, given | settings))
    return folder / "first", folder / "second"


def test_every_run_ends_with_its_page(runs: tuple[Path, Path]) -> None:
    page = (runs[0] / api.REPORT).read_text("utf-8")
    assert page == run_page(runs[0], language())
    last = RunFiles.open(runs[0]).kept
    assert last is not None and f"{last['loss']:.3f}" in page and "adapter.r" in page and "--r" in page
    assert page.count("<svg") == 6 and "down_proj" in page  # five curves, the spectra; the coverage map


def test_the_page_needs_nothing_from_elsewhere_and_shows_text_as_text(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(runs[0], folder)
    sample = {"when": "after", "prompt": "<script>alert(1)</script>", "answer": "&<b>", "reference": "</table>"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = run_page(folder)
    assert not re.search(r"<script|https?://|src=|url\(|@import|<link", page)
    assert "&lt;script&gt;alert(1)" in page and "&amp;&lt;b&gt;" in page


def test_each_split_of_the_ledger_has_its_own_counts(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "split"
    shutil.copytree(runs[0], folder)
    training, validation = Ledger(), Ledger()
    training.rows_in, validation.rows_in = 480, 48
    validation.note("duplicates", "held.jsonl:7", "as 3")
    validation.rejects.append(Reject("held.jsonl", 9, "the answer is empty"))
    datasets = [Dataset([], [], "", "text", ledger=ledger) for ledger in (training, validation)]
    (folder / "ledger.jsonl").write_text(ledger_lines(*datasets))
    page = run_page(folder)
    assert re.search(r"training</td><td>480</td>", page) and re.search(r"held out</td><td>48</td>", page)
    assert "held.jsonl:7: as 3" in page and "the answer is empty" in page


@pytest.mark.parametrize("which", ["en", "uk"])
def test_both_languages_say_the_same_things(which: str, runs: tuple[Path, Path]) -> None:
    texts = run_texts.TEXTS[which]
    assert texts.keys() == run_texts.TEXTS["en"].keys()
    for key, text in run_texts.TEXTS["en"].items():
        assert set(re.findall(r"{\w+}", texts[key])) == set(re.findall(r"{\w+}", text)), key
    if which == "uk":
        assert not [key for key, text in texts.items() if not re.search("[а-яіїєґ]", text.lower()) and "{" not in text]
    page = run_page(runs[0], which)
    assert f'lang="{which}"' in page and texts["loss"] in page and texts["settings_note"] in page


def test_the_paired_difference_is_that_of_the_evaluations(runs: tuple[Path, Path]) -> None:
    one, other = map(RunFiles.open, runs)
    assert one.kept is not None and other.kept is not None
    found = paired(one, one.kept["step"], other, other.kept["step"])
    assert found is not None and found.value == pytest.approx(other.kept["loss"] - one.kept["loss"], abs=1e-9)
    assert found.low < found.value < found.high
    test = paired_test(one, other)
    assert test["value"] == found.value and test["rows"] == one.kept["num_rows"]


def test_runs_on_other_rows_are_not_paired(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(runs[1], folder)
    record = json.loads((folder / "evaluations.json").read_bytes())
    files.write_json(folder / "evaluations.json", record | {"digest": "0"})
    assert paired_test(RunFiles.open(runs[0]), RunFiles.open(folder))["verdict"] == "unpaired"


def _with_losses(folder: Path, tmp_path: Path, change: float) -> RunFiles:
    """A copy of a run whose every held-out row ended `change` a label away from where it began."""
    copy = tmp_path / f"changed{change}"
    shutil.copytree(folder, copy)
    run = RunFiles(copy)
    record, step = run.documents, run.kept["step"]  # type: ignore[index]
    record["losses"][str(step)] = [loss + change * n for loss, n in zip(record["losses"]["0"], record["labels"])]
    files.write_json(copy / "evaluations.json", record)
    return RunFiles.open(copy)


@pytest.mark.parametrize(("change", "expected"), [(-0.01, "better"), (0.01, "worse"), (0.0, "same")])
def test_the_verdict_is_over_the_difference_of_each_row(
    change: float, expected: str, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    """A small change of every row is clear, however far the rows are apart."""
    assert verdict(_with_losses(runs[0], tmp_path, change)) == expected


def test_a_run_that_was_killed_shows_what_there_is(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    shutil.copytree(runs[0], folder)
    shutil.rmtree(folder / "adapter")
    for name in ("samples.jsonl", "evaluations.json", api.REPORT):
        (folder / name).unlink()
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    page = run_page(folder)
    assert "has not ended" in page and "<svg" in page
    with pytest.raises(ConfigError, match=r"is not a run: run\.yaml is missing"):
        run_page(tmp_path)


def test_a_damaged_record_is_named(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(runs[0], folder)
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().replace(b'{"event": "step", "step": 2,', b'{"event": "step", "step": 2;'))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:\d+ is damaged"):
        run_page(folder)


def test_an_adapter_that_cannot_be_read_is_said_on_the_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "touched"
    shutil.copytree(runs[0], folder)
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "adapter_model.safetensors" in run_page(folder)


def test_the_checkpoints_of_a_run_that_was_stopped_stay(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stopped run has an adapter too, but without its checkpoints it could not be taken up again."""
    folder = tmp_path / "stopped"
    shutil.copytree(runs[0], folder)
    about = folder / "adapter" / "loratune.json"
    files.write_json(about, json.loads(about.read_bytes()) | {"ended": False})
    assert command(["runs", "clean", str(folder), "--yes"]) == 0 and (folder / "checkpoints").is_dir()
    assert "has not ended" in run_page(folder)
    capsys.readouterr()
    assert command(["runs", "show", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "not ended"


def test_the_comparison_names_what_differs(runs: tuple[Path, Path]) -> None:
    rows = differences([RunFiles.open(folder) for folder in runs])
    assert [row for row in rows if row[0] == "adapter.r"] == [["adapter.r", "2", "4"]]
    assert not [row for row in rows if row[0] in ("output", "model", "train.epochs")]
    page = compare_page(runs)
    assert "first" in page and "second" in page and "on the same" in page and page.count("<svg") == 5


def test_the_verb_lists_shows_compares_and_cleans(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*args: str) -> dict[str, object]:
        assert command(["runs", *args, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    listed = call("list", str(runs[0].parent))["runs"]
    assert [Path(row["run"]).name for row in listed] == ["first", "second"]  # type: ignore[union-attr, index]
    assert call("show", str(runs[0]), "--lang", "uk")["state"] == "ended"
    assert 'lang="uk"' in (runs[0] / api.REPORT).read_text("utf-8")
    page = tmp_path / "pages" / "both.html"
    found = call("compare", *map(str, runs), "--output", str(page))
    assert found["differences"] and page.read_text("utf-8") == compare_page(runs, language())
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    assert call("clean", str(copy))["bytes"] and (copy / "checkpoints").is_dir()
    call("clean", str(copy), "--yes")
    assert not (copy / "checkpoints").exists() and (copy / "adapter").is_dir()
    assert command(["runs", "compare", str(runs[0])]) == 2 and command(["runs", "list", str(tmp_path / "none")]) == 2
    assert "Give two runs or more" in capsys.readouterr().err


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0.0, 1.0), (0.31, 0.97), (-3.0, 250.0), (1e-5, 5e-4), (7.0, 7.0)):
        found = charts.ticks(low, high, 5)
        assert found and all(low - 1e-9 <= value <= high + 1e-9 for value in found) and len(found) <= 7
    assert charts.ticks(0.0, 1.0, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    shown = [charts.short(value) for value in (0.0005, 0.25, 1234.0, 3_200_000.0, 12_500.0, 0.0)]
    assert shown == ["5e-4", "0.25", "1,234", "3.2M", "12.5k", "0"]


def test_a_long_line_is_thinned_to_means() -> None:
    points = [(float(step), math.sin(step)) for step in range(10_000)]
    drawn = charts.line_chart([charts.Series("x", points)], "x")
    assert 300 < drawn.count(",") < 500


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_draws_it_without_an_error(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for name, page in (("run", run_page(runs[0], "uk")), ("both", compare_page(runs))):
        path = tmp_path / f"{name}.html"
        path.write_text(page, "utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        done = subprocess.run(["chromium", *flags, f"file://{path}"], capture_output=True, text=True, timeout=120)
        assert done.stdout.count("<polyline") >= 5 and "CONSOLE" not in done.stderr, done.stderr[-2000:]
