"""The front door: what a run leaves behind, that both doors lead to the same run, and what is checked before one."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import loratune
from loratune import api
from loratune.adapter.attach import attach, load_adapter
from loratune.adapter.config import LoraConfig
from loratune.api import RunResult
from loratune.data.dataset import load_dataset
from loratune.data.encode import Encoder
from loratune.errors import ConfigError, DataError
from loratune.evaluate.loss import evaluate
from loratune.model.causal import CausalModel
from loratune.model.load import load_model
from loratune.train.config import load_run_config
from oracles import relative
from tiny_run import CONTEXT, copy_rows, lines_of, save_model, tiny_llama, tokenizer, tree, write_rows

SETTINGS: dict[str, Any] = {"epochs": 2.0, "learning_rate": 0.02}


class Done:
    """One finished run, the events it sent, and what it was made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_model(folder / "model", initializer_range=0.2)
        self.data = write_rows(folder / "rows.jsonl", copy_rows(60))
        self.validation = write_rows(folder / "held.jsonl", copy_rows(6, seed=1))
        self.events: list[dict[str, Any]] = []
        self.output = folder / "run"
        self.result = self.run(self.output)

    def run(self, output: Path, **changes: Any) -> RunResult:
        overrides: dict[str, Any] = {
            "model": str(self.model), "data.train": str(self.data), "data.validation": str(self.validation),
            "output": str(output), **{f"train.{name}": value for name, value in SETTINGS.items()}, **changes,
        }  # fmt: skip
        return api.run(load_run_config(None, overrides), self.events.append)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return Done(tmp_path_factory.mktemp("api"))


def test_a_run_leaves_these_files_and_no_others(done: Done) -> None:
    assert {path.name for path in done.output.iterdir()} == {
        "run.yaml", "ledger.jsonl", "metrics.jsonl", "samples.jsonl", "evaluations.json", "report.html", "checkpoints",
        "adapter",
    }  # fmt: skip
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "loratune.json", "tokenizer.json"} <= {
        path.name for path in (done.output / "adapter").iterdir()
    }
    assert not list(done.folder.rglob(".*"))  # nothing temporary


def test_the_result_says_what_happened(done: Done) -> None:
    result = done.result
    assert (result.output, result.status, result.steps) == (done.output, "done", 16)
    assert result.before is not None and result.after is not None
    evaluated = lines_of(done.output / "metrics.jsonl", "evaluation")
    assert result.before.loss == evaluated[0]["loss"]
    assert result.after.loss == min(line["loss"] for line in evaluated[1:]) < result.before.loss - 1
    assert result.after.perplexity == pytest.approx(math.exp(result.after.loss))
    assert result.after.num_rows == 6 == len(result.after.document_losses)
    assert result.after.loss == pytest.approx(sum(result.after.document_losses) / sum(result.after.document_labels))


def test_events_tell_the_run_in_order(done: Done) -> None:
    names = [event["event"] for event in done.events if event["event"] != "notice"]
    assert names[:3] == ["summary", "start", "evaluation"] and names[-1] == "end"
    assert [event["step"] for event in done.events if event["event"] == "step"] == list(range(1, 17))
    start = next(event for event in done.events if event["event"] == "start")
    assert (start["num_documents"], start["num_validation"], start["num_steps"]) == (60, 6, 16)
    json.dumps(done.events, allow_nan=False)


def test_the_adapter_gives_the_loss_that_was_measured(done: Done) -> None:
    """Loaded onto a new copy of the base, as anybody would."""
    model, own = load_model(done.model)
    load_adapter(model, done.output / "adapter")
    rows = load_dataset(done.validation, Encoder(own, CONTEXT))
    found = evaluate(CausalModel(model), rows.documents, 2048)
    assert done.result.after is not None
    assert found.loss == pytest.approx(done.result.after.loss, rel=1e-6)


def test_samples_stand_beside_their_references(done: Done) -> None:
    lines = [json.loads(line) for line in (done.output / "samples.jsonl").read_text().splitlines()]
    assert [line["when"] for line in lines] == ["before"] * 3 + ["after"] * 3
    rows = copy_rows(6, seed=1)[:3]
    assert [(line["prompt"], line["reference"]) for line in lines] == 2 * [(r["prompt"], r["completion"]) for r in rows]
    assert [line["answer"] for line in lines[:3]] != [line["answer"] for line in lines[3:]]


def test_the_saved_configuration_is_the_run_again(done: Done, tmp_path: Path) -> None:
    resolved = load_run_config(done.output / "run.yaml", {"output": str(tmp_path / "again")})
    api.run(resolved)
    again, first = (tree(run / "adapter") for run in (tmp_path / "again", done.output))
    assert again["adapter_config.json"] == first["adapter_config.json"]
    assert losses(tmp_path / "again") == losses(done.output)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines_of(run / "metrics.jsonl")]


def test_the_function_and_the_configuration_are_one_run(done: Done, tmp_path: Path) -> None:
    model, own = load_model(done.model)
    attached = attach(model, LoraConfig.preset("fast", task_type="CAUSAL_LM"), seed=0)
    result = loratune.train(
        model, own, data=done.data, validation=done.validation, output=tmp_path / "run", **SETTINGS
    )  # fmt: skip
    assert losses(tmp_path / "run") == losses(done.output)
    assert (tmp_path / "run/adapter/adapter_config.json").read_bytes() == (
        done.output / "adapter/adapter_config.json"
    ).read_bytes()
    attached.save(tmp_path / "saved")
    info, saved = api.adapter_info(tmp_path / "run"), api.adapter_info(tmp_path / "saved")
    assert info["sites"] == saved["sites"] and result.status == "done"


def test_train_is_a_function_whatever_was_imported_first() -> None:
    """A package of the same name stands beside it: `loratune.train` has to be callable before and after its import."""
    program = """
import loratune
first = loratune.train
from loratune.train import loop
from loratune.train.config import TrainConfig
import loratune.train.schedule as schedule
for function in (first, loratune.train, loratune.train):
    try:
        function(None, None, data="", output="")
    except Exception as error:
        assert type(error).__name__ != "TypeError", error
from loratune import train
assert callable(train) and loop.train and schedule.rate
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_norm_of_an_update_is_that_of_the_whole_matrix(done: Done) -> None:
    info = api.adapter_info(done.output)
    model, _ = load_model(done.model)
    plain = {name: weight.clone() for name, weight in model.named_parameters()}
    load_adapter(model, done.output / "adapter").merge()
    assert len(info["sites"]) == 4
    assert info["num_parameters"] == sum(8 * (site["inputs"] + site["outputs"]) for site in info["sites"])
    for site in info["sites"]:
        change = model.get_submodule(site["path"]).weight - plain[f"{site['path']}.weight"]
        assert site["norm_update"] == pytest.approx(float(change.double().norm()), rel=1e-4)
        assert site["r"] == 8 and site["scale"] == 2
    assert info["roles"]["query"] == info["roles"]["value"] == 2 and info["roles"]["head"] == 0
    assert info["config"]["base_model_name_or_path"] == str(done.model)


def test_the_tokenizer_beside_the_adapter_is_the_model_s(done: Done) -> None:
    text = "1 2 3 = Київ"
    assert AutoTokenizer.from_pretrained(done.output / "adapter").encode(text) == tokenizer().encode(text)


@pytest.mark.parametrize("num_rows", [3, 5, 24, 60])
def test_a_few_rows_are_enough_to_hold_two_out(tmp_path: Path, num_rows: int) -> None:
    """Without a validation file at least two different rows are held out, and none of them is trained on."""
    rows = [{"prompt": f"{number} =", "completion": f" {number}"} for number in range(num_rows)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    events: list[dict[str, Any]] = []
    model = tiny_llama()
    attach(model, LoraConfig(), seed=0)
    result = api.train(model, tokenizer(), data=data, output=tmp_path / "run", max_steps=1, on_event=events.append)
    start = next(event for event in events if event["event"] == "start")
    assert start["num_documents"] + start["num_validation"] == num_rows
    assert start["num_validation"] >= 2 and start["num_documents"] >= 1
    assert result.after is not None and result.after.low <= result.after.loss <= result.after.high


def test_documents_as_long_as_the_context_can_be_trained_and_sampled(tmp_path: Path) -> None:
    """Samples are cut to what fits behind the longest prompt."""
    encoder = Encoder(tokenizer(), CONTEXT)
    rows = [{"prompt": "1 " * n + "=", "completion": " 1"} for n in (43, 44, 45)]
    while len(encoder.prompt(rows[-1]["prompt"])) < CONTEXT - 2:
        rows[-1]["prompt"] = "1" + rows[-1]["prompt"]
    held = write_rows(tmp_path / "held.jsonl", rows)
    assert max(load_dataset(held, encoder).lengths) == CONTEXT
    data = write_rows(tmp_path / "rows.jsonl", copy_rows(8))
    model = tiny_llama()
    attach(model, LoraConfig(), seed=0)
    result = api.train(model, tokenizer(), data=data, validation=held, output=tmp_path / "run", max_steps=1)
    assert len(result.samples_after) == 3


def test_a_target_that_some_layers_lack_is_refused_unless_allowed(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", copy_rows(8))
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=("layers.0.self_attn.q_proj",)), seed=0)
    with pytest.raises(ConfigError, match=r"(?s)adapt query in some layers only.*allow_uneven: true"):
        api.train(model, tokenizer(), data=data, output=tmp_path / "run", max_steps=1)
    assert not (tmp_path / "run").exists()
    result = api.train(model, tokenizer(), data=data, output=tmp_path / "run", max_steps=1, allow_uneven=True)
    assert result.status == "done"


def test_a_setting_that_does_not_exist_is_refused_with_the_nearest(tmp_path: Path) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(), seed=0)
    with pytest.raises(ConfigError, match=r"unknown key 'epoch' in train; did you mean 'epochs'\?"):
        api.train(model, tokenizer(), data="rows.jsonl", output=tmp_path / "run", epoch=1)


def test_a_token_that_the_model_lacks_is_refused_with_its_row(tmp_path: Path) -> None:
    """Gemma 3's tokenizer knows a token more than its embedding: a row that used it would index past the end."""
    own = tokenizer()
    last = len(own) - 1
    model = tiny_llama(vocab_size=last)
    attach(model, LoraConfig(), seed=0)
    data = write_rows(tmp_path / "rows.jsonl", [*copy_rows(3), {"prompt": own.decode([last]), "completion": " 1"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:4: token 396 is not in the model, which has 396 tokens"):
        api.train(model, own, data=data, output=tmp_path / "run")


def test_training_leaves_base_and_model_as_they_were(done: Done, tmp_path: Path) -> None:
    model, own = load_model(done.model)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    implementation = model.config._attn_implementation
    ids = torch.tensor([own.encode("1 2 3 =")])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    attached = attach(model, LoraConfig(), seed=0)
    api.train(model, own, data=done.data, output=tmp_path / "run", max_steps=2)
    assert model.config._attn_implementation == implementation and not model.training
    with torch.no_grad():
        assert relative(model(input_ids=ids).logits, expected) > 1e-4
        attached.detach()
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
