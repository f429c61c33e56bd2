"""SEQ_CLS against the transformers head with PEFT, its labels and its heads, and with bad input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loratune import api
from loratune.adapter.attach import attach
from loratune.adapter.config import LoraConfig
from loratune.data.rows import Row
from loratune.errors import ConfigError, DataError
from loratune.model import heads
from loratune.model.load import load_model
from loratune.tasks.labels import MULTI, REGRESSION, SINGLE, Labels, find_classes
from loratune.tasks.table import with_head
from loratune.train.config import load_run_config
from tasks.task_models import backward, check_gradients, in_peft, prepared, rows_of, set_random
from tasks.toy_tasks import save_model, sentiment, tokenizer, write

LORA = LoraConfig(r=4, lora_dropout=0.0, task_type="SEQ_CLS", target_modules="fast")
ROWS: dict[str, list[dict[str, Any]]] = {
    SINGLE: sentiment(12),
    MULTI: [{"text": f"the film was w{k}", "label": ["a", "b", "c"][: k % 4]} for k in range(12)],
    REGRESSION: [{"text": f"the film was w{k} and w{k + 1}", "label": k / 4 + 0.1} for k in range(12)],
    "pairs": [{"sentence1": f"the cat was w{k}", "sentence2": f"a dog is w{k % 5}", "label": k % 3} for k in range(12)],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family in ("bert", "roberta", "distilbert", "llama"):
        save_model(folder / family, family)
    return folder


def labelled(values: list[dict[str, Any]]) -> list[Row]:
    return rows_of("pair" if "sentence1" in values[0] else "classification", values)


def padded(words: Any, values: list[dict[str, Any]]) -> Any:
    texts = [[v[k] for v in values] for k in ("text", "sentence1", "sentence2") if k in values[0]]
    words.pad_token = words.pad_token or words.eos_token
    return words(*texts, padding=True, return_tensors="pt")


@pytest.mark.parametrize("problem", ROWS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama"])
def test_loss_and_gradients_are_those_of_peft(family: str, problem: str, bases: Path, tmp_path: Path) -> None:
    values = ROWS[problem]
    attached, examples, runner = prepared("SEQ_CLS", bases / family, labelled(values))
    set_random(attached)
    attached.save(tmp_path / "adapter")
    theirs = in_peft("SEQ_CLS", bases / family, tmp_path / "adapter", attached.model.config)

    inputs = padded(tokenizer(family), values)
    asked = torch.tensor(np.stack([example.target for example in examples]))
    labels = asked if runner.task.labels.problem == MULTI else asked[:, 0]
    expected = theirs(**inputs, labels=labels)
    expected.loss.backward()

    loss = backward(examples, runner, 24)  # several micro-batches: the cut must not matter
    assert loss == pytest.approx(float(expected.loss.detach()), abs=1e-5)
    check_gradients(attached, theirs)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_loss_is_the_models_own(family: str, bases: Path) -> None:
    for values in ROWS.values():
        _, examples, runner = prepared("SEQ_CLS", bases / family, labelled(values))
        _, ours = runner.losses(runner.batch(examples, range(len(examples))))
        own = runner.own_losses(examples)
        assert own is not None and sum(own) == pytest.approx(float(ours.sum()), rel=1e-5)


def test_labels_are_found_in_the_data() -> None:
    def found(*labels: Any) -> Labels:
        return find_classes(labelled([{"text": "a", "label": each} for each in labels]), "rows.jsonl")

    assert found("no", "yes", "no") == Labels(("no", "yes"), SINGLE)
    assert found(10, 2, 2) == Labels(("2", "10"), SINGLE)
    assert found("10", "2") == Labels(("2", "10"), SINGLE)
    assert found(["b", "a"], []) == Labels(("a", "b"), MULTI)
    assert found(1, 2.5) == Labels(("value",), REGRESSION)
    assert found("0.5", "1") == Labels(("value",), REGRESSION)
    with pytest.raises(DataError, match=r"rows.jsonl:1: every row has the same label, 'no'"):
        found("no", "no")
    with pytest.raises(DataError, match=r"rows.jsonl:2: the label is '3', but rows.jsonl:1 has a text"):
        found("no", 3)


def test_a_new_head_is_zero_in_the_base_and_begins_from_the_seed(bases: Path) -> None:
    rows = labelled(ROWS[SINGLE])
    first, again, other = (prepared("SEQ_CLS", bases / "distilbert", rows, seed=seed)[0] for seed in (0, 0, 1))
    assert first.adapter.base == other.adapter.base
    for path in ("pre_classifier", "classifier"):  # PEFT's own list has the second only
        weight = first.adapter.saved[path].weight
        assert weight.count_nonzero() == weight.numel()
        assert torch.equal(weight, again.adapter.saved[path].weight)
        assert not torch.equal(weight, other.adapter.saved[path].weight)
    with first.disabled():
        assert not first.model.classifier.weight.count_nonzero()


def test_a_stored_head_is_kept_where_it_knows_the_labels(bases: Path, tmp_path: Path) -> None:
    model, words = load_model(bases / "bert", task_type="SEQ_CLS", labels=["positive", "negative"])
    model.classifier.weight.data.fill_(0.5)
    model.save_pretrained(tmp_path / "tuned")
    words.save_pretrained(tmp_path / "tuned")
    same, _ = load_model(tmp_path / "tuned", task_type="SEQ_CLS", labels=["negative", "positive"])
    assert same.config.id2label == {0: "positive", 1: "negative"} and float(same.classifier.weight.mean()) == 0.5
    other, _ = load_model(tmp_path / "tuned", task_type="SEQ_CLS", labels=["no", "yes"])
    assert heads.new_modules(other) == ("classifier",) and not other.classifier.weight.count_nonzero()


BAD: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], str]] = {
    "special token": (
        [*sentiment(20), {"text": "good [SEP] film", "label": "positive"}],
        sentiment(4),
        r"rows.jsonl:21: .* '\[SEP\]'",
    ),
    "too long": ([*sentiment(20), {"text": "the " * 80, "label": "positive"}], sentiment(4), r"rows.jsonl:21: .* 82 "),
    "another kind": (
        [{"text": f"w{k}"} for k in range(9)],
        sentiment(4),
        r"rows.jsonl:1: a text row does not fit SEQ_CLS",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_training(name: str, bases: Path, tmp_path: Path) -> None:
    rows, validation, message = BAD[name]
    overrides = {
        "model": str(bases / "bert"),
        "data.train": str(write(tmp_path / "rows.jsonl", rows)),
        "data.validation": str(write(tmp_path / "validation.jsonl", validation)),
        "output": str(tmp_path / "run"),
        "adapter.task_type": "SEQ_CLS",
    }
    with pytest.raises(DataError, match=message):
        api.run(load_run_config(None, overrides))
    assert not (tmp_path / "run").exists()


def test_the_library_takes_a_model_whose_head_fits(bases: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", sentiment(40))
    model, words = load_model(bases / "bert", task_type="SEQ_CLS", labels=["LABEL_0", "LABEL_1"])
    attach(model, with_head(LORA, model), seed=0)
    api.train(model, words, data=data, output=tmp_path / "run", max_steps=2)
    about = json.loads((tmp_path / "run" / "adapter" / "loratune.json").read_text())
    assert about["labels"] == ["negative", "positive"]
    odd, _ = load_model(bases / "bert", task_type="SEQ_CLS", labels=["a", "b", "c"])
    attach(odd, with_head(LORA, odd), seed=0)
    with pytest.raises(ConfigError, match="the model's head has the 3 labels a, b, c; the data has the 2"):
        api.train(odd, words, data=data, output=tmp_path / "other", max_steps=2)
