"""EVA against a plain singular value decomposition of the inputs, and what it does with the ranks."""

import pytest
import torch

import loratune
from families import FAMILIES, inputs_for
from loratune import LoraConfig
from loratune.adapter.eva import eva
from loratune.errors import ConfigError

CONFIG = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)


def inputs_of(model, path):
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        model(**inputs_for("llama", batch=4, length=32))
    handle.remove()
    return seen[0]


def test_rows_of_A_span_the_leading_directions_of_the_inputs():
    model = FAMILIES["llama"]()
    adapter = eva(model, CONFIG, [inputs_for("llama", batch=4, length=32)], rho=1.0)
    for path, factor in adapter.factors.items():
        _, _, Vh = torch.linalg.svd(inputs_of(model, path), full_matrices=False)
        assert factor.A.shape[0] == 4 and factor.B.abs().sum() == 0
        overlap = (factor.A @ Vh[:4].T).square().sum() / 4  # 1 where the two spaces are one
        assert float(overlap) == pytest.approx(1.0, abs=1e-4)


def test_ranks_move_to_where_they_explain_most_and_the_budget_stays(tmp_path):
    model = FAMILIES["llama"]()
    inputs = inputs_for("llama")
    with torch.no_grad():
        before = model(**inputs)[0]
    adapter = eva(model, CONFIG, [inputs_for("llama", batch=4, length=32)], rho=2.0)
    ranks = [factor.rank for factor in adapter.factors.values()]
    assert sum(ranks) == 4 * 4 and len(set(ranks)) > 1 and max(ranks) <= 8
    assert all(factor.scale == 2 for factor in adapter.factors.values())
    attached = loratune.attach(model, adapter)
    with torch.no_grad():
        assert torch.allclose(model(**inputs)[0], before, atol=1e-5)
        for factor in adapter.factors.values():
            factor.B.normal_(std=0.1)
        expected = model(**inputs)[0]
    attached.save(tmp_path / "a")
    again = FAMILIES["llama"]()
    loratune.load_adapter(again, tmp_path / "a")
    with torch.no_grad():
        assert torch.allclose(again(**inputs)[0], expected, atol=1e-5)


def test_what_eva_needs_is_said():
    with pytest.raises(ConfigError, match="at least one batch"):
        eva(FAMILIES["llama"](), CONFIG, [])
    with pytest.raises(ConfigError, match="fewer than 8 directions"):
        eva(FAMILIES["llama"](), CONFIG, [inputs_for("llama", batch=1, length=4)])
    with pytest.raises(ConfigError, match="EVA needs linear layers"):
        eva(FAMILIES["llama"](), LoraConfig(target_modules=["embed_tokens"]), [inputs_for("llama")])
    with pytest.raises(ConfigError, match=r"loratune\.eva"):
        LoraConfig(init_lora_weights="eva")


def test_nothing_watches_the_model_afterwards():
    model = FAMILIES["llama"]()
    eva(model, CONFIG, [inputs_for("llama")])
    assert not any(module._forward_pre_hooks for module in model.modules())
