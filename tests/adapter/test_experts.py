"""Stacked experts: no W + s B A is formed, and the result is that of forming it."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import GptOssConfig, GptOssForCausalLM

import loratune
from families import FAMILIES, inputs_for
from loratune import LoraConfig
from loratune.adapter import experts
from oracles import relative

STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def gpt_oss() -> nn.Module:
    """Its experts are stored (E, I, O), with biases: the products are x @ W[e]."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    return GptOssForCausalLM(config).eval()


MODELS = {"mixtral": FAMILIES["mixtral"], "qwen3_moe": FAMILIES["qwen3_moe"], "gpt_oss": gpt_oss}


def adapted(name: str):
    model = MODELS[name]().double()
    config = LoraConfig(
        r=2, lora_dropout=0.0, target_modules=["q_proj"], target_parameters=STACKS, init_lora_weights=False
    )
    return loratune.attach(model, config, seed=0)


@pytest.mark.parametrize("name", list(MODELS))
def test_output_and_gradients_are_those_of_the_formed_weights(name, monkeypatch):
    inputs = inputs_for("mixtral")
    attached = adapted(name)
    monkeypatch.setattr(experts._StandIn, "dense", lambda self: pytest.fail("a weight was formed"))
    for kind in (experts._Stack, experts._Expert):
        monkeypatch.setattr(kind, "dense", lambda self: pytest.fail("a weight was formed"))
    found = attached.model(**inputs)[0]
    found.square().mean().backward()
    gradients = {path: [p.grad.clone() for p in f.parameters()] for path, f in attached.adapter.factors.items()}
    monkeypatch.undo()

    plain = MODELS[name]().double()
    plain.set_experts_implementation("eager")
    leaves, weights = {}, {}
    for path, factor in attached.adapter.factors.items():
        A, B = (p.detach().clone().requires_grad_() for p in (factor.A, factor.B))
        leaves[path] = (A, B)
        parameter = path if "experts" in path else f"{path}.weight"
        delta = (B * factor.scale) @ A
        swapped = "experts" in path and name == "gpt_oss"
        weights[parameter] = plain.get_parameter(parameter) + (delta.transpose(-1, -2) if swapped else delta)
    expected = functional_call(plain, weights, kwargs=inputs)[0]
    expected.square().mean().backward()
    assert relative(found, expected) < 1e-10
    for path, pair in leaves.items():
        for ours, theirs in zip(gradients[path], pair, strict=True):
            assert float((ours - theirs.grad).abs().max()) <= 1e-10 * max(1.0, float(theirs.grad.abs().max()))


def test_whatever_else_is_done_with_a_weight_sees_the_sum():
    factor = loratune.LowRank(torch.randn(3, 2, 4), torch.randn(3, 5, 2), 0.5)
    weight = torch.randn(3, 5, 4)
    stack = experts._Stack(weight, [factor], swapped=False)
    total = weight + 0.5 * factor.B @ factor.A
    x = torch.randn(7, 4)
    assert torch.allclose(stack[1].T, total[1].T) and torch.allclose(stack[0:2], total[0:2])
    assert torch.allclose(torch.einsum("ti,oi->to", x, stack[2]), x @ total[2].T, atol=1e-6)
    assert torch.allclose(torch.bmm(x.expand(3, 7, 4), stack.transpose(1, 2)), x @ total.transpose(1, 2), atol=1e-6)
    assert torch.allclose(torch.nn.functional.linear(x, stack[2]), x @ total[2].T, atol=1e-6)
    assert stack.shape == weight.shape and stack[0].dtype == torch.float32
    turned = experts._Stack(weight.transpose(1, 2), [factor], swapped=True)
    assert torch.allclose(turned.transpose(1, 2), total) and torch.allclose(turned[1].T, total[1])


def test_the_parameter_is_back_in_its_place_after_an_error():
    attached = adapted("mixtral")
    wrapper = attached.model.model.layers[0].mlp.experts
    with pytest.raises(TypeError):
        wrapper(1, 2, 3)
    assert "gate_up_proj" not in wrapper.base.__dict__ and isinstance(wrapper.base.gate_up_proj, nn.Parameter)
