"""loratune under PEFT's names beside PEFT itself: names of tensors, outputs, gradients, state dicts and files."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from compat_toys import SETTINGS, Toy, config_of, ids, toy
from torch import Tensor, nn

from loratune.compat import peft as ours
from loratune.errors import ConfigError

# PEFT adds out_proj's update of an attention twice and cannot be compared there; see docs/peft-compatibility.md.
COMPARED = [name for name in SETTINGS if name != "plain"]
pytestmark = pytest.mark.filterwarnings("ignore")


def pair(name: str) -> tuple[Any, Any]:
    """The same model and values in PEFT and in loratune, all adapter tensors random."""
    theirs = peft.get_peft_model(toy(), config_of(peft.LoraConfig, name)).eval()
    generator = torch.Generator().manual_seed(1)
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data.add_(noise.abs() if "magnitude" in key else noise)
    mine = ours.get_peft_model(toy(), config_of(ours.LoraConfig, name)).eval()
    result = ours.set_peft_model_state_dict(mine, peft.get_peft_model_state_dict(theirs))
    assert result == ([], [])
    return theirs, mine


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("name", SETTINGS)
def test_tensors_have_peft_s_names_and_shapes(name: str) -> None:
    theirs = peft.get_peft_model(toy(), config_of(peft.LoraConfig, name))
    mine = ours.get_peft_model(toy(), config_of(ours.LoraConfig, name))
    shapes = {key: tuple(value.shape) for key, value in mine.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    trained = {key for key, parameter in mine.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, parameter in theirs.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", COMPARED)
def test_outputs_and_gradients_equal_peft_s(name: str) -> None:
    theirs, mine = pair(name)
    outputs = theirs(ids()), mine(ids())
    assert worst(outputs[1], outputs[0]) < 1e-5
    for output in outputs:
        output.square().sum().backward()
    expected = {key: p.grad for key, p in theirs.named_parameters() if p.requires_grad}
    found = {key: p.grad for key, p in mine.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    scale = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)
    for key, grad in expected.items():
        assert float((found[key] - grad).abs().max()) < 1e-4 * scale, key


@pytest.mark.parametrize("name", SETTINGS)
def test_state_dicts_have_the_same_keys_and_values(name: str) -> None:
    theirs, mine = pair(name)
    expected, found = peft.get_peft_model_state_dict(theirs), ours.get_peft_model_state_dict(mine)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value.detach(), atol=1e-6), key


@pytest.mark.parametrize("name", COMPARED)
def test_a_file_of_either_side_is_read_by_the_other(name: str, tmp_path: Path) -> None:
    theirs, mine = pair(name)
    with torch.no_grad():
        expected = theirs(ids())
        theirs.save_pretrained(tmp_path / "theirs")
        mine.save_pretrained(tmp_path / "mine")
        read_by_mine = ours.PeftModel.from_pretrained(toy(), tmp_path / "theirs")
        read_by_theirs = peft.PeftModel.from_pretrained(toy(), tmp_path / "mine").eval()
        assert worst(read_by_mine(ids()), expected) < 1e-5
        assert worst(read_by_theirs(ids()), expected) < 1e-5
        assert {file.name for file in (tmp_path / "mine").iterdir()} == {
            "README.md", "adapter_config.json", "adapter_model.safetensors",
        }  # fmt: skip


@pytest.mark.parametrize("name", COMPARED)
def test_merging_equals_peft_s_merging(name: str) -> None:
    theirs, mine = pair(name)
    with torch.no_grad():
        before = mine(ids())
        merged, expected = mine.merge_and_unload(), theirs.merge_and_unload()
        assert type(merged) is Toy
        assert worst(merged(ids()), before) < 1e-5
        assert worst(merged(ids()), expected(ids())) < 1e-5
    assert merged.state_dict().keys() == toy().state_dict().keys()


def test_the_configuration_has_peft_s_fields_and_defaults() -> None:
    expected, found = peft.LoraConfig().to_dict(), ours.LoraConfig().to_dict()
    assert found.keys() == expected.keys()
    different = {key for key, value in expected.items() if found[key] != value}
    assert different <= {"peft_version"}  # PEFT writes the version that is installed


def test_status_and_counts_equal_peft_s() -> None:
    theirs, mine = pair("saved")
    assert mine.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    expected = vars(theirs.get_model_status())
    assert {name: value for name, value in expected.items() if name != "quantization_backend"} == vars(
        mine.get_model_status()
    )


def test_injection_into_a_model_has_keys_without_a_prefix() -> None:
    theirs = peft.inject_adapter_in_model(config_of(peft.LoraConfig, "ranks"), toy())
    mine = ours.inject_adapter_in_model(config_of(ours.LoraConfig, "ranks"), toy())
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    expected = peft.get_peft_model_state_dict(theirs)
    assert ours.set_peft_model_state_dict(mine, expected) == ([], [])
    assert ours.get_peft_model_state_dict(mine).keys() == expected.keys()
    assert worst(mine(ids()), theirs(ids())) < 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_decomposing_beginnings_leave_the_base_alone_and_are_stored_as_plain_lora(init: str, tmp_path: Path) -> None:
    model, plain = toy(), toy()
    mine = ours.get_peft_model(model, ours.LoraConfig(target_modules=["lin0"], r=4, init_lora_weights=init)).eval()
    assert torch.equal(mine.base_model.model.lin0.base_layer.weight, plain.lin0.weight)
    assert worst(mine(ids()), plain(ids())) < 1e-5
    mine.base_model.model.lin0.lora_B["default"].weight.data.mul_(1.5)
    mine.save_pretrained(tmp_path)
    read = peft.PeftModel.from_pretrained(toy(), tmp_path).eval()
    assert read.peft_config["default"].r == 8  # twice as much: what was learned, and what it began with
    assert worst(read(ids()), mine(ids())) < 1e-5
    again = ours.PeftModel.from_pretrained(toy(), tmp_path)
    assert worst(again(ids()), mine(ids())) < 1e-5
    third = ours.get_peft_model(toy(), ours.LoraConfig(target_modules=["lin0"], r=4, init_lora_weights="olora")).eval()
    ours.set_peft_model_state_dict(third, ours.get_peft_model_state_dict(mine))
    assert worst(third(ids()), mine(ids())) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"kasa_config": {"beta": 1}},
        {"velora_config": {}},
        {"alora_invocation_tokens": [1]},
        {"init_lora_weights": "corda"},
    ],
)
def test_methods_that_are_not_implemented_are_refused_and_leave_the_model_alone(settings: dict[str, Any]) -> None:
    model = toy()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ours.get_peft_model(model, ours.LoraConfig(target_modules=["lin0"], **settings))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert isinstance(model.lin0, nn.Linear)
    assert "_loratune" not in model.__dict__
