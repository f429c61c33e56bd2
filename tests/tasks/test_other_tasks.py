"""Tagging, answers, sequence to sequence and vectors: loss and gradients of transformers with PEFT; runs; errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from loratune import api
from loratune.adapter.attach import attach
from loratune.adapter.config import LoraConfig
from loratune.data.formats import FORMATS
from loratune.data.rows import Row
from loratune.errors import DataError
from loratune.model import heads
from loratune.model.load import load_model
from loratune.tasks.model import TaskModel
from loratune.tasks.table import TASKS, task_of, with_head
from loratune.train.config import load_run_config
from tasks.toy_tasks import alike, mirrored, people, questions, save_model, write

KINDS = {
    "TOKEN_CLS": "tagging", "QUESTION_ANS": "question", "SEQ_2_SEQ_LM": "source_target", "FEATURE_EXTRACTION": "pair",
}  # fmt: skip
PEFT = {
    "TOKEN_CLS": (peft.PeftModelForTokenClassification, transformers.AutoModelForTokenClassification),
    "QUESTION_ANS": (peft.PeftModelForQuestionAnswering, transformers.AutoModelForQuestionAnswering),
    "SEQ_2_SEQ_LM": (peft.PeftModelForSeq2SeqLM, transformers.AutoModelForSeq2SeqLM),
    "FEATURE_EXTRACTION": (peft.PeftModelForFeatureExtraction, transformers.AutoModel),
}
CASES = [
    ("TOKEN_CLS", "bert", people), ("TOKEN_CLS", "llama", people), ("QUESTION_ANS", "bert", questions),
    ("QUESTION_ANS", "roberta", questions), ("SEQ_2_SEQ_LM", "t5", mirrored), ("SEQ_2_SEQ_LM", "bart", mirrored),
]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family in ("bert", "roberta", "llama", "t5", "bart"):
        save_model(folder / family, family)
    return folder


def rows_of(kind: str, values: list[dict[str, Any]]) -> list[Row]:
    return [Row("rows.jsonl", n, *FORMATS[kind].convert(value)) for n, value in enumerate(values, 1)]


def prepared(task_type: str, base: Path, values: list[dict[str, Any]], **settings: Any) -> tuple[Any, Any, TaskModel]:
    rows = rows_of(KINDS[task_type], values)
    labels = TASKS[task_type].find(rows, "rows.jsonl")
    model, words = load_model(base, task_type=task_type, labels=labels.names, problem=labels.problem)
    lora = LoraConfig(r=4, lora_dropout=0.0, task_type=task_type, target_modules="fast")
    attached = attach(model, with_head(lora, model), seed=0)
    task = task_of(task_type, model, words, labels, **settings)
    heads.begin(model, attached.adapter.saved, 0)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in attached.adapter.named_parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    assert task is not None
    results = task.encode_many(rows)
    return attached, [example for result in results for example in result], TaskModel(model, task)


def ours(attached: Any, examples: Any, runner: TaskModel, max_tokens: int = 60) -> float:
    number, total = sum(example.num_labels for example in examples), 0.0
    for pack in runner.cut(examples, max_tokens):
        loss, _ = runner.losses(runner.batch([examples[i] for i in pack], pack))
        (loss / number).backward()
        total += float(loss.detach()) / number
    return total


def check_gradients(attached: Any, model: Any) -> None:
    found = {name: parameter.grad for name, parameter in attached.adapter.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            name = name.replace("lora_A.default.weight", "A").replace("lora_B.default.weight", "B")
            torch.testing.assert_close(found.pop(name), parameter.grad, atol=1e-5, rtol=1e-4)
    assert not found


def in_peft(task_type: str, base: Path, attached: Any, folder: Path) -> Any:
    attached.save(folder)
    wrapper, auto = PEFT[task_type]
    names = attached.model.config.id2label if task_type == "TOKEN_CLS" else None
    model = auto.from_pretrained(base, **({"id2label": names} if names else {}))
    loaded = peft.PeftModel.from_pretrained(model, folder, is_trainable=True).eval()
    assert isinstance(loaded, wrapper)
    return loaded


@pytest.mark.parametrize(("task_type", "family", "make"), CASES)
def test_loss_and_gradients_are_those_of_peft(
    task_type: str, family: str, make: Callable[[int], Any], bases: Path, tmp_path: Path
) -> None:
    attached, examples, runner = prepared(task_type, bases / family, make(6))
    theirs = in_peft(task_type, bases / family, attached, tmp_path / "adapter")
    number, expected = sum(example.num_labels for example in examples), 0.0
    for example in examples:  # each alone, so that nothing is padded
        labels = runner.task.own_labels(example)
        assert labels is not None
        columns = {name: torch.from_numpy(each.astype(np.int64))[None] for name, each in example.columns.items()}
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        # Its inner model: PeftModelForQuestionAnswering of 0.21 takes token_type_ids and does not hand them on.
        loss = theirs.base_model(input_ids=ids, **columns, **labels).loss * example.num_labels / number
        loss.backward()
        expected += float(loss.detach())
    assert ours(attached, examples, runner) == pytest.approx(expected, abs=1e-5)
    check_gradients(attached, theirs)


@pytest.mark.parametrize("scored", [False, True])
def test_vectors_are_trained_as_sentence_transformers_does(scored: bool, bases: Path, tmp_path: Path) -> None:
    values = alike(6, scored=scored)
    attached, examples, runner = prepared("FEATURE_EXTRACTION", bases / "bert", values)
    theirs = in_peft("FEATURE_EXTRACTION", bases / "bert", attached, tmp_path / "adapter")
    sides = []
    for key in ("sentence1", "sentence2"):
        inputs = runner.task.tokenizer([value[key] for value in values], padding=True, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        states = theirs(**inputs).last_hidden_state
        sides.append((states * mask).sum(1) / mask.sum(1))
    if scored:
        asked = torch.tensor([value["score"] for value in values])
        expected = F.mse_loss(F.cosine_similarity(*sides), asked)
    else:
        first, second = (F.normalize(side, dim=-1) for side in sides)
        expected = F.cross_entropy(20 * first @ second.T, torch.arange(len(first)))
    expected.backward()
    assert ours(attached, examples, runner, 16) == pytest.approx(float(expected.detach()), abs=1e-5)
    check_gradients(attached, theirs)


def test_tags_stand_on_the_first_token_of_a_word(bases: Path) -> None:
    row = {"tokens": ["anna", "a-b", "paris"], "tags": ["B-PER", "B-LOC", "O"]}
    _, [first, *_], runner = prepared("TOKEN_CLS", bases / "bert", [row, *people(5)])
    numbers = runner.task.labels.numbers
    ids = runner.task.tokenizer.convert_ids_to_tokens(first.input_ids.tolist())
    assert ids == ["[CLS]", "anna", "a", "[UNK]", "[UNK]", "paris", "[SEP]"]
    tags = [numbers["B-PER"], numbers["B-LOC"], -100, -100, numbers["O"]]
    assert first.target.tolist() == [-100, *tags, -100] and first.num_labels == 3
    _, [every, *_], _ = prepared("TOKEN_CLS", bases / "bert", [row, *people(5)], train_on="all")
    assert every.target[3:5].tolist() == [numbers["I-LOC"]] * 2


def test_an_answer_is_found_in_every_window_that_holds_it(bases: Path) -> None:
    words = ["the"] * 100
    words[48] = "anna"
    row = {"question": "who ?", "context": " ".join(words), "answers": "anna"}
    _, examples, runner = prepared("QUESTION_ANS", bases / "bert", [row])
    assert len(examples) > 2 and sum(bool(example.target.any()) for example in examples) >= 1
    for example in examples:
        start, end = example.target
        said = runner.task.tokenizer.decode(example.input_ids[start : end + 1])
        assert said == ("anna" if example.target.any() else "[CLS]")
        assert example.num_tokens <= 64


def test_the_best_window_answers(bases: Path) -> None:
    row = {"question": "who ?", "context": "the cat anna was a dog boris", "answers": "anna"}
    _, [example], runner = prepared("QUESTION_ANS", bases / "bert", [row])
    scores = runner.task.score([example, example], [(1.0, 0.0, 0, 3), (2.0, 5.0, 8, 12)])
    assert scores.figures["exact_match"].value == 1.0  # "not here" is no answer where every question has one


RUNS = [
    ("TOKEN_CLS", "llama", people, "span_f1", 0.9),
    ("QUESTION_ANS", "bert", questions, "token_f1", None),
    ("SEQ_2_SEQ_LM", "t5", mirrored, "chrf", None),
    ("FEATURE_EXTRACTION", "bert", alike, "mrr", None),
]


@pytest.mark.parametrize(("task_type", "family", "make", "figure", "least"), RUNS)
def test_each_task_trains_from_data_to_adapter(
    task_type: str, family: str, make: Any, figure: str, least: float | None, bases: Path, tmp_path: Path
) -> None:
    overrides = {
        "model": str(bases / family),
        "data.train": str(write(tmp_path / "rows.jsonl", make(80))),
        "output": str(tmp_path / "run"),
        "adapter.task_type": task_type,
        "adapter.preset": "quality",
        "train.learning_rate": 1e-2,
        "train.epochs": 6.0,
        "train.batch_size": 16,
    }
    result = api.run(load_run_config(None, overrides), lambda event: None)
    assert result.before is not None and result.after is not None and result.after.loss < result.before.loss
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["event"] == "evaluation"][-1]["figures"][figure]
    assert last["low"] <= last["value"] <= last["high"] and (least is None or last["value"] >= least)
    assert result.samples_after[0].prompt


BAD = {
    "tags and tokens": ("TOKEN_CLS", [{"tokens": ["a", "b"], "tags": ["O"]}], r"rows.jsonl:7: .* 2 tokens and 1 tags"),
    "no answer there": (
        "QUESTION_ANS", [{"question": "who ?", "context": "the cat", "answers": "dog"}], r"rows.jsonl:7: .* 'dog'",
    ),
    "long question": (
        "QUESTION_ANS",
        [{"question": "who " * 50, "context": "the cat", "answers": "cat"}],
        r"rows.jsonl:7: the question takes 54 tokens of a window of 64",
    ),
    "long target": ("SEQ_2_SEQ_LM", [{"source": "a", "target": "the " * 90}], r"rows.jsonl:7: the row is 91 tokens"),
    "score missing": (
        "FEATURE_EXTRACTION",
        [{"sentence1": "a", "sentence2": "b", "score": 1}],
        r"rows.jsonl:1: this pair has no score, but .*rows.jsonl:7 has one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(name: str, bases: Path, tmp_path: Path) -> None:
    task_type, bad, message = BAD[name]
    make = {"TOKEN_CLS": people, "QUESTION_ANS": questions, "SEQ_2_SEQ_LM": mirrored, "FEATURE_EXTRACTION": alike}
    data = write(tmp_path / "rows.jsonl", [*make[task_type](6), *bad])
    base = bases / ("bart" if task_type == "SEQ_2_SEQ_LM" else "bert")
    overrides = {"model": str(base), "data.train": str(data), "output": str(tmp_path / "run")}
    with pytest.raises(DataError, match=message):
        api.run(load_run_config(None, {**overrides, "adapter.task_type": task_type}))
