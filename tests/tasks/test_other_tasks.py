"""Tagging, answers, sequence to sequence and vectors: loss and gradients of transformers with PEFT; errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loratune import api
from loratune.errors import DataError
from loratune.tasks.model import TaskModel
from loratune.train.config import load_run_config
from tasks.task_models import KINDS, backward, check_gradients, in_peft, prepared, rows_of, set_random
from tasks.toy_tasks import alike, mirrored, people, questions, save_model, write

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


def made(task_type: str, base: Path, values: list[dict[str, Any]], **settings: Any) -> tuple[Any, Any, TaskModel]:
    attached, examples, runner = prepared(task_type, base, rows_of(KINDS[task_type], values), **settings)
    set_random(attached)
    return attached, examples, runner


@pytest.mark.parametrize(("task_type", "family", "make"), CASES)
def test_loss_and_gradients_are_those_of_peft(
    task_type: str, family: str, make: Callable[[int], Any], bases: Path, tmp_path: Path
) -> None:
    attached, examples, runner = made(task_type, bases / family, make(6))
    attached.save(tmp_path / "adapter")
    theirs = in_peft(task_type, bases / family, tmp_path / "adapter", attached.model.config)
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
    assert backward(examples, runner, 60) == pytest.approx(expected, abs=1e-5)
    check_gradients(attached, theirs)


@pytest.mark.parametrize("scored", [False, True])
def test_vectors_are_trained_as_sentence_transformers_does(scored: bool, bases: Path, tmp_path: Path) -> None:
    values = alike(6, scored=scored)
    attached, examples, runner = made("FEATURE_EXTRACTION", bases / "bert", values)
    attached.save(tmp_path / "adapter")
    theirs = in_peft("FEATURE_EXTRACTION", bases / "bert", tmp_path / "adapter", attached.model.config)
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
    assert backward(examples, runner, 16) == pytest.approx(float(expected.detach()), abs=1e-5)
    check_gradients(attached, theirs)


def test_tags_stand_on_the_first_token_of_a_word(bases: Path) -> None:
    row = {"tokens": ["anna", "a-b", "paris"], "tags": ["B-PER", "B-LOC", "O"]}
    _, [first, *_], runner = made("TOKEN_CLS", bases / "bert", [row, *people(5)])
    numbers = runner.task.labels.numbers
    ids = runner.task.tokenizer.convert_ids_to_tokens(first.input_ids.tolist())
    assert ids == ["[CLS]", "anna", "a", "[UNK]", "[UNK]", "paris", "[SEP]"]
    tags = [numbers["B-PER"], numbers["B-LOC"], -100, -100, numbers["O"]]
    assert first.target.tolist() == [-100, *tags, -100] and first.num_labels == 3
    _, [every, *_], _ = made("TOKEN_CLS", bases / "bert", [row, *people(5)], train_on="all")
    assert every.target[3:5].tolist() == [numbers["I-LOC"]] * 2


def test_an_answer_is_found_in_every_window_that_holds_it(bases: Path) -> None:
    words = ["the"] * 100
    words[48] = "anna"
    row = {"question": "who ?", "context": " ".join(words), "answers": "anna"}
    _, examples, runner = made("QUESTION_ANS", bases / "bert", [row])
    assert len(examples) > 2 and sum(bool(example.target.any()) for example in examples) >= 1
    for example in examples:
        start, end = example.target
        said = runner.task.tokenizer.decode(example.input_ids[start : end + 1])
        assert said == ("anna" if example.target.any() else "[CLS]")
        assert example.num_tokens <= 64


def test_the_best_window_answers(bases: Path) -> None:
    row = {"question": "who ?", "context": "the cat anna was a dog boris", "answers": "anna"}
    _, [example], runner = made("QUESTION_ANS", bases / "bert", [row])
    scores = runner.task.score([example, example], [(1.0, 0.0, 0, 3), (2.0, 5.0, 8, 12)])
    assert scores.figures["exact_match"].value == 1.0  # "not here" is no answer where every question has one


BAD = {
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
