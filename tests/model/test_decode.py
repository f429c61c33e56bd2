"""Decoding in few operations against the family's own forward: values, and when it must stand aside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families import FAMILIES, VOCAB
from loratune.adapter.attach import Attached, attach
from loratune.adapter.config import LoraConfig
from loratune.model import decode
from loratune.model.causal import CausalModel
from loratune.model.decode import decoding
from oracles import exact

_KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "smollm3")
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model: PreTrainedModel, **settings: Any) -> Attached:
    return attach(model, LoraConfig(**{"r": 3, "target_modules": _ALL, "init_lora_weights": False, **settings}), seed=5)


@torch.no_grad()
def continued(model: Any) -> Tensor:
    """The logits of a padded prompt (longer than the windows of 8) and of three tokens after it, from the cache."""
    ids = torch.randint(3, VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :13] = 0
    cache, found = None, []
    for start, end in ((0, 13), (13, 14), (14, 15), (15, 16)):
        given = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "past_key_values": cache}
        output = model(**given, position_ids=(mask[:, :end].cumsum(1) - 1).clamp_min(0)[:, start:end], use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[mask[:, start:end].bool()])
    return torch.cat(found)


def num_lean(model: PreTrainedModel) -> int:
    return sum(
        getattr(module.__dict__.get("forward"), "__module__", "") == decode.__name__ for module in model.modules()
    )


def check(model: PreTrainedModel, *, used: bool) -> Tensor:
    plain = continued(model)
    with decoding(model):
        assert num_lean(model) == (model.config.num_hidden_layers if used else 0)
        lean = continued(model)
    assert num_lean(model) == 0
    assert plain.isfinite().all()
    if used:
        torch.testing.assert_close(lean, plain, rtol=1e-10, atol=1e-10)
    else:
        assert torch.equal(lean, plain)
    return plain


@pytest.mark.parametrize("family", _KNOWN)
def test_logits_equal_the_plain_forward_in_float64(family: str) -> None:
    model = exact(family)
    base = check(model, used=True)
    attached = adapted(model)
    assert not torch.allclose(check(model, used=True), base)
    with attached.disabled():
        assert torch.equal(check(model, used=True), base)
    attached.detach()
    adapted(model, target_modules=["q_proj", "down_proj"], r=2)
    check(model, used=True)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["input_layernorm"]}]
)
def test_what_is_more_than_a_plain_adapter_is_left_to_the_family(settings: dict[str, Any]) -> None:
    model = exact("llama")
    check(model, used=True)
    adapted(model, **settings)
    check(model, used=False)


def test_two_adapters_and_hooks_are_left_to_the_family() -> None:
    model = exact("llama")
    calls: list[int] = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    with decoding(model):
        continued(model)
        assert num_lean(model) == 1  # the other layer
    assert len(calls) >= 4
    handle.remove()
    first = adapted(model)
    second = attach(model, first.adapter, name="second")
    first.activate(second)
    check(model, used=False)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "olmo2", "stablelm"])
def test_other_structures_run_as_they_are(family: str) -> None:
    check(FAMILIES[family](), used=False)


def test_the_same_parts_put_together_otherwise_are_found_out() -> None:
    model = FAMILIES["granite"]()
    for layer in model.model.layers:
        layer.residual_multiplier = 0.5
    check(model, used=False)


def test_training_and_other_calls_go_the_layers_own_way() -> None:
    model = FAMILIES["llama"]()
    attached = adapted(model)
    ids = torch.tensor([[3, 4, 5]])
    with decoding(model):
        model(input_ids=ids).logits.sum().backward()
        assert all(factor.A.grad is not None for factor in attached.adapter.factors.values())
        with torch.no_grad():
            assert model(input_ids=ids, output_attentions=True, use_cache=False).logits.isfinite().all()


def test_what_training_put_there_comes_back() -> None:
    model = FAMILIES["llama"]()
    causal = CausalModel(model)
    before = [layer.forward for layer in model.model.layers]

    def fail() -> None:
        with decoding(model):
            assert num_lean(model) == 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [layer.forward for layer in model.model.layers] == before
    causal.close()
    assert num_lean(model) == 0 and "forward" not in model.model.layers[0].__dict__


def test_a_forward_of_somebody_else_is_not_replaced() -> None:
    model = exact("llama")
    layer = model.model.layers[0]
    own: Callable[..., Any] = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) * 2

    layer.forward = forward
    plain = continued(model)
    with decoding(model):
        assert layer.forward is forward
        assert torch.allclose(continued(model), plain, rtol=1e-10)
