"""Conversion: what is written means the same by the target's own formula, comes back equal, or is refused."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import FAMILIES, inputs_for
from loratune.adapter import peft_format, stored
from loratune.adapter.attach import load_adapter
from loratune.errors import AdapterError, ConfigError
from loratune.export.convert import MLX_WEIGHTS, convert
from oracles import logits_of, relative
from stored_adapters import saved

_PATTERNS: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj", "up_proj"],
    "use_rslora": True,
    "rank_pattern": {"layers.0.self_attn.q_proj": 2},
    "alpha_pattern": {"v_proj": 7},
}


def mlx_delta(folder: Path, path: str) -> Tensor:
    """mlx-lm's LoRALinear: y + scale (x a) b, so that the weight gains scale (a b)^T; computed in float64."""
    tensors = load_file(folder / MLX_WEIGHTS)
    scale = json.loads((folder / peft_format.CONFIG).read_text())["lora_parameters"]["scale"]
    return scale * (tensors[f"{path}.lora_a"].double() @ tensors[f"{path}.lora_b"].double()).T


@pytest.mark.parametrize("settings", [{}, _PATTERNS, {"target_modules": ["embed_tokens", "v_proj"]}], ids=str)
def test_mlx_computes_the_same_updates(tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = saved(tmp_path / "a", **settings).adapter
    convert(tmp_path / "a", tmp_path / "m", "mlx")
    config = json.loads((tmp_path / "m" / peft_format.CONFIG).read_text())
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", -1)
    assert config["lora_parameters"]["rank"] == max(factor.rank for factor in adapter.factors.values())
    for path, factor in adapter.factors.items():
        assert any(path.endswith(key) for key in config["lora_parameters"]["keys"])
        expected = factor.scale * (factor.B.detach().double() @ factor.A.detach().double())
        assert relative(mlx_delta(tmp_path / "m", path), expected) < 1e-6


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["embed_tokens", "v_proj"], ["lm_head"]], ids=str)
def test_there_and_back_is_equal_bit_for_bit(tmp_path: Path, targets: list[str]) -> None:
    adapter = saved(tmp_path / "a", target_modules=targets, r=3, lora_alpha=5).adapter
    convert(tmp_path / "a", tmp_path / "m", "mlx")
    report = convert(tmp_path / "m", tmp_path / "b", "peft")
    assert (report["from"], report["dtype"]) == ("mlx", ["float32"])
    before, after = (load_file(tmp_path / name / peft_format.WEIGHTS) for name in "ab")
    before = {name: tensor for name, tensor in before.items() if "base_layer" not in name}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    back = load_adapter(FAMILIES["llama"](), tmp_path / "b")
    assert back.adapter.base == adapter.base
    assert (back.config.r, back.config.lora_alpha, back.config.lora_dropout) == (3, 5, 0.0)
    assert set(back.adapter.factors) == set(adapter.factors)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"use_dora": True}, "is a DoRA magnitude, which mlx-lm cannot hold"),
        ("llama", {"lora_bias": True}, "is a bias of B"),
        ("llama", {"modules_to_save": ["lm_head"]}, "lm_head.weight is a trained bias, module or token row"),
        ("gpt2", {"target_modules": ["c_attn"]}, "mlx-lm's name for transformer.h.0.attn.c_attn is not known"),
        ("mixtral", {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}, "stacked experts"),
    ],
)
def test_what_mlx_cannot_hold_is_refused_and_nothing_written(
    tmp_path: Path, family: str, settings: dict[str, Any], message: str
) -> None:
    saved(tmp_path / "a", family, **settings)
    with pytest.raises(AdapterError, match=message):
        convert(tmp_path / "a", tmp_path / "m", "mlx")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


_KEY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("parameters", "damage", "message"),
    [
        ({}, _without(f"{_KEY}.lora_b"), r"lora_b None; expected \(inputs, 4\)"),
        ({"rank": 8}, dict[str, Tensor].copy, r"lora_a \(32, 4\) .* expected \(inputs, 8\)"),
        ({"rank": 0}, dict[str, Tensor].copy, "rank is 0"),
        ({}, lambda tensors: tensors.update({f"{_KEY}.m": torch.ones(3)}), "neither a lora_a nor a lora_b"),
        ({}, lambda tensors: tensors[f"{_KEY}.lora_a"].fill_(float("nan")), "not finite"),
        ({}, dict[str, Tensor].clear, "holds no tensors"),
    ],
)
def test_damaged_mlx_adapters_are_refused(
    tmp_path: Path, parameters: dict[str, Any], damage: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    saved(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "m", "mlx")
    file, tensors = tmp_path / "m" / peft_format.CONFIG, load_file(tmp_path / "m" / MLX_WEIGHTS)
    config = json.loads(file.read_text())
    config["lora_parameters"] |= parameters
    file.write_text(json.dumps(config))
    damage(tensors)
    save_file(tensors, tmp_path / "m" / MLX_WEIGHTS)
    with pytest.raises(AdapterError, match=message):
        convert(tmp_path / "m", tmp_path / "b", "peft")
    assert not (tmp_path / "b").exists()


# --- Rank and type ----------------------------------------------------------------------------------------------------


def test_a_lower_rank_is_the_best_approximation_and_says_what_it_kept(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "a", r=6).adapter
    report = convert(tmp_path / "a", tmp_path / "b", "peft", rank=2)
    lower = peft_format.read(tmp_path / "b")
    shares: dict[str, float] = {}
    for path, factor in adapter.factors.items():
        U, S, Vt = torch.linalg.svd(factor.delta().double(), full_matrices=False)
        assert relative(lower.factors[path].delta(), U[:, :2] * S[:2] @ Vt[:2]) < 1e-5
        shares[path] = float(S[:2].square().sum() / S.square().sum())
    path = min(shares, key=shares.__getitem__)
    assert report["energy_kept"]["at"] == path
    assert report["energy_kept"]["least"] == pytest.approx(shares[path], rel=1e-6)


def test_the_full_rank_folds_patterns_and_rslora_so_that_peft_computes_the_same(tmp_path: Path) -> None:
    attached = saved(tmp_path / "a", **_PATTERNS)
    convert(tmp_path / "a", tmp_path / "b", "peft", rank=4)
    config = json.loads((tmp_path / "b" / peft_format.CONFIG).read_text())
    plain = {"r": 4, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    assert {name: config[name] for name in plain} == plain
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(FAMILIES["llama"](), tmp_path / "b").eval()
    inputs = inputs_for(attached.model)
    assert relative(logits_of(model, inputs), logits_of(attached.model, inputs)) < 1e-5


def test_another_type_is_rounded_once_and_the_rounding_is_reported(tmp_path: Path) -> None:
    saved(tmp_path / "a", use_dora=True)  # more than matrices: a type alone changes nothing else
    report = convert(tmp_path / "a", tmp_path / "b", "peft", dtype="bfloat16")
    before, after = (load_file(tmp_path / name / peft_format.WEIGHTS) for name in "ab")
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)
    assert report["dtype"] == ["bfloat16"] and 1e-4 < report["largest_rounding"] < 2**-8
    assert (tmp_path / "a" / peft_format.CONFIG).read_text() == (tmp_path / "b" / peft_format.CONFIG).read_text()


def test_a_value_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    file = tmp_path / "a" / peft_format.WEIGHTS
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = 1e6
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"reaches 1e\+06, too large for float16. Use bfloat16"):
        convert(tmp_path / "a", tmp_path / "b", "peft", dtype="float16")
    assert not (tmp_path / "b").exists()


def test_terms_and_tokenizer_go_along(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    for name in ("NOTICE.md", "tokenizer.json", "README.md"):
        (tmp_path / "a" / name).write_text(name)
    for to, expected in (("peft", {"NOTICE.md", "tokenizer.json"}), ("mlx", {"NOTICE.md"})):
        convert(tmp_path / "a", tmp_path / to, to)
        copied = {path.name for path in (tmp_path / to).iterdir() if path.suffix != ".safetensors"}
        assert copied - {peft_format.CONFIG} == expected


# --- Experts as PEFT 0.18 stored them ---------------------------------------------------------------------------------


def transposed(folder: Path, to: Path, rank: int) -> None:
    """Writes an adapter's expert factors as PEFT 0.18 did, expert by expert: A (E R, O) and B (I, R E)."""
    to.mkdir()
    (to / peft_format.CONFIG).write_text((folder / peft_format.CONFIG).read_text())
    tensors = load_file(folder / peft_format.WEIGHTS)
    for name in [name for name in tensors if "experts" in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        A, B = tensors[name].clone(), tensors[other].clone()
        experts = len(A) // rank
        tensors[name] = torch.cat([B[:, e::experts].T for e in range(experts)])
        old_B = torch.empty(A.shape[1], len(A))
        for e in range(experts):
            old_B[:, e::experts] = A[e * rank : (e + 1) * rank].T
        tensors[other] = old_B
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, to / peft_format.WEIGHTS)


@pytest.mark.parametrize("layout", [None, "peft-0.18"])
def test_experts_of_peft_0_18_are_turned(tmp_path: Path, layout: str | None) -> None:
    attached = saved(tmp_path / "a", "mixtral", target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    transposed(tmp_path / "a", tmp_path / "old", rank=4)
    with pytest.raises(AdapterError, match=r"PEFT 0\.18"):
        load_adapter(FAMILIES["mixtral"](), tmp_path / "old")
    report = convert(tmp_path / "old", tmp_path / "b", "peft", layout=layout)
    assert report["from"] == "peft-0.18"
    loaded = load_adapter(FAMILIES["mixtral"](), tmp_path / "b").adapter
    assert loaded.factors.keys() == attached.adapter.factors.keys()
    for path, factor in attached.adapter.factors.items():
        assert torch.equal(loaded.factors[path].delta(), factor.delta())
    assert convert(tmp_path / "a", tmp_path / "c", "peft")["from"] == "peft"
    with pytest.raises(ConfigError, match=r"--from is 'peft-0\.18', but the shapes at .* are those of peft\."):
        convert(tmp_path / "a", tmp_path / "d", "peft", layout="peft-0.18")


def test_experts_whose_layout_cannot_be_told_need_a_word(tmp_path: Path) -> None:
    attached = saved(tmp_path / "a", "mixtral", target_parameters=["experts.down_proj"])
    transposed(tmp_path / "a", tmp_path / "old", rank=4)
    with pytest.raises(ConfigError, match=r"do not tell .* Give --from peft .*or --from peft-0\.18"):
        convert(tmp_path / "old", tmp_path / "b", "peft")
    convert(tmp_path / "old", tmp_path / "b", "peft", layout="peft-0.18")
    loaded = load_adapter(FAMILIES["mixtral"](), tmp_path / "b").adapter
    for path, factor in attached.adapter.factors.items():
        assert torch.equal(loaded.factors[path].delta(), factor.delta())


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))
def test_the_layouts_mean_the_same_update(experts: int, rank: int, outputs: int, inputs: int) -> None:
    """By the formulas of the two versions: PEFT 0.18 ore,eri->eio and PEFT 0.19 ore,eri->eoi."""
    A = torch.randn(experts * rank, outputs, dtype=torch.float64)
    B = torch.randn(inputs, rank * experts, dtype=torch.float64)
    new_A, new_B = stored.to_current_layout(A, B, rank)

    def update(A: Tensor, B: Tensor, equation: str) -> Tensor:
        return torch.einsum(equation, B.reshape(len(B), rank, experts), A.reshape(experts, rank, -1))

    assert torch.equal(update(new_A, new_B, "ore,eri->eoi"), update(A, B, "ore,eri->eio"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gguf"}, "--to is 'gguf'; expected one of peft, mlx"),
        ({"to": "peft", "dtype": "int8"}, "--dtype is 'int8'"),
        ({"to": "peft", "rank": 0}, "rank is 0"),
        ({"to": "peft", "layout": "mlx"}, "--from is 'mlx', but .* holds adapter_model.safetensors"),
        ({"to": "peft", "layout": "peft-0.18"}, "has no stacked experts"),
    ],
)
def test_wishes_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    saved(tmp_path / "a")
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "a", tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()
