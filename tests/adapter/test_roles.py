"""Roles and presets: expected layers written by hand per family, PEFT as the oracle of what a saved name selects."""

import subprocess
import sys
from functools import cache
from typing import NamedTuple

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from families import CAUSAL, ENCODER, FAMILIES, SEQ2SEQ, VISION, inputs_for
from loratune.adapter.roles import (
    PRESET_SETTINGS,
    PRESETS,
    ROLES,
    coverage,
    describe,
    minimal_targets,
    module_roles,
    roles_of,
    select,
    taken_for_experts,
)
from loratune.errors import ConfigError


class Blocks(NamedTuple):
    """Repeated layers: their paths, and the names that each preset adds to the one before it."""

    paths: tuple[str, ...]
    fast: str
    quality: str
    deep: str


def blocks(path: str, layers: int, fast: str, quality: str, deep: str) -> Blocks:
    return Blocks(tuple(path.format(i) for i in range(layers)), fast, quality, deep)


def llama_like(layers: int = 2) -> Blocks:
    attention = ("self_attn.q_proj self_attn.v_proj", "self_attn.k_proj self_attn.o_proj")
    return blocks("model.layers.{}", layers, *attention, "mlp.gate_proj mlp.up_proj mlp.down_proj")


def bert_like(path: str) -> Blocks:
    attention = ("attention.self.query attention.self.value", "attention.self.key attention.output.dense")
    return blocks(path, 2, *attention, "intermediate.dense output.dense")


def fused(path: str, attention: str, query: str, output: str, mlp: str, layers: int = 2) -> Blocks:
    return blocks(path, layers, f"{attention}.{query}", f"{attention}.{output}", mlp)


def t5_like(mlp: str) -> list[Blocks]:
    own = ("layer.0.SelfAttention.q layer.0.SelfAttention.v", "layer.0.SelfAttention.k layer.0.SelfAttention.o")
    cross = own[0].replace("0.Self", "1.EncDec"), own[1].replace("0.Self", "1.EncDec")
    return [
        blocks("encoder.block.{}", 2, *own, mlp.replace("wx", "layer.1.DenseReluDense")),
        blocks("decoder.block.{}", 2, *own, ""),
        blocks("decoder.block.{}", 2, *cross, mlp.replace("wx", "layer.2.DenseReluDense")),
    ]


def bart_like(attention: str, path: str, mlp: str) -> Blocks:
    names = (f"{attention}.q_proj {attention}.v_proj", f"{attention}.k_proj {attention}.out_proj")
    return blocks(path, 2, *names, mlp)


_BLOOM_MLP = "mlp.dense_h_to_4h mlp.dense_4h_to_h"
_FALCON = fused("transformer.h.{}", "self_attention", "query_key_value", "dense", _BLOOM_MLP)
_VIT = ("attention.q_proj attention.v_proj", "attention.k_proj attention.o_proj", "mlp.fc1 mlp.fc2")
_LLAMA_KIN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "cohere", "granite", "olmo2", "smollm3", "stablelm")

# family -> (repeated layers, head), read off the printed modules of transformers 5.23
EXPECTED: dict[str, tuple[list[Blocks], str | None]] = {
    **{name: ([llama_like()], "lm_head") for name in _LLAMA_KIN},
    "gemma2": ([llama_like(3)], "lm_head"),
    "gemma3_text": ([llama_like(3)], "lm_head"),
    "phi": ([llama_like()._replace(quality="self_attn.k_proj self_attn.dense", deep="mlp.fc1 mlp.fc2")], "lm_head"),
    "starcoder2": ([llama_like()._replace(deep="mlp.c_fc mlp.c_proj")], "lm_head"),
    "mixtral": ([llama_like()._replace(deep="")], "lm_head"),  # experts are stacked parameters, the router has no role
    "qwen3_moe": (  # layer 1 is sparse
        [
            llama_like()._replace(deep=""),
            Blocks(("model.layers.0",), "", "", "mlp.gate_proj mlp.up_proj mlp.down_proj"),
        ],
        "lm_head",
    ),
    "phi3": (
        [fused("model.layers.{}", "self_attn", "qkv_proj", "o_proj", "mlp.gate_up_proj mlp.down_proj")],
        "lm_head",
    ),
    "gpt2": ([fused("transformer.h.{}", "attn", "c_attn", "c_proj", "mlp.c_fc mlp.c_proj")], "lm_head"),
    "gpt_neox": ([fused("gpt_neox.layers.{}", "attention", "query_key_value", "dense", _BLOOM_MLP)], "lm_head"),
    "gptj": ([bart_like("attn", "transformer.h.{}", "mlp.fc_in mlp.fc_out")], "lm_head"),
    "falcon": ([_FALCON], "lm_head"),
    "falcon_alibi": ([_FALCON], "lm_head"),
    "bloom": ([_FALCON], "lm_head"),
    "opt": ([bart_like("self_attn", "model.decoder.layers.{}", "fc1 fc2")], "lm_head"),
    "mpt": ([fused("transformer.blocks.{}", "attn", "Wqkv", "out_proj", "ffn.up_proj ffn.down_proj")], "lm_head"),
    "bert": ([bert_like("bert.encoder.layer.{}")], None),
    "bert_mlm": ([bert_like("bert.encoder.layer.{}")], "cls.predictions.decoder"),
    "roberta": ([bert_like("roberta.encoder.layer.{}")], None),
    "electra": ([bert_like("electra.encoder.layer.{}")], None),
    "deberta": (
        [
            bert_like("deberta.encoder.layer.{}")._replace(
                fast="attention.self.in_proj", quality="attention.output.dense"
            )
        ],
        None,
    ),
    "deberta_v2": (
        [
            bert_like("deberta.encoder.layer.{}")._replace(
                fast="attention.self.query_proj attention.self.value_proj",
                quality="attention.self.key_proj attention.output.dense",
            )
        ],
        None,
    ),
    "distilbert": (
        [
            blocks(
                "distilbert.transformer.layer.{}",
                2,
                "attention.q_lin attention.v_lin",
                "attention.k_lin attention.out_lin",
                "ffn.lin1 ffn.lin2",
            )
        ],
        None,
    ),
    "modernbert": ([fused("model.layers.{}", "attn", "Wqkv", "Wo", "mlp.Wi mlp.Wo", layers=3)], None),
    "albert": (
        [
            blocks(
                "albert.encoder.albert_layer_groups.0.albert_layers.{}",
                1,
                "attention.query attention.value",
                "attention.key attention.dense",
                "ffn ffn_output",
            )
        ],
        None,
    ),
    "t5": (t5_like("wx.wi wx.wo"), "lm_head"),
    "t5_gated": (t5_like("wx.wi_0 wx.wi_1 wx.wo"), "lm_head"),
    "bart": (
        [
            bart_like("self_attn", "model.encoder.layers.{}", "fc1 fc2"),
            bart_like("self_attn", "model.decoder.layers.{}", "fc1 fc2"),
            bart_like("encoder_attn", "model.decoder.layers.{}", ""),
        ],
        "lm_head",
    ),
    "vit": ([blocks("vit.layers.{}", 2, *_VIT)], None),
    "segformer": (
        [blocks("segformer.stages.0.blocks.{}", 2, *_VIT), blocks("segformer.stages.1.blocks.{}", 1, *_VIT)],
        None,
    ),
}


def expected(family: str, preset: str) -> set[str]:
    parts, head = EXPECTED[family]
    fields = ("fast", "quality", "deep")[: {"fast": 1, "quality": 2}.get(preset, 3)]
    paths = {f"{path}.{n}" for part in parts for path in part.paths for f in fields for n in getattr(part, f).split()}
    return paths | ({head} if head and len(fields) == 3 else set())


@cache
def model_of(family: str) -> PreTrainedModel:
    """Shared: tests only look at it."""
    return FAMILIES[family]()


def paths_of(model: nn.Module) -> list[str]:
    return [path for path, _ in model.named_modules()]


def test_the_zoo_is_complete_and_runs() -> None:
    assert set(EXPECTED) == set(FAMILIES) == {*CAUSAL, *ENCODER, *SEQ2SEQ, *VISION}
    for family in FAMILIES:
        with torch.no_grad():
            logits = model_of(family)(**inputs_for(family)).logits
        assert logits.isfinite().all() and logits.dtype == torch.float32
        assert logits.std() > 0.1, family  # logits that hardly differ would hide mistakes from every test built on them


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_selects_the_layers_a_human_expects(family: str, preset: str) -> None:
    selected = select(model_of(family), preset)
    assert set(selected) == expected(family, preset)
    assert selected == [path for path in paths_of(model_of(family)) if path in set(selected)]


# PEFT 0.21 takes the names of a sparse model's dense MLP for its experts: the test after this one.
_PEFT_CASES = [(f, p) for f in FAMILIES for p in ("fast", "quality", "deep") if (f, p) != ("qwen3_moe", "deep")]


@pytest.mark.parametrize(("family", "preset"), _PEFT_CASES)
def test_the_names_saved_select_the_same_layers_in_peft(family: str, preset: str) -> None:
    model = FAMILIES[family]()
    selected = select(model, preset)
    targets = minimal_targets(selected, paths_of(model))
    assert taken_for_experts(model, targets) == []
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets)).base_model.model
    assert {p for p, m in wrapped.named_modules() if isinstance(m, BaseTunerLayer)} == set(selected)


def test_names_that_peft_takes_for_experts_are_told() -> None:
    model = FAMILIES["qwen3_moe"]()
    dense = ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    assert taken_for_experts(model, [*dense, "q_proj"]) == dense
    assert taken_for_experts(model_of("llama"), ["gate_proj"]) == []
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=dense)).base_model.model
    reached = {p for p, m in wrapped.named_modules() if isinstance(m, BaseTunerLayer)}
    assert reached and not reached & set(dense)  # full paths of layer 0, and PEFT adapts the experts of layer 1


@pytest.mark.parametrize("preset", ["fast", "quality", "deep"])
@pytest.mark.parametrize("family", FAMILIES)
def test_coverage_of_a_preset_is_whole_and_even(family: str, preset: str) -> None:
    cover = coverage(model_of(family), select(model_of(family), preset))
    layers = {path for part in EXPECTED[family][0] for path in part.paths}
    for role in PRESETS[preset]:
        row = cover.roles[role]
        assert row.num_adapted == row.num_layers and row.num_in_part == 0
    assert cover.roles["query"].num_layers == cover.roles["value"].num_layers == len(layers) == len(cover.layers)
    assert cover.roles["head"].num_layers == (EXPECTED[family][1] is not None)
    assert (cover.uneven, cover.bare_layers, cover.other) == ([], [], ())


_GPT2_MAP = """\
query   2/2  c_attn (fused: query, key, value)
key     2/2  c_attn (fused: query, key, value)
value   2/2  c_attn (fused: query, key, value)
output  2/2  attn.c_proj
gate    -
up      0/2  c_fc
down    0/2  mlp.c_proj
head    0/1  lm_head
layers  2/2"""
_BERT_MAP = """\
query   2/2  query
key     0/2  key
value   2/2  value
output  0/2  attention.output.dense
gate    -
up      0/2  intermediate.dense
down    0/2  output.dense
head    -
layers  2/2"""
_QWEN3_MOE_MAP = """\
query   2/2  q_proj
key     2/2  k_proj
value   2/2  v_proj
output  2/2  o_proj
gate    1/1  gate_proj
up      1/1  up_proj
down    1/1  down_proj
head    1/1  lm_head
layers  2/2
experts 1  model.layers.1.mlp.experts (stacked weights; presets do not reach them)"""


@pytest.mark.parametrize(
    ("family", "preset", "text"),
    [("gpt2", "quality", _GPT2_MAP), ("bert", "fast", _BERT_MAP), ("qwen3_moe", "deep", _QWEN3_MOE_MAP)],
)
def test_the_map_reads_as_text(family: str, preset: str, text: str) -> None:
    assert coverage(model_of(family), select(model_of(family), preset)).render() == text


def test_uneven_coverage_is_named() -> None:
    cover = coverage(
        model_of("t5"), ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.0.SelfAttention.q"]
    )
    assert cover.roles["query"].layers == {
        "encoder.block.0": (1, 1),
        "encoder.block.1": (0, 1),
        "decoder.block.0": (0, 2),
        "decoder.block.1": (1, 2),  # self-attention is adapted, cross-attention is not
    }
    assert cover.uneven == ["query"] and cover.bare_layers == ["encoder.block.1", "decoder.block.0"]
    lines = cover.render().splitlines()
    assert lines[0] == "query   2/4  q (1 in part)" and lines[-1] == "uneven: query (adapted in some layers only)"


def test_a_layer_without_any_role_is_bare() -> None:
    """A hybrid: attention stands in one layer of two, so the role is whole and the model is not."""
    mixer = nn.ModuleDict({"mixer": nn.ModuleDict({"in_proj": nn.Linear(2, 2)})})
    attention = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})})
    cover = coverage(nn.Sequential(mixer, attention), ["1.self_attn.q_proj"])
    assert cover.uneven == [] and cover.bare_layers == ["0"] and "layers  1/2" in cover.render()


def test_adapted_layers_without_a_role_are_counted_apart() -> None:
    cover = coverage(model_of("bert"), ["bert.pooler.dense", "bert.embeddings.word_embeddings"])
    assert set(cover.other) == {"bert.pooler.dense", "bert.embeddings.word_embeddings"}
    assert "other   2  bert.embeddings.word_embeddings, bert.pooler.dense" in cover.render()
    with pytest.raises(ConfigError, match=r"1 of 1 paths are not modules of the model; first: 'bert\.poler'"):
        coverage(model_of("bert"), ["bert.poler"])


class Wrapper(nn.Module):
    """What the library's own wrapper looks like from outside: the frozen layer in `base`, more modules beside it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.factor = nn.Linear(2, 2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "bert_mlm"])
def test_a_wrapped_layer_keeps_its_path_and_roles(family: str) -> None:
    model = FAMILIES[family]()
    plain = module_roles(model)
    for path in select(model, "deep"):
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, Wrapper(model.get_submodule(path)))
    assert module_roles(model) == plain
    assert list(module_roles(model)) == list(plain)


def test_the_projection_inside_torch_attention_is_no_layer() -> None:
    """nn.MultiheadAttention reads out_proj.weight and never calls it, so a wrapper there would change nothing."""
    assert module_roles(nn.TransformerEncoderLayer(8, 2)).keys() == {"linear1", "linear2"}


@pytest.mark.parametrize(
    ("path", "roles"),
    [
        ("model.layers.3.self_attn.q_a_proj", "query"),  # DeepSeek-V2, V3
        ("model.layers.3.self_attn.q_b_proj", "query"),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa", "key value"),
        ("model.layers.3.self_attn.kv_b_proj", "key value"),
        ("model.layers.3.mlp.shared_experts.gate_proj", "gate"),
        ("model.layers.3.mlp.gate", ""),
        ("model.layers.3.mlp.shared_expert_gate", ""),
        ("model.layers.3.linear_attn.in_proj_qkvz", "query key value"),  # Qwen3-Next
        ("model.layers.3.linear_attn.in_proj_ba", ""),
        ("model.layers.3.linear_attn.out_proj", "output"),
        ("model.layers.3.mamba.out_proj", ""),  # hybrids: a state-space mixer is no attention
        ("model.layers.3.shared_mlp.input_linear", "gate up"),  # Granite MoE hybrid
        ("transformer.h.3.attn.attention.out_proj", "output"),  # GPT-Neo
        ("transformer.h.3.attn.qkv_proj", "query key value"),  # CodeGen
        ("transformer.h.3.crossattention.c_attn", "key value"),  # GPT-2 reading an encoder
        ("transformer.h.3.crossattention.q_attn", "query"),
        ("transformer.h.3.crossattention.c_proj", "output"),
        ("attentions.3.q_lin", "query"),  # XLM
        ("attentions.3.out_lin", "output"),
        ("mpnet.encoder.layer.3.attention.attn.o", "output"),  # MPNet
        ("encoder.layers.3.feed_forward.intermediate_dense", "up"),  # wav2vec2
        ("blocks.3.attention.key", "key"),  # RWKV
        ("blocks.3.feed_forward.key", ""),
        ("vision_model.head.mlp.fc1", ""),  # SigLIP's pooling head
        ("vision_model.encoder.layers.3.mlp.fc1", "up"),
        ("model.visual.blocks.3.attn.qkv", "query key value"),  # Qwen2-VL
        ("model.visual.blocks.3.attn.proj", "output"),
        ("lm_head.dense", ""),
        ("classification_head.out_proj", ""),
        ("encoder.layer.3.not_q_proj", ""),
        ("q_proj.something", ""),
    ],
)
def test_roles_of_families_outside_the_zoo(path: str, roles: str) -> None:
    assert roles_of(path) == tuple(roles.split())
    assert roles_of("base_model.model." + path) == tuple(roles.split())


def test_errors_name_what_was_asked_and_what_is_there() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'fats'.*did you mean 'fast'\?"):
        select(model_of("llama"), "fats")
    strange = nn.ModuleDict({"mix": nn.Linear(2, 2), "blend": nn.Linear(2, 2)})
    with pytest.raises(
        ConfigError, match=r"'fast' finds none of its roles \(query, value\) in ModuleDict.*mix \(1\), blend \(1\)"
    ):
        select(strange, "fast")
    with pytest.raises(ConfigError, match="unknown role 'querry'"):
        describe("querry")


def test_presets_climb_and_settings_match_them() -> None:
    assert PRESETS.keys() == PRESET_SETTINGS.keys()
    assert set(PRESETS["fast"]) < set(PRESETS["quality"]) < set(PRESETS["deep"]) == set(ROLES)
    assert PRESETS["expert"] == PRESETS["deep"] and PRESET_SETTINGS["expert"] == PRESET_SETTINGS["deep"]
    assert all(row["lora_alpha"] == 2 * row["r"] for row in PRESET_SETTINGS.values())
    assert len({describe(role) for role in ROLES}) == 8


def test_presets_are_read_without_torch() -> None:
    code = "import sys, loratune.adapter.roles; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def peft_selects(targets: list[str], paths: set[str]) -> set[str]:
    """PEFT's rule, written again: a list entry matches a whole path or its end from a dot on."""
    return {path for path in paths if any(path == target or path.endswith("." + target) for target in targets)}


@st.composite
def trees(draw: st.DrawFn) -> tuple[set[str], set[str]]:
    """A module tree (every parent is there too) over few names, so that suffixes collide, and some of its paths."""
    leaf = st.lists(st.sampled_from(["a", "b", "dense", "0", "1", "10"]), min_size=1, max_size=4)
    leaves = draw(st.lists(leaf, min_size=1, max_size=12))
    paths = {".".join(leaf[:end]) for leaf in leaves for end in range(1, len(leaf) + 1)}
    return paths, draw(st.sets(st.sampled_from(sorted(paths))))


@given(trees())
def test_minimal_targets_select_exactly_and_cannot_be_shortened(tree: tuple[set[str], set[str]]) -> None:
    paths, selected = tree
    try:
        targets = minimal_targets(selected, ["", *paths])
    except ConfigError:  # only where one path is the end of another, which is not selected
        assert any(longer.endswith("." + path) for path in selected for longer in paths - selected)
        return
    assert peft_selects(targets, paths) == selected
    assert targets == sorted(set(targets))
    for target in targets:
        assert peft_selects([other for other in targets if other != target], paths) != selected
        shorter = target.partition(".")[2]
        assert not shorter or not peft_selects([shorter], paths) <= selected


def test_minimal_targets_examples() -> None:
    llama, bert = model_of("llama"), model_of("bert")
    assert minimal_targets(select(llama, "fast"), paths_of(llama)) == ["q_proj", "v_proj"]
    down = [path for path, roles in module_roles(bert).items() if roles == ("down",)]
    assert minimal_targets(down, paths_of(bert)) == ["0.output.dense", "1.output.dense"]
    assert minimal_targets([], paths_of(bert)) == []
    with pytest.raises(ConfigError, match="cannot name 'a' alone"):
        minimal_targets(["a"], ["a", "b", "b.a"])


def test_only_stacks_of_experts_are_told_as_stacked() -> None:
    assert coverage(FAMILIES["vit"](), ()).stacked == ()  # its class token is a parameter of three dimensions
    assert all(path.endswith("experts") for path in coverage(FAMILIES["mixtral"](), ()).stacked)
