"""Every family and preset against PEFT, both ways through files, and against brute-force merged weights in float64."""

import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from families import CAUSAL, FAMILIES, inputs_for
from loratune.adapter import peft_format
from loratune.adapter.attach import attach, load_adapter
from loratune.adapter.config import LoraConfig
from loratune.errors import AdapterError
from oracles import brute_force, double, gradients, logits_of, objective, relative, targets_of, task_of, worst

# PEFT takes the names of a sparse model's dense MLP for its experts: adapter/test_roles.py shows it.
_CASES = [(f, p) for f in FAMILIES for p in ("fast", "quality", "deep") if (f, p) != ("qwen3_moe", "deep")]


def peft_gradients(model: peft.PeftModel) -> dict[str, Tensor]:
    """PEFT's gradients under our names."""
    renamed = {
        name.removeprefix("base_model.model.").replace(".default.weight", "").replace(".lora_", "."): parameter.grad
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    return {name: grad for name, grad in renamed.items() if grad is not None}


@pytest.fixture(autouse=True)
def _quiet_peft() -> None:
    warnings.filterwarnings("ignore", module="peft")


@pytest.mark.parametrize(("family", "preset"), _CASES)
def test_an_adapter_of_peft_loads_here_and_computes_the_same(family: str, preset: str, tmp_path: Path) -> None:
    theirs, inputs = FAMILIES[family](), inputs_for(family)
    # The tiny gated T5 amplifies rounding: at lora_alpha=2 ours and PEFT's float32 gradients are 1.03e-5 apart.
    alpha = 1 if family == "t5_gated" else 2
    config = peft.LoraConfig(
        r=4, lora_alpha=alpha, target_modules=targets_of(theirs, preset), init_lora_weights=False,
        task_type=task_of(family),
    )  # fmt: skip
    oracle = peft.get_peft_model(theirs, config).eval()
    oracle.save_pretrained(str(tmp_path))
    expected = logits_of(oracle, inputs)
    objective(expected).backward()

    model = FAMILIES[family]()
    attached = load_adapter(model, tmp_path, trainable=True)
    found = logits_of(model, inputs)
    assert relative(found, expected) < 1e-5
    with attached.disabled():
        assert relative(logits_of(model, inputs), expected) > 1e-3  # the adapter does something
    objective(found).backward()
    assert worst(gradients(attached.adapter), peft_gradients(oracle)) < 1e-5


@pytest.mark.parametrize(("family", "preset"), _CASES)
def test_an_adapter_saved_here_loads_in_peft(family: str, preset: str, tmp_path: Path) -> None:
    model, inputs = FAMILIES[family](), inputs_for(family)
    attached = attach(model, LoraConfig.preset(preset, r=4, init_lora_weights=False, task_type=task_of(family)), seed=5)
    with torch.no_grad():
        expected = logits_of(model, inputs)
        attached.save(tmp_path / "saved")
        oracle = peft.PeftModel.from_pretrained(FAMILIES[family](), str(tmp_path / "saved")).eval()
        assert relative(logits_of(oracle, inputs), expected) < 1e-5
        again = FAMILIES[family]()
        load_adapter(again, tmp_path / "saved")
        assert torch.equal(logits_of(again, inputs), expected)


@pytest.mark.parametrize("preset", ["fast", "quality", "deep"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_brute_force_in_float64(family: str, preset: str) -> None:
    model, inputs = double(family), inputs_for(family)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    attached = attach(model, LoraConfig.preset(preset, r=4, init_lora_weights=False), seed=5)
    found = logits_of(model, inputs)
    objective(found).backward()
    expected, expected_gradients = brute_force(double(family), attached.adapter, inputs)
    assert found.dtype == torch.float64
    assert relative(found.detach(), expected) < 1e-12
    assert worst(gradients(attached.adapter), expected_gradients) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_logits_equal_attached_ones_and_survive_transformers(family: str, tmp_path: Path) -> None:
    """The plain transformers model that reads the merged folder knows nothing of the adapter, tied heads included."""
    model, inputs = FAMILIES[family](), inputs_for(family)
    attached = attach(model, LoraConfig.preset("deep", r=4, init_lora_weights=False), seed=5)
    with torch.no_grad():
        expected = logits_of(model, inputs)
        merged = attached.merge()
        assert merged is model
        assert relative(logits_of(model, inputs), expected) < 1e-5
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert relative(logits_of(again, inputs), expected) < 1e-5


@pytest.mark.parametrize("family", CAUSAL)
def test_rows_of_a_batch_each_go_through_their_own_adapter(family: str) -> None:
    model, inputs = FAMILIES[family](), inputs_for(family, batch=4)
    preset = "quality" if family == "opt" else "deep"  # its MLP gets the batch flattened: the test after this one
    apart: dict[str | None, Tensor] = {}
    config = LoraConfig.preset(preset, r=4, init_lora_weights=False)
    with torch.no_grad():
        apart[None] = logits_of(model, inputs)
        for seed, name in enumerate(("one", "two")):
            attach(model, config, name, seed=seed)
            apart[name] = logits_of(model, inputs)
        handle = attach(model, config, "three", seed=9)
        names = ["two", None, "one", "two"]
        with handle.rows(names):
            together = logits_of(model, inputs)
    for row, name in enumerate(names):
        assert relative(together[row], apart[name][row]) < 1e-5, (row, name)


def test_rows_of_a_flattened_batch_are_refused() -> None:
    model, inputs = FAMILIES["opt"](), inputs_for("opt", batch=4)
    with torch.no_grad():
        expected = logits_of(model, inputs)
        attached = attach(model, LoraConfig.preset("deep", init_lora_weights=False))
        with attached.rows(["default", None, None, None]), pytest.raises(AdapterError, match=r"4 names.*\(48, 32\)"):
            logits_of(model, inputs)
        attached.detach()
        assert torch.equal(logits_of(model, inputs), expected)


def test_what_peft_writes_is_read_to_the_same_values(tmp_path: Path) -> None:
    """Not through logits, which could hide a factor of A made good by one of B: the tensors themselves."""
    oracle = peft.get_peft_model(
        FAMILIES["llama"](), peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    oracle.save_pretrained(str(tmp_path))
    adapter = peft_format.read(tmp_path)
    layers = dict(oracle.base_model.model.named_modules())
    assert len(adapter.factors) == 3 and set(adapter.loose) == {"lm_head.weight"}
    for path, factor in adapter.factors.items():
        assert torch.equal(factor.A, layers[path].lora_A["default"].weight)
        assert torch.equal(factor.B, layers[path].lora_B["default"].weight)
        assert factor.scale == layers[path].scaling["default"]
