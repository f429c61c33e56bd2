"""Every task from the command line: train, evaluate, export; the same in PEFT; resumed; refused with file and line."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from loratune.adapter.attach import load_adapter
from loratune.cli.main import run as command
from loratune.model import heads
from loratune.model.images import Images
from loratune.model.load import load_model
from loratune.tasks.judge import labels_beside
from tasks.task_models import in_peft
from tasks.toy_tasks import alike, mirrored, people, questions, save_model, save_segformer, sentiment, shapes, write


@dataclass(frozen=True)
class Case:
    """A task on a tiny model of a family; figure: what models are compared by, and at least how high it must be."""

    family: str
    make: Callable[..., Any]
    suffix: str
    figure: str
    least: float
    options: str


CASES = {
    "SEQ_CLS": Case("llama", sentiment, ".jsonl", "accuracy", 0.75, "--preset deep --epochs 6"),
    "TOKEN_CLS": Case("llama", people, ".jsonl", "span_f1", 0.9, "--preset quality --epochs 6 --learning-rate 1e-2"),
    "QUESTION_ANS": Case("bert", questions, ".jsonl", "token_f1", 0.6, "--preset deep --epochs 4"),
    "SEQ_2_SEQ_LM": Case("t5", mirrored, ".tsv", "chrf", 8.0, "--preset deep --epochs 3 --learning-rate 1e-2"),
    "FEATURE_EXTRACTION": Case("bert", alike, ".csv", "mrr", 0.9, "--preset deep --epochs 3"),
    "SEGMENTATION": Case("segformer", shapes, ".jsonl", "mean_iou", 0.4, "--epochs 3"),
}


def stored(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows as the kind of file that the path's ending says."""
    if path.suffix == ".jsonl":
        return write(path, rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writeheader()
        table.writerows(rows)
    return path


class Project:
    """A folder with a base, rows and a run of each task that is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def base(self, family: str) -> Path:
        folder = self.folder / family
        if not folder.is_dir():
            _ = save_segformer(folder) if family == "segformer" else save_model(folder, family)
        return folder

    def data(self, task: str, count: int, seed: int = 0) -> Path:
        case = CASES[task]
        if task == "SEGMENTATION":
            return shapes(self.folder / "images", count // 2, seed, name=f"{count}-{seed}.jsonl")
        return stored(self.folder / f"{task}-{count}-{seed}{case.suffix}", case.make(count, seed=seed))

    def train(self, task: str, output: Path, options: str) -> int:
        case = CASES[task]
        words = f"train --task {task} --model {self.base(case.family)} --data {self.data(task, 120)} --output {output}"
        return command(f"{words} --learning-rate 5e-3 {options}".split())

    def run(self, task: str) -> Path:
        output = self.folder / f"run-{task}"
        if not output.exists():
            assert self.train(task, output, CASES[task].options) == 0
        return output


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


@pytest.mark.parametrize("task", CASES)
def test_a_task_trains(task: str, project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    run, figure = project.run(task), CASES[task].figure
    assert f"loratune eval {run}" in capsys.readouterr().out
    about = json.loads((run / "adapter" / "loratune.json").read_text())
    assert about["task_type"] == task
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if line["event"] == "evaluation"]
    assert last["loss"] < first["loss"]
    reached = last["figures"][figure]
    assert reached["low"] <= reached["value"] <= reached["high"]
    assert first["figures"][figure]["value"] < reached["value"] >= CASES[task].least
    assert "pipeline_tag" in (run / "adapter" / "README.md").read_text()
    assert figure.replace("_", " ") in (run / "report.html").read_text()
    assert (run / "samples.jsonl").read_text().count("\n") >= 4


@pytest.mark.parametrize("task", CASES)
def test_a_task_is_evaluated(task: str, project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    run, case = project.run(task), CASES[task]
    data, said = project.data(task, 40, seed=9), project.folder / f"said-{task}.jsonl"
    capsys.readouterr()
    assert command(f"eval {run} --data {data} --predictions {said} --json".split()) == 0
    [result] = json.loads(capsys.readouterr().out)["results"]
    assert next(iter(result["figures"])) == case.figure
    assert result["figures"][case.figure]["value"] >= case.least / 2  # of rows that it never saw
    lines = [json.loads(line) for line in said.read_text().splitlines()]
    first = 1 if case.suffix == ".jsonl" else 2
    number = len(data.read_text().splitlines()) + 1 - first
    assert [line["where"] for line in lines] == [f"{data}:{each}" for each in range(first, number + first)]
    assert all({"predicted", "label"} <= line.keys() for line in lines)


@pytest.mark.parametrize("task", CASES)
def test_the_merged_model_and_peft_say_the_same(
    task: str, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    run, base, merged = project.run(task), project.base(CASES[task].family), project.folder / f"merged-{task}"
    capsys.readouterr()
    assert command(f"export {run} --to merged --output {merged} --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["difference"] < 1e-4
    labels = labels_beside(run / "adapter")
    words: Any
    model, words = load_model(base, task_type=task, labels=labels.names, problem=labels.problem)
    load_adapter(model, run / "adapter")
    alone = heads.CLASSES[task].from_pretrained(merged).eval()
    if labels.names:
        assert alone.config.id2label == dict(enumerate(labels.names))
    if task == "SEGMENTATION":
        inputs = {"pixel_values": torch.randn(2, 3, 64, 64)}
        assert Images.of(merged) == words
    else:
        words.pad_token = words.pad_token or words.eos_token
        inputs = dict(words(["the good film was w3", "a cat"], padding=True, return_tensors="pt"))
        assert len(transformers.AutoTokenizer.from_pretrained(merged)) == len(words)
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :3]
    expected = outputs(model, inputs)
    in_their_hands = in_peft(task, base, run / "adapter", model.config).base_model
    torch.testing.assert_close(outputs(in_their_hands, inputs), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs(alone, inputs), expected, atol=1e-4, rtol=1e-4)
    assert command(f"export {run} --to merged --output {merged}".split()) == 2
    assert "exists already" in capsys.readouterr().err


@torch.no_grad()
def outputs(model: Any, inputs: Any) -> torch.Tensor:
    found = model(**inputs)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return torch.cat([found[name].flatten() for name in names if name in found])


@pytest.mark.parametrize("task", CASES)
def test_a_stopped_run_goes_on_bit_for_bit(task: str, project: Project, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert project.train(task, whole, "--max-steps 6 --save-every 3 --lora-dropout 0.1") == 0
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step-000006")
    shutil.rmtree(part / "adapter")
    assert command(f"train --resume {part}".split()) == 0
    for name in ("adapter/adapter_model.safetensors", "adapter/loratune.json"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    mine, its = (load_file(each / "checkpoints" / "step-000006" / "optimizer.safetensors") for each in (part, whole))
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in its)


# task, training rows, validation rows, what is said
BAD: dict[str, tuple[str, list[dict[str, Any]], list[dict[str, Any]], str]] = {
    "an unknown label in validation": (
        "SEQ_CLS", sentiment(20), [*sentiment(4), {"text": "the film", "label": "positve"}],
        "held.jsonl:5: the label 'positve' is not one of the 2 that are trained: negative, positive. "
        "Did you mean 'positive'?",
    ),
    "an unknown tag in validation": (
        "TOKEN_CLS", people(20), [*people(4), {"tokens": ["anna"], "tags": ["B-PRE"]}],
        "held.jsonl:5: the label 'B-PRE' is not one of the 4 that are trained",
    ),
    "fewer tags than tokens": (
        "TOKEN_CLS", [*people(6), {"tokens": ["anna", "went"], "tags": ["O"]}], people(4),
        "rows.jsonl:7: the row has 2 tokens and 1 tags",
    ),
    "an answer that is not in the context": (
        "QUESTION_ANS", [*questions(6), {"question": "who ?", "context": "the cat", "answers": "dog"}], questions(4),
        "rows.jsonl:7: the answer 'dog' does not stand in the context",
    ),
    "an answer at another place": (
        "QUESTION_ANS",
        [*questions(6), {
            "question": "who ?", "context": "the cat", "answers": {"text": ["cat"], "answer_start": [0]},
        }],
        questions(4),
        "rows.jsonl:7: the answer 'cat' does not stand at character 0 of the context",
    ),
    "one class only": (
        "SEQ_CLS", [{"text": f"w{k}", "label": "x"} for k in range(9)], sentiment(4),
        "rows.jsonl:1: every row has the same label, 'x'",
    ),
    "one tag only": (
        "TOKEN_CLS", [{"tokens": [f"w{k}"], "tags": ["O"]} for k in range(9)], people(4),
        "rows.jsonl:1: every row has the same label, 'O'",
    ),
    "a text that is a list": (
        "SEQ_2_SEQ_LM", [*mirrored(6), {"source": "the cat", "target": ["the cat"]}], mirrored(4),
        "rows.jsonl:7: target is",
    ),
    "a score that is no number": (
        "FEATURE_EXTRACTION", [*alike(6, scored=True), {"sentence1": "a", "sentence2": "b", "score": "high"}],
        alike(4, scored=True), "rows.jsonl:7: score is",
    ),
}  # fmt: skip


def refused(task: str, project: Project, capsys: pytest.CaptureFixture[str], data: str, output: Path) -> str:
    capsys.readouterr()
    base = project.base("t5" if task == "SEQ_2_SEQ_LM" else "bert")
    assert command(f"train --task {task} --model {base} {data} --output {output}".split()) == 2
    assert not output.exists()
    shown = capsys.readouterr()
    assert shown.err.count("error: ") == 1 and "Traceback" not in shown.err + shown.out
    return shown.err


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_refused_before_training(
    name: str, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, rows, held, message = BAD[name]
    data, validation = write(tmp_path / "rows.jsonl", rows), write(tmp_path / "held.jsonl", held)
    said = refused(task, project, capsys, f"--data {data} --validation {validation}", tmp_path / "run")
    assert f"{tmp_path}/{message}" in said


def test_a_class_without_an_example_is_refused(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All rows of a class may be among those that are held out."""
    data = write(tmp_path / "rows.jsonl", [{"text": f"w{k}", "label": f"c{k}"} for k in range(20)])
    said = refused("SEQ_CLS", project, capsys, f"--data {data}", tmp_path / "run")
    assert f"{data}:1 and the " in said and "hold no example of the class 'c" in said
