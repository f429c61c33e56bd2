"""The library in twenty lines: the promised code, as it is promised, on the real model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.adapter.wrapper import Adapted
from loratune.demo.corpus import restoration_rows
from tiny_run import lines_of, write_rows

pytestmark = [pytest.mark.model, pytest.mark.slow]

SNIPPET = """
import loratune
from loratune import LoraConfig

model, tokenizer = loratune.load_model("google/gemma-3-270m")          # folder, hub id or GGUF file
config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"],
                    lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")

attached = loratune.attach(model, config)               # wraps the named sites in place; base weights are never written
print(attached.summary())                               # sites, trainable parameters, coverage
run = loratune.train(model, tokenizer, data="rows.jsonl", output="runs/first", epochs=1)

attached.save("adapters/first")                         # adapter_config.json + adapter_model.safetensors, as PEFT reads them
with attached.disabled():
    ...                                                 # the base model, untouched
attached.detach()                                       # the plain model again

attached = loratune.load_adapter(model, "adapters/first", name="first")
with attached.rows(["first", None]):                    # each row of the batch its own adapter, or none
    ...
model = attached.merge()                                # in memory: plain layers, no adapter left
"""  # noqa: E501  # its lines are those of the documentation


def test_the_library_in_twenty_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = sorted(restoration_rows(120, 0, 0, seed=3)["train"], key=lambda row: len(row["completion"]))[:24]
    write_rows(tmp_path / "rows.jsonl", rows)
    names: dict[str, Any] = {}
    exec(compile(SNIPPET, "snippet", "exec"), names)

    assert "q_proj" in capsys.readouterr().out
    run, model = names["run"], names["model"]
    assert run.status == "done" and run.steps == 3 and run.output == Path("runs/first")
    assert run.after.loss < run.before.loss
    assert [line["step"] for line in lines_of(tmp_path / "runs/first/metrics.jsonl", "step")] == [1, 2, 3]
    assert not any(isinstance(module, Adapted) for module in model.modules())
    for folder in (tmp_path / "adapters/first", tmp_path / "runs/first/adapter"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "google/gemma-3-270m"
        assert (folder / "adapter_model.safetensors").stat().st_size > 1_000_000
    assert (tmp_path / "runs/first/adapter/NOTICE").is_file()  # the terms of the base travel with its adapters

    base, _ = names["loratune"].load_model("google/gemma-3-270m")
    changed = {
        name.split(".")[-2]
        for (name, one), other in zip(model.named_parameters(), base.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert changed == {"q_proj", "v_proj"}
