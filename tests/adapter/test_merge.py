"""Merging: one sum in float32, one rounding, plain layers, and nothing of the base written."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from families import FAMILIES, inputs_for
from loratune.adapter.attach import Attachments, attach
from loratune.adapter.config import LoraConfig
from loratune.adapter.factor import LowRank
from loratune.adapter.hosts import host_of
from loratune.adapter.merge import merged_weight
from loratune.errors import AdapterError
from oracles import logits_of, randomise, relative, state_of


def factor_of(std: float, outputs: int = 48, inputs: int = 32) -> LowRank:
    generator = torch.Generator().manual_seed(2)
    A, B = torch.randn(4, inputs, generator=generator), torch.randn(outputs, 4, generator=generator)
    return LowRank(A * std, B * std, 0.5)


@pytest.mark.parametrize(
    "module", [nn.Linear(32, 48), Conv1D(48, 32), nn.Embedding(32, 48)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_entry_is_the_exact_sum_rounded_once(module: nn.Module, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, factor, host = torch.randn_like(module.weight).to(dtype), factor_of(0.3), host_of(module)
    assert host is not None
    found, loss = merged_weight(weight, factor, host)
    delta = factor.delta() if isinstance(module, nn.Linear) else factor.delta().T
    exact = weight.double() + delta.double()
    assert found.dtype == dtype and loss.share < 0.05
    if dtype in (torch.bfloat16, torch.float16):
        assert (found == exact.to(dtype)).float().mean() > 0.999  # PEFT's two roundings get 71 % right
    else:
        assert torch.allclose(found.double(), exact, rtol=1e-6, atol=1e-7)


def test_the_share_that_rounding_lost_is_measured() -> None:
    """An update far below bfloat16's resolution is lost nearly whole; in float32 nothing is."""
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    host = host_of(nn.Linear(2, 2))
    assert host is not None
    for dtype, std, low, high in (
        (torch.bfloat16, 0.003, 0.5, 100.0),
        (torch.bfloat16, 1.0, 1e-4, 0.01),
        (torch.float32, 0.03, 0.0, 1e-3),
    ):
        rounded, loss = merged_weight(weight.to(dtype), factor_of(std), host)
        delta = factor_of(std).delta().double()
        lost = (rounded.double() - weight.to(dtype).double() - delta).norm() / delta.norm()
        assert low <= loss.share <= high and loss.share == pytest.approx(float(lost), rel=0.01, abs=1e-4)


def test_losses_add_up() -> None:
    host = host_of(nn.Linear(2, 2))
    assert host is not None
    weight = torch.randn(48, 32).bfloat16()
    one, two = (merged_weight(weight, factor_of(std), host)[1] for std in (0.01, 1.0))
    total = one + two
    assert total.share == pytest.approx(
        ((one.error_squared + two.error_squared) / (one.update_squared + two.update_squared)) ** 0.5
    )


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "all"}),
        ("gpt2", {"target_modules": ["c_attn", "wte"]}),
        ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
        ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"}),
        ("gemma3_text", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("gemma3_text", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("gemma3_text", {"target_modules": ["q_proj", "lm_head"]}),
        ("gemma3_text", {"target_modules": ["q_proj"]}),
        ("bart", {"target_modules": ["q_proj", "lm_head"]}),
        ("t5", {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_what_was_trained_is_in_the_merged_folder_and_nothing_else(
    family: str, values: dict[str, Any], tmp_path: Path
) -> None:
    model, inputs = FAMILIES[family](), inputs_for(family)
    originals = {id(parameter): parameter.detach().clone() for parameter in model.parameters()}
    held = list(model.parameters())
    names = [(name, type(module)) for name, module in model.named_modules()]
    attached = attach(model, LoraConfig(r=4, **values), seed=1)
    randomise((p for _, p in attached.adapter.named_parameters()), std=0.1)
    with torch.no_grad():
        expected = logits_of(model, inputs)
        merged = attached.merge()
        assert relative(logits_of(merged, inputs), expected) < 1e-5
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path).eval()
        assert relative(logits_of(again, inputs), expected) < 1e-5
    assert [(name, type(module)) for name, module in merged.named_modules()] == names
    assert all(torch.equal(parameter, originals[id(parameter)]) for parameter in held)
    assert Attachments.of(model) is None and all(parameter.requires_grad for parameter in merged.parameters())


def test_a_tied_embedding_stays_as_it_was_when_the_head_is_merged() -> None:
    """PEFT changes the embedding too, and with it every input."""
    model = FAMILIES["gemma3_text"]()
    embedding = model.model.embed_tokens.weight.detach().clone()
    attach(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False), seed=1).merge()
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert not torch.equal(model.lm_head.weight, embedding) and model.config.tie_word_embeddings is False


def test_a_tie_that_the_adapter_did_not_touch_stays() -> None:
    model = FAMILIES["gemma3_text"]()
    attach(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False), seed=1).merge()
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings is True


def test_merged_weights_equal_pefts(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    attached = attach(model, LoraConfig.preset("quality", init_lora_weights=False), seed=1)
    attached.save(tmp_path / "saved")
    theirs = peft.PeftModel.from_pretrained(FAMILIES["llama"](), str(tmp_path / "saved")).merge_and_unload()
    ours, expected = state_of(attached.merge()), state_of(theirs)
    assert ours.keys() == expected.keys()
    assert all(torch.allclose(ours[name], expected[name], rtol=1e-6, atol=1e-6) for name in ours)


def test_one_of_two_adapters_is_not_merged() -> None:
    model = FAMILIES["llama"]()
    one = attach(model, LoraConfig(), "one", seed=1)
    attach(model, LoraConfig(), "two", seed=2)
    before = state_of(model)
    with pytest.raises(AdapterError, match=r"merging 'one' would drop the other attached adapters: two\. Detach them"):
        one.merge()
    after = state_of(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_trained_bias_of_b_that_a_layer_cannot_hold_is_refused_before_any_layer_is_merged() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    weights = [layer.weight for layer in model]
    attached = attach(model, LoraConfig(r=2, target_modules=["0", "1"], lora_dropout=0.0, lora_bias=True))
    x = torch.randn(3, 4)
    before = model(x)
    with pytest.raises(AdapterError, match=r"1 has no bias.*Nothing was merged"):
        attached.merge()
    assert torch.equal(model(x), before)
    attached.detach()
    assert all(layer.weight is weight for layer, weight in zip(model, weights, strict=True))
