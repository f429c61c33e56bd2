"""SEQ_CLS against the transformers head with PEFT, from the command line and back, and with bad input."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from loratune import api
from loratune.adapter.attach import attach
from loratune.adapter.config import LoraConfig
from loratune.cli.main import run as command
from loratune.data.rows import Row
from loratune.errors import ConfigError, DataError
from loratune.model import heads
from loratune.model.load import load_model
from loratune.tasks.labels import MULTI, REGRESSION, SINGLE, Labels, find_classes
from loratune.tasks.model import TaskModel
from loratune.tasks.table import task_of, with_head
from loratune.train.config import load_run_config
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


def rows_of(values: list[dict[str, Any]]) -> list[Row]:
    kind = "pair" if "sentence1" in values[0] else "classification"
    return [Row("rows.jsonl", number, kind, value) for number, value in enumerate(values, 1)]


def prepared(base: Path, rows: list[Row], lora: LoraConfig = LORA, seed: int = 0) -> tuple[Any, Any, TaskModel]:
    labels = find_classes(rows, "rows.jsonl")
    model, words = load_model(base, task_type="SEQ_CLS", labels=labels.names, problem=labels.problem)
    attached = attach(model, with_head(lora, model), seed=seed)
    task = task_of("SEQ_CLS", model, words, labels)
    heads.begin(model, attached.adapter.saved, seed)
    assert task is not None
    return attached, [example for result in task.encode_many(rows) for example in result], TaskModel(model, task)


def set_random(attached: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for _, parameter in attached.adapter.named_parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def peft_model(base: Path, folder: Path, attached: Any) -> Any:
    labels = attached.model.config
    with torch.random.fork_rng():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=labels.num_labels, problem_type=labels.problem_type, pad_token_id=labels.pad_token_id
        )
    loaded = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    assert isinstance(loaded, peft.PeftModelForSequenceClassification)
    return loaded.eval()


def padded(words: Any, values: list[dict[str, Any]]) -> Any:
    texts = [[v[k] for v in values] for k in ("text", "sentence1", "sentence2") if k in values[0]]
    words.pad_token = words.pad_token or words.eos_token
    return words(*texts, padding=True, return_tensors="pt")


@pytest.mark.parametrize("problem", ROWS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama"])
def test_loss_and_gradients_are_those_of_peft(family: str, problem: str, bases: Path, tmp_path: Path) -> None:
    values = ROWS[problem]
    attached, examples, runner = prepared(bases / family, rows_of(values))
    set_random(attached)
    attached.save(tmp_path / "adapter")
    theirs = peft_model(bases / family, tmp_path / "adapter", attached)

    inputs = padded(tokenizer(family), values)
    asked = torch.tensor(np.stack([example.target for example in examples]))
    labels = asked if runner.task.labels.problem == MULTI else asked[:, 0]
    expected = theirs(**inputs, labels=labels)
    expected.loss.backward()

    number = sum(example.num_labels for example in examples)
    total = 0.0
    for pack in runner.cut(examples, 24):  # several micro-batches: the cut must not matter
        loss, _ = runner.losses(runner.batch([examples[i] for i in pack], pack))
        (loss / number).backward()
        total += float(loss.detach()) / number
    assert total == pytest.approx(float(expected.loss), abs=1e-5)
    found = {name: p.grad for name, p in attached.adapter.named_parameters()}
    for name, gradient in theirs_by_name(theirs).items():
        torch.testing.assert_close(found.pop(name), gradient, atol=1e-5, rtol=1e-4)
    assert not found


def theirs_by_name(model: Any) -> dict[str, torch.Tensor]:
    named: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            named[name.replace("lora_A.default.weight", "A").replace("lora_B.default.weight", "B")] = parameter.grad
    return named


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_loss_is_the_models_own(family: str, bases: Path) -> None:
    for values in ROWS.values():
        _, examples, runner = prepared(bases / family, rows_of(values))
        _, ours = runner.losses(runner.batch(examples, range(len(examples))))
        own = runner.own_losses(examples)
        assert own is not None and sum(own) == pytest.approx(float(ours.sum()), rel=1e-5)


def test_labels_are_found_in_the_data() -> None:
    def found(*labels: Any) -> Labels:
        return find_classes(rows_of([{"text": "a", "label": each} for each in labels]), "rows.jsonl")

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
    rows = rows_of(ROWS[SINGLE])
    first, again, other = (prepared(bases / "distilbert", rows, seed=seed)[0] for seed in (0, 0, 1))
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


def train(base: Path, data: Path, output: Path, **settings: Any) -> Any:
    overrides = {f"train.{name}": value for name, value in settings.items()}
    overrides |= {"model": str(base), "data.train": str(data), "output": str(output), "adapter.task_type": "SEQ_CLS"}
    events: list[dict[str, Any]] = []
    result = api.run(load_run_config(None, overrides), events.append)
    return result, events


def test_a_task_trains_from_the_command_line(bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = write(tmp_path / "rows.jsonl", sentiment(160)), tmp_path / "run"
    code = command(
        f"train --task SEQ_CLS --model {bases / 'llama'} --data {data} --output {run} --preset deep "
        "--learning-rate 5e-3 --epochs 8".split()
    )
    shown = capsys.readouterr().out
    assert code == 0 and "accuracy" in shown and f"loratune eval {run}" in shown
    about = json.loads((run / "adapter" / "loratune.json").read_text())
    assert about["labels"] == ["negative", "positive"] and about["problem"] == SINGLE
    evaluations = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "figures" in line]
    last = evaluations[-1]["figures"]["accuracy"]
    assert last["value"] >= 0.9 and last["low"] <= last["value"] <= last["high"]
    assert {row["class"] for row in evaluations[-1]["tables"]["classes"]} == {"negative", "positive"}
    assert "text-classification" in (run / "adapter" / "README.md").read_text()
    assert (run / "report.html").is_file()


def test_a_stopped_run_goes_on_bit_for_bit(bases: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", sentiment(64))
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(bases / "roberta", data, whole, max_steps=6, save_every=3, keep=9)
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step-000006")
    shutil.rmtree(part / "adapter")
    api.resume(part)
    for name in ("adapter_model.safetensors", "loratune.json"):
        assert (part / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()


def test_peft_loads_the_runs_adapter_with_the_same_outputs(bases: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", sentiment(64))
    for family in ("bert", "llama"):
        train(bases / family, data, tmp_path / family, max_steps=3)
        adapter = tmp_path / family / "adapter"
        model, _ = load_model(bases / family, task_type="SEQ_CLS", labels=["negative", "positive"], problem=SINGLE)
        attached = api.load_adapter(model, adapter)
        theirs = peft_model(bases / family, adapter, attached)
        inputs = padded(tokenizer(family), ROWS[SINGLE])
        torch.testing.assert_close(attached.model(**inputs).logits, theirs(**inputs).logits, atol=1e-5, rtol=1e-5)


BAD: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], str]] = {
    "unknown label": (
        sentiment(20),
        [*sentiment(4), {"text": "the film", "label": "positve"}],
        r"validation.jsonl:5: the label 'positve' is not one of the 2 .* Did you mean 'positive'\?",
    ),
    "one class": ([{"text": f"w{k}", "label": "x"} for k in range(9)], sentiment(4), r"rows.jsonl:1: every row has"),
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


def test_a_class_that_is_held_out_whole_is_named(bases: Path, tmp_path: Path) -> None:
    rows = [{"text": f"w{k}", "label": f"c{k}"} for k in range(20)]
    data = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"no example of the class 'c\d+'"):
        train(bases / "bert", data, tmp_path / "run")


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
