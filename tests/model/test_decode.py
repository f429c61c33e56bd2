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


def is_lean(module: Any) -> bool:
    return getattr(module.__dict__.get("forward"), "__module__", "") == decode.__name__


def num_lean(model: PreTrainedModel) -> int:
    return sum(is_lean(module) for module in model.modules() if module is not model.get_output_embeddings())


def check(model: PreTrainedModel, *, used: bool) -> Tensor:
    plain = continued(model)
    with decoding(model):
        assert num_lean(model) == (model.config.num_hidden_layers if used else 0)
        lean = continued(model)
    assert not any(map(is_lean, model.modules()))
    assert plain.isfinite().all()
    tolerance = 1e-10 if plain.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(lean, plain, rtol=tolerance, atol=tolerance)
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


@pytest.mark.parametrize("rows", [1, 2, 7, decode.FEW_ROWS, decode.FEW_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_adapted", [False, True])
def test_a_head_gives_the_logits_of_few_and_of_many_rows(rows: int, bias: bool, is_adapted: bool) -> None:
    model: Any = exact("llama")
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB, dtype=torch.float64))
    if is_adapted:
        adapted(model, target_modules=["lm_head"])
    states = torch.randn(rows, 1, model.config.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        expected = model.lm_head(states)
        with decoding(model):
            assert is_lean(model.lm_head)
            torch.testing.assert_close(model.lm_head(states), expected, rtol=1e-12, atol=1e-12)
    assert not is_lean(model.lm_head)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_a_head_that_is_more_than_a_plain_adapter_is_left_as_it_is(settings: dict[str, Any]) -> None:
    model: Any = exact("llama")
    adapted(model, target_modules=["lm_head"], **settings)
    with decoding(model):
        assert not is_lean(model.lm_head)


def test_a_head_learns_its_own_way() -> None:
    model: Any = FAMILIES["llama"]()
    attached = adapted(model, target_modules=["lm_head"])
    with decoding(model):
        model.lm_head(torch.randn(2, 1, model.config.hidden_size)).sum().backward()
    assert all(factor.B.grad is not None for factor in attached.adapter.factors.values())


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
