"""Models without weights: the same as the real ones, from a config alone, whatever the size."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from families import FAMILIES
from loratune.errors import ConfigError
from loratune.explain import facts
from loratune.explain.skeleton import skeleton
from model.tiny_models import KINDS, tiny, write_gguf


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def folder_of(name: str, path: Path) -> tuple[Path, torch.nn.Module]:
    """A folder with the config of a family's tiny model and no weights, and that model."""
    model = FAMILIES[name]()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    return path, model


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "mixtral", "bert", "bert_mlm", "t5", "bart", "vit"])
def test_a_skeleton_is_the_model_without_its_weights(name: str, tmp_path: Path) -> None:
    folder, model = folder_of(name, tmp_path)
    found = skeleton(folder)
    assert (found.kind, type(found.model), shapes(found.model)) == ("folder", type(model), shapes(model))
    assert {p.device.type for p in found.model.parameters()} == {"meta"}
    assert facts.report(facts.of(found.model, torch.float32), None) == facts.report(
        facts.of(model, torch.float32), None
    )


def test_weights_are_not_looked_at(tmp_path: Path) -> None:
    folder, model = folder_of("llama", tmp_path)
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    assert shapes(skeleton(folder).model) == shapes(model)


def test_seventy_billion_parameters_in_seconds(tmp_path: Path) -> None:
    """Processor time, so that a busy machine does not decide."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    before = os.times()
    bones = skeleton(tmp_path)
    report = facts.report(facts.of(bones.model, bones.dtype), None)
    after = os.times()
    assert after.user + after.system - before.user - before.system < 5
    assert (report["num_parameters"], report["num_bytes"]) == (70_553_706_496, 2 * 70_553_706_496)
    assert [each["num_parameters"] for each in report["presets"]] == [16_384_000, 65_536_000, 418_553_856]


def test_without_architectures_the_type_decides(tmp_path: Path) -> None:
    for name, expected in (("llama", "LlamaForCausalLM"), ("vit", "ViTModel")):
        folder, _ = folder_of(name, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
        assert type(skeleton(folder).model).__name__ == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("not json", "cannot read the config of"),
        ({"model_type": "nothing-known"}, "cannot read the config of .*nothing-known"),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "wide"},
            "Field 'hidden_size' expected int",
        ),
        ({"model_type": "llama", "num_hidden_layers": 1, "head_dim": -8}, "cannot build .* from its config"),
    ],
)
def test_a_config_that_cannot_be_built_is_an_error(config: Any, message: str, tmp_path: Path) -> None:
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        skeleton(tmp_path)


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ConfigError, match="cannot read the config"):
        skeleton(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_class_that_is_no_model_is_not_taken(tmp_path: Path) -> None:
    folder, _ = folder_of("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["TrainingArguments"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert type(skeleton(folder).model).__name__ == "LlamaForCausalLM"


def test_a_name_that_is_nowhere_lists_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder_of("llama", tmp_path / "tinyllama")
    with pytest.raises(ConfigError, match=r"cannot find the model 'tinylama': there is no such folder.*HF_HUB_OFFLINE"):
        skeleton("tinylama")
    with pytest.raises(ConfigError, match=r"is a file; expected a folder with config.json, or a .gguf file"):
        skeleton(tmp_path / "tinyllama" / "config.json")


@pytest.mark.model
def test_the_embedded_model() -> None:
    found = skeleton("google/gemma-3-270m")
    model = facts.of(found.model, found.dtype)
    assert (found.kind, model.num_parameters) == ("embedded", 268_098_176)
    fast = facts.cost_of_preset(model, "fast")
    assert isinstance(fast, facts.Cost) and fast.num_parameters == 18 * 8 * ((640 + 1024) + (640 + 256))


def test_a_gguf_file_is_read_no_further_than_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    original = tiny("gemma3")
    path = write_gguf(tmp_path / "m.gguf", original, "gemma3", kind=KINDS[torch.bfloat16])
    found = skeleton(path)
    assert (found.kind, found.dtype, shapes(found.model)) == ("gguf", torch.bfloat16, shapes(original))
    assert not (tmp_path / "cache").exists()  # nothing was converted
