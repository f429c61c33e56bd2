"""The figures against what really happens: real adapters, real files, counted operations."""

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import loratune
from families import CAUSAL, ENCODER, FAMILIES, SEQ2SEQ, VISION
from loratune.adapter.config import LoraConfig
from loratune.explain import facts
from loratune.explain.texts import PRESET_NAMES, TOPICS

SOME = ("llama", "gemma3_text", "gpt2", "phi3", "falcon", "opt", "bert", "albert", "t5_gated", "bart")


def facts_of(name: str) -> facts.Model:
    return facts.of(FAMILIES[name](), torch.float32)


def costs(steps: list[facts.Cost | facts.NoCost]) -> list[facts.Cost]:
    assert all(isinstance(step, facts.Cost) for step in steps), steps
    return [step for step in steps if isinstance(step, facts.Cost)]


def tensor_bytes(path: Path) -> int:
    """The bytes of a safetensors file after its header."""
    content = path.read_bytes()
    return len(content) - 8 - struct.unpack("<Q", content[:8])[0]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_a_preset_costs_what_it_costs(name: str, preset: str, tmp_path: Path) -> None:
    cost = facts.cost_of_preset(facts_of(name), preset)
    assert isinstance(cost, facts.Cost)
    model = FAMILIES[name]()
    num_base = sum(p.numel() for p in model.parameters())
    attached = loratune.attach(model, LoraConfig.preset(preset))
    for factor in attached.adapter.factors.values():
        factor.B.data.normal_()  # merging leaves weights alone, and tied, where an update is zero
    attached.save(tmp_path / "adapter")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert cost.num_parameters == trained
    assert cost.share == trained / (num_base + trained)
    assert cost.adapter_bytes == tensor_bytes(tmp_path / "adapter" / "adapter_model.safetensors")
    merged = attached.merge()
    assert cost.merged_bytes == 4 * sum(p.numel() for p in merged.parameters())


@pytest.mark.parametrize("setting", [{"bias": "lora_only"}, {"bias": "all"}, {"modules_to_save": ("classifier",)}])
def test_biases_and_whole_modules_count(setting: dict[str, Any]) -> None:
    cost = facts.cost(facts_of("bert"), LoraConfig(**setting), "it")
    model = FAMILIES["bert"]()
    loratune.attach(model, LoraConfig(**setting))
    assert isinstance(cost, facts.Cost)
    assert cost.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_optimizer_holds_two_moments_of_each_trained_number() -> None:
    model = FAMILIES["llama"]()
    loratune.attach(model, LoraConfig())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if v.dim() > 0]
    cost = facts.cost(facts_of("llama"), LoraConfig(), "it")
    assert isinstance(cost, facts.Cost)
    assert cost.optimizer_bytes == sum(m.numel() * m.element_size() for m in moments)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 40, bias=False)
        self.v_proj = nn.Linear(40, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(self.q_proj(x))


def multiplied(to: Any, left: Any, right: Any, out_shape: Any = None, **_: Any) -> int:
    """A product of (m, k) and (k, n) takes m k n multiplications and as many additions."""
    return 2 * left[0] * left[1] * right[1]


def operations(model: nn.Module) -> int:
    """What a training step multiplies, forward and backward, down to the input's gradient."""
    in_place = {torch.ops.aten.addmm_: multiplied}  # which torch's counter leaves out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(torch.randn(7, 24, requires_grad=True)).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("r", [1, 4])
def test_the_added_work_is_what_is_counted(r: int) -> None:
    plain = TwoLayers().requires_grad_(False)
    base = operations(plain)
    cost = facts.cost(facts.of(plain, torch.float32), LoraConfig(r=r), "it")
    tuned = TwoLayers()
    loratune.attach(tuned, LoraConfig(r=r, lora_dropout=0.0))
    assert isinstance(cost, facts.Cost)
    assert cost.extra_flops == pytest.approx((operations(tuned) - base) / base, rel=1e-9)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("topic", ["r", "A", "B"])
def test_doubling_r_doubles_the_adapter_and_not_the_merged_model(name: str, topic: str) -> None:
    steps = costs(facts.doubled(facts_of(name), topic))
    for before, after in pairwise(steps):
        assert after.num_parameters == 2 * before.num_parameters
        assert after.extra_flops == pytest.approx(2 * before.extra_flops)
        assert (after.scale, after.merged_bytes) == (before.scale, before.merged_bytes)


def test_doubling_alpha_doubles_the_scale_alone() -> None:
    steps = costs(facts.doubled(facts_of("llama"), "lora_alpha"))
    assert [step.scale for step in steps] == [1, 2, 4]
    assert len({step.num_parameters for step in steps}) == 1


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODER, *SEQ2SEQ, *VISION])
def test_every_topic_has_an_answer_on_every_family(name: str) -> None:
    model = facts_of(name)
    missing = {role.role for role in facts.by_role(model) if not role.names}
    for topic in TOPICS:
        steps = facts.doubled(model, topic)
        assert bool(steps) != (topic in missing), topic
        refused = [step for step in steps if isinstance(step, facts.NoCost)]
        assert not refused or topic == "bias", refused
    assert len(costs(facts.presets(model))) == 3


def test_roles_have_their_names_shapes_and_counts() -> None:
    rows = {role.role: role for role in facts.by_role(facts_of("llama"))}
    assert rows["query"] == facts.Role("query", {"q_proj": ("query",)}, [(32, 32, 2)], 2, 2 * 32 * 32)
    assert rows["key"].shapes == [(16, 32, 2)]
    assert rows["down"].shapes == [(32, 48, 2)]
    assert rows["head"] == facts.Role("head", {"lm_head": ("head",)}, [(128, 32, 1)], 1, 128 * 32)
    fused = {role.role: role for role in facts.by_role(facts_of("gpt2"))}
    assert fused["key"].names == {"c_attn": ("query", "key", "value")}
    assert fused["key"].shapes == [(96, 32, 2)]  # Conv1D stores (inputs, outputs)
    assert fused["gate"].names == {}


def test_the_map_shows_the_first_preset_that_reaches_a_layer() -> None:
    plain = facts.coverage(facts_of("llama"))
    assert plain.layers == ["model.layers.0", "model.layers.1"]
    assert {role: row[0] for role, row in plain.reached.items()} == {
        **{"query": "fast", "key": "quality", "value": "fast", "output": "quality"},
        **{"gate": "deep", "up": "deep", "down": "deep", "head": None},
    }
    assert plain.outside == {"head": "deep"}
    fused = facts.coverage(facts_of("gpt2"))
    assert set(fused.reached["key"]) == {"fast"}  # a fused layer is taken whole
    assert set(fused.reached["gate"]) == {None}


@pytest.mark.parametrize("name", SOME)
def test_the_map_agrees_with_the_adapters(name: str) -> None:
    """A layer is reached by a preset exactly if attaching the preset adapts something there."""
    reached = facts.coverage(facts_of(name))
    for index, preset in enumerate(PRESET_NAMES):
        model = FAMILIES[name]()
        attached = loratune.attach(model, LoraConfig.preset(preset))
        adapted = set(attached.adapter.factors)
        for role, cells in reached.reached.items():
            for layer, cell in zip(reached.layers, cells, strict=True):
                wanted = cell is not None and PRESET_NAMES.index(cell) <= index
                paths = [p for p, own in facts_of(name).paths.items() if role in own and p.startswith(layer + ".")]
                assert any(path in adapted for path in paths) == wanted, (preset, role, layer)


def test_a_token_passes_the_experts_it_is_sent_to() -> None:
    module = FAMILIES["mixtral"]()
    model = facts.of(module, torch.float32)
    stacked = sum(p.numel() for p in module.parameters() if p.dim() == 3)
    linear = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
    assert model.frozen_weights == linear + stacked * 2 // 4  # 2 of 4 experts
    assert facts.has_stacked_experts(model) and not facts.has_stacked_experts(facts_of("llama"))
