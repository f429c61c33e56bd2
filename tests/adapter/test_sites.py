"""Targets: every wish that cannot be met is one clear error with nothing changed; what is met is what PEFT selects."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from families import FAMILIES
from loratune.adapter.attach import Attachments, attach
from loratune.adapter.config import LoraConfig
from loratune.adapter.factor import TokenRows
from loratune.adapter.sites import find, saved_paths
from loratune.adapter.wrapper import lookup
from loratune.errors import AdapterError, ConfigError
from oracles import same_state, state_of

_WISHES: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt name": (
        {"target_modules": ["q_proj", "v_porj"]},
        r"no layer of LlamaForCausalLM is named 'v_porj'\. Nearest: .*v_proj.*Nothing was attached",
    ),
    "a misspelt dotted name": (
        {"target_modules": ["self_atn.q_proj"]},
        r"named 'self_atn\.q_proj'\. Nearest: self_attn\.q_proj",
    ),
    "a regex for a part of the path": (
        {"target_modules": "q_proj"},
        r"'q_proj' is a regular expression for whole paths and matches none of LlamaForCausalLM's layers\. "
        r"Nearest: q_proj.* For names, give a list: \['q_proj'\]",
    ),
    "a broken regex": ({"target_modules": "("}, r"target_modules='\(' is not a regular expression"),
    "a layer that cannot be adapted": (
        {"target_modules": ["input_layernorm"]},
        r"model\.layers\.0\.input_layernorm is a LlamaRMSNorm; a factor can be attached to .*Linear",
    ),
    "a container": ({"target_modules": ["mlp"]}, r"model\.layers\.0\.mlp is a LlamaMLP"),
    "an exclusion of nothing": (
        {"target_modules": ["q_proj"], "exclude_modules": ["v_proj"]},
        r"exclude_modules=\['v_proj'\] excludes none of the 2 targeted layers",
    ),
    "an exclusion of an unknown name": (
        {"target_modules": ["q_proj"], "exclude_modules": ["k_porj"]},
        r"exclude_modules: no layer of .* is named 'k_porj'\. Nearest: k_proj",
    ),
    "an exclusion of everything": (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        r"target_modules=\['q_proj'\] leaves no layer of LlamaForCausalLM",
    ),
    "a layer that is not there": (
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 2]},
        r"layers_to_transform: no targeted layer has index 2; found 0 to 1",
    ),
    "a layers_pattern that is not there": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
        r"layers_to_transform: no targeted layer has index 0; found no numbered layers",
    ),
    "a rank for nothing": (
        {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}},
        r"pattern 'v_proj' matches none of the 2 adapted layers",
    ),
    "an alpha for nothing": (
        {"target_modules": ["q_proj"], "alpha_pattern": {"qproj": 4}},
        r"pattern 'qproj' matches none of the 2 adapted layers\. Nearest: q_proj",
    ),
    "an unknown module to save": (
        {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]},
        r"modules_to_save: no layer of LlamaForCausalLM is named 'classifier'",
    ),
    "biases where there are none": (
        {"target_modules": ["q_proj"], "bias": "lora_only"},
        r"bias='lora_only', but LlamaForCausalLM has no such bias",
    ),
}


@pytest.mark.parametrize("wish", _WISHES)
def test_a_wish_that_cannot_be_met_is_an_error_and_changes_nothing(wish: str) -> None:
    values, message = _WISHES[wish]
    model = FAMILIES["llama"]()
    before, modules = state_of(model), [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=message) as caught:
        attach(model, LoraConfig(**values))
    assert len(str(caught.value)) < 400
    assert_untouched(model, before, modules)


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor], modules: list[type]) -> None:
    assert [type(module) for module in model.modules()] == modules
    assert same_state(model, before) and all(parameter.requires_grad for parameter in model.parameters())
    assert Attachments.of(model) is None


def test_bad_names_and_a_name_in_use_are_refused() -> None:
    model = FAMILIES["llama"]()
    before, modules = state_of(model), [type(module) for module in model.modules()]
    for name in ("", "a/b", "../x", "x" * 65, ".hidden"):
        with pytest.raises(ConfigError, match="adapter name"):
            attach(model, LoraConfig(), name)
    assert_untouched(model, before, modules)
    attach(model, LoraConfig(), "one")
    held = state_of(model)
    with pytest.raises(AdapterError, match="an adapter named 'one' is attached already"):
        attach(model, LoraConfig(r=2), "one")
    assert same_state(model, held)


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-LINEAR"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.0\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "v_proj"], "layers_to_transform": [0]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 5}},
        {"target_modules": ["q_proj"], "rank_pattern": {r"^model\.layers\.0\..*": 3}, "alpha_pattern": {"q_proj": 9}},
    ],
)  # fmt: skip
def test_the_sites_and_their_ranks_and_scales_are_pefts(values: dict[str, Any]) -> None:
    ours = {
        site.path: (site.rank, site.scale) for site in find(FAMILIES["llama"](), LoraConfig(lora_alpha=6, **values))
    }
    theirs = peft.get_peft_model(FAMILIES["llama"](), peft.LoraConfig(lora_alpha=6, **values)).base_model.model
    layers = {path: module for path, module in theirs.named_modules() if isinstance(module, BaseTunerLayer)}
    assert ours == {path: (module.r["default"], module.scaling["default"]) for path, module in layers.items()}


@pytest.mark.parametrize(("family", "head"), [("gpt2", "lm_head"), ("bert_mlm", "cls.predictions.decoder")])
def test_all_linear_leaves_the_head_and_embeddings_alone(family: str, head: str) -> None:
    paths = {site.path for site in find(FAMILIES[family](), LoraConfig(target_modules="all-linear"))}
    assert paths and head not in paths and not any("embed" in path or "wte" in path for path in paths)


def test_a_rank_above_a_side_is_allowed_and_named() -> None:
    model = FAMILIES["llama"]()  # v_proj is 32 -> 16
    attached = attach(model, LoraConfig(r=20, target_modules=["q_proj", "v_proj"]))
    assert "r is above the smaller side of 2 layers (first: model.layers.0.self_attn.v_proj)" in attached.summary()
    attached.detach()
    assert "above" not in attach(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"])).summary()


def stack(width: int, layers: int) -> nn.Module:
    """The attention projections of GPT-3, query and value apart, with no memory behind them."""
    with torch.device("meta"):
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        return nn.ModuleList(nn.ModuleDict({name: nn.Linear(width, width) for name in names}) for _ in range(layers))


@pytest.mark.parametrize(("rank", "expected", "shown"), [(1, 4_718_592, "4.7"), (8, 37_748_736, "37.7")])
def test_trainable_parameters_of_gpt3_are_the_papers(rank: int, expected: int, shown: str) -> None:
    """Hu et al. 2021, table 4: GPT-3 175B, r_q = r_v, 4.7M at r=1 and 37.7M at r=8."""
    model = stack(12288, 96)
    attached = attach(model, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
    assert attached.adapter.num_parameters() == expected
    assert f"{expected / 1e6:.1f}" == shown and f"trainable parameters: {expected:,} of" in attached.summary()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_the_beginning_of_a_site_does_not_depend_on_the_other_sites() -> None:
    few = attach(FAMILIES["llama"](), LoraConfig(target_modules=["v_proj"]), seed=3).adapter.factors
    many = attach(FAMILIES["llama"](), LoraConfig(target_modules="deep"), seed=3).adapter.factors
    assert all(torch.equal(few[path].A, many[path].A) for path in few)
    one, other = list(few.values())
    assert not torch.equal(one.A, other.A)
    again = attach(FAMILIES["llama"](), LoraConfig(target_modules=["v_proj"]), seed=4).adapter.factors
    assert not any(torch.equal(few[path].A, again[path].A) for path in few)


@pytest.mark.parametrize(
    ("init", "std"), [(True, (1 / 3 / 64) ** 0.5), ("gaussian", 1 / 16)], ids=["kaiming", "gaussian"]
)
def test_a_begins_as_in_peft_and_b_at_zero(init: Any, std: float) -> None:
    """Kaiming uniform with a = sqrt(5) is U(-1/sqrt(in), 1/sqrt(in)), whose deviation is 1 / sqrt(3 in)."""
    model = nn.ModuleDict({"layer": nn.Linear(64, 512)})
    factor = attach(model, LoraConfig(r=16, target_modules=["layer"], init_lora_weights=init), seed=0).adapter.factors
    assert abs(float(factor["layer"].A.detach().std()) / std - 1) < 0.05 and not factor["layer"].B.any()


_Build = Callable[[], nn.Module]


@pytest.mark.parametrize("build", [lambda: nn.Linear(2, 2), lambda: nn.Sequential(nn.ReLU())])
def test_models_with_nothing_to_adapt_say_so(build: _Build) -> None:
    with pytest.raises(ConfigError):
        attach(build(), LoraConfig())


class _Shared(nn.Module):
    """An embedding, and a module of no kind we know that has its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(6, 4)
        self.out = nn.Module()
        self.out.weight = self.emb.weight


def test_a_module_that_shares_a_weight_and_cannot_be_adapted_is_refused() -> None:
    model = _Shared()
    with pytest.raises(ConfigError, match=r"out, a Module, cannot be tied to emb\. Nothing was attached"):
        attach(model, LoraConfig(r=2, target_modules=["emb"], ensure_weight_tying=True))
    assert not [name for name, _ in model.named_parameters() if "lora" in name.lower()]


def test_the_head_of_the_task_is_saved_beside_what_the_user_names() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "classifier": nn.Linear(4, 2)})
    config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["norm", "score"], task_type="SEQ_CLS")
    assert sorted(saved_paths(model, config)) == ["classifier", "norm"]  # no score here: PEFT names it of itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trained_rows_are_of_the_dtype_asked_for(dtype: torch.dtype) -> None:
    rows = TokenRows(torch.tensor([1, 3]), 6, 4, dtype)
    assert rows.A.dtype == rows.B.dtype == dtype


def test_all_linear_leaves_out_what_tying_will_adapt() -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(6, 4), "body": nn.Linear(4, 4), "turn": nn.Linear(4, 6, bias=False)})
    model["turn"].weight = model["emb"].weight
    plain = find(model, LoraConfig(r=2, target_modules="all-linear"))
    tying = find(model, LoraConfig(r=2, target_modules="all-linear", ensure_weight_tying=True))
    assert [site.path for site in plain] == ["body", "turn"] and [site.path for site in tying] == ["body"]


def test_rows_are_trained_of_an_embedding_only() -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(6, 4), "body": nn.Linear(4, 4)})
    with pytest.raises(ConfigError, match="trainable_token_indices: body is a Linear, not an Embedding"):
        attach(model, LoraConfig(r=2, target_modules=["emb"], trainable_token_indices={"body": [1]}))


def test_a_rank_that_the_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 has 2 groups, which do not divide r=3"):
        attach(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), LoraConfig(r=3, target_modules=["0"]))


def test_a_path_that_is_not_there_is_named() -> None:
    with pytest.raises(AttributeError, match=r"Sequential has no module '0\.weights'"):
        lookup(nn.Sequential(nn.Linear(2, 2)), "0.weights")


def test_the_same_seed_draws_the_same_gaussian_A() -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="gaussian")
    first, second = (attach(nn.Sequential(nn.Linear(4, 4)), config, seed=5).adapter.factors["0"].A for _ in range(2))
    assert torch.equal(first, second)


def test_a_merged_layer_is_as_frozen_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    merged = attach(model, LoraConfig(r=2, target_modules=["0"], lora_bias=True)).merge()
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_a_swap_takes_the_other_configuration_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    one, other = (
        attach(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"]), seed=0)
        for alpha in (2, 8)
    )
    one.swap(copy.deepcopy(other.adapter))
    assert one.config.lora_alpha == 8 and one.adapter.factors["0"].scale == 4
