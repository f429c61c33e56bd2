"""An adapter that grows: the same output, the old tensors in place, and nothing lost that was trained."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from families import FAMILIES, inputs_for
from loratune.adapter.attach import Attached, attach
from loratune.adapter.config import LoraConfig
from loratune.adapter.grow import check_growth, corner, grow
from loratune.errors import ConfigError
from oracles import IDS, Toy, randomise, relative, same_state, state_of

TARGETS = ("q_proj", "v_proj", "c_fc", "embed", "head")  # Linear with and without a bias, Conv1D, Embedding


def trained(model: nn.Module, config: LoraConfig) -> Attached:
    attached = attach(model, config, seed=0)
    randomise(parameter for _, parameter in attached.adapter.named_parameters())
    return attached


def values(attached: Attached) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in attached.adapter.named_parameters()}


@settings(max_examples=40, deadline=None)
@given(
    small=st.integers(1, 5), more=st.integers(0, 5), scale=st.sampled_from([0.5, 1, 2]),
    targets=st.sets(st.sampled_from(TARGETS), min_size=1), added=st.sets(st.sampled_from(TARGETS)),
    init=st.sampled_from([True, "gaussian"]), variant=st.sampled_from(["plain", "dora", "bias", "saved", "rslora"]),
)  # fmt: skip
def test_the_output_is_the_same_before_and_after(
    small: int, more: int, scale: float, targets: set[str], added: set[str], init: Any, variant: str
) -> None:
    """Also with what trains beside the factors; old tensors stand in the new ones, which are new where they are not."""
    extra: dict[str, Any] = {
        "plain": {}, "dora": {"use_dora": True}, "bias": {"bias": "all"},
        "saved": {"modules_to_save": ("layers.1.v_proj",)}, "rslora": {"use_rslora": True},
    }[variant]  # fmt: skip
    power = 0.5 if variant == "rslora" else 1.0
    alpha = lambda rank: scale * rank**power  # noqa: E731
    config = LoraConfig(
        r=small, lora_alpha=alpha(small), target_modules=tuple(targets), init_lora_weights=init, **extra
    )
    attached = trained(Toy(), config)
    before, old = attached.model(IDS).detach(), values(attached)
    larger = config.with_(r=small + more, lora_alpha=alpha(small + more), target_modules=tuple(targets | added))
    grown = grow(attached, larger, seed=1)
    after = grown.model(IDS).detach()
    assert relative(after, before) <= 1e-12
    new = dict(grown.adapter.named_parameters())
    assert all(torch.equal(corner(new[name], each.shape), each) for name, each in old.items())
    assert grown.config.r == small + more and all(each.requires_grad for each in new.values())
    assert values(attach(Toy(), larger, seed=1)).keys() == new.keys()


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_stacked_experts_and_fused_layers_grow(family: str) -> None:
    model, inputs = FAMILIES[family]().double(), inputs_for(family)
    small = {"mixtral": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
             "gpt2": {"target_modules": ["c_attn"]}}[family]  # fmt: skip
    config = LoraConfig(r=2, lora_dropout=0.0, **small)  # pyright: ignore[reportArgumentType]
    attached = trained(model, config)
    before = attached.model(**inputs)[0].detach()
    grown = grow(attached, config.with_(r=5, lora_alpha=10), seed=0)
    assert relative(grown.model(**inputs)[0].detach(), before) <= 1e-12
    assert {factor.rank for factor in grown.adapter.factors.values()} == {5}


def test_a_new_site_alone_changes_no_bit() -> None:
    for dtype in (torch.float32, torch.float64):
        attached = trained(Toy().to(dtype), LoraConfig(r=2, target_modules=("q_proj",)))
        before = attached.model(IDS).detach()
        grown = grow(attached, attached.config.with_(target_modules=TARGETS), seed=0)
        assert torch.equal(grown.model(IDS).detach(), before)


def test_new_rows_of_a_are_random_from_the_seed_and_none_is_an_old_one() -> None:
    def rows(seed: int) -> Tensor:
        attached = attach(Toy(), LoraConfig(r=2, target_modules=("q_proj",)), seed=0)
        first = attached.adapter.factors["layers.0.q_proj"].A.detach().clone()
        grown = grow(attached, LoraConfig(r=5, target_modules=("q_proj",)), seed=seed)
        factor = grown.adapter.factors["layers.0.q_proj"]
        assert torch.equal(factor.A[:2], first) and not factor.B.any()
        distances = torch.cdist(factor.A[2:].detach(), factor.A.detach())
        assert (distances > 0.01).sum() == distances.numel() - 3  # 0 to itself alone
        return factor.A.detach()

    assert torch.equal(rows(4), rows(4)) and not torch.equal(rows(4)[2:], rows(5)[2:])


def test_growing_is_the_same_as_attaching_anew_with_the_grown_values() -> None:
    """Sites have the same numbers, so dropout masks are the same: a run taken up again goes on as it was."""
    attached = attach(Toy(), LoraConfig(r=2, target_modules=("head",)), seed=0)
    grown = grow(attached, LoraConfig(r=4, target_modules=TARGETS), seed=0)
    fresh = attach(Toy(), LoraConfig(r=4, target_modules=TARGETS), seed=0)
    numbers = [{path: slot.site for path, slot in each._all.slots.items()} for each in (grown, fresh)]
    assert numbers[0] == numbers[1]


def test_detached_the_model_is_the_base_again() -> None:
    model = Toy()
    state = state_of(model)
    attached = trained(model, LoraConfig(r=2, target_modules=("q_proj",), bias="all"))
    grow(attached, attached.config.with_(r=4, lora_alpha=8), seed=0).detach()
    assert same_state(model, state)


SMALL = LoraConfig(r=4, target_modules=("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("before", "changes", "reason"),
    [
        ({}, {"r": 2, "lora_alpha": 4}, r"layers\.0\.q_proj: an adapter cannot grow from r=4 to r=2"),
        ({}, {"r": 8, "lora_alpha": 8}, r"layers\.0\.q_proj: s = 2 would become 1 as r grows from 4 to 8"),
        ({}, {"target_modules": ("q_proj",)}, r"2 of 4 are not in the larger one; first: layers\.0\.v_proj"),
        ({"bias": "all"}, {"bias": "none"}, r"4 of 8 are not in the larger one; first: layers\.0\.q_proj\.bias"),
        ({"modules_to_save": ("head",)}, {"modules_to_save": None}, r"1 of 5 .* first: head\. "),
        ({}, {"use_dora": True}, r"use_dora is False and cannot become True"),
        ({"init_lora_weights": "pissa"}, {"r": 5, "lora_alpha": 10}, r"init_lora_weights='pissa' cannot grow"),
        ({}, {"init_lora_weights": False}, r"init_lora_weights=False cannot grow"),
        ({"init_lora_weights": "orthogonal"}, {"r": 6, "lora_alpha": 12}, r"'orthogonal' cannot grow"),
        ({"rank_pattern": {"v_proj": 8}}, {"rank_pattern": {}}, r"layers\.0\.v_proj: an adapter cannot grow from r=8"),
        ({}, {"target_modules": ("q_proj", "v_prj")}, r"v_prj"),
    ],
)  # fmt: skip
def test_what_cannot_grow_is_refused_and_nothing_is_changed(
    before: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    attached = trained(Toy(), SMALL.with_(**before))
    output, old = attached.model(IDS).detach(), values(attached)
    with pytest.raises(ConfigError, match=reason):
        grow(attached, attached.config.with_(**changes), seed=0)
    assert torch.equal(attached.model(IDS), output)
    assert all(torch.equal(each, old[name]) for name, each in attached.adapter.named_parameters())


def test_a_grouped_convolution_keeps_its_rank() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3, groups=2)

    config = LoraConfig(r=2, target_modules=("conv",))
    check_growth(Net(), config, config)
    with pytest.raises(ConfigError, match="a convolution in 2 groups, whose rank cannot grow"):
        check_growth(Net(), config, config.with_(r=4, lora_alpha=8))
