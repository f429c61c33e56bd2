"""Figures about adapters against brute force on the full matrices, and how sites become groups."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from loratune.adapter import analysis, peft_format
from loratune.adapter.attach import attach
from loratune.adapter.config import LoraConfig
from loratune.adapter.factor import LowRank
from loratune.errors import AdapterError
from loratune.report import adapters as reports
from oracles import randomise
from stored_adapters import saved
from tiny_run import tokenizer


def test_info_is_what_the_full_matrices_say(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "a", target_modules=["q_proj", "down_proj"], use_rslora=True).adapter
    report = reports.info(tmp_path / "a")
    assert {site["path"] for site in report["sites"]} == adapter.factors.keys()
    for site in report["sites"]:
        values = torch.linalg.svdvals(adapter.factors[site["path"]].delta().double())[:4]
        assert site["norm_update"] == pytest.approx(float(values.norm()), rel=1e-5)
        assert site["singular_values"] == pytest.approx(values.tolist(), rel=1e-4)
        assert (site["r"], site["scale"]) == (4, 4.0)
    assert [(group["role"], group["layers"]) for group in report["groups"]] == [
        ("query", ["0", "1"]),
        ("down", ["0", "1"]),
    ]
    norms = [site["norm_update"] for site in report["sites"] if site["role"] == "query"]
    assert report["groups"][0]["norm_update"] == {
        "min": min(norms), "median": pytest.approx(sum(norms) / 2), "max": max(norms), "by_layer": norms,
    }  # fmt: skip
    assert report["notes"] == [] and "amplification" not in report["sites"][0]


def test_amplification_is_the_paper_s_on_the_base_s_weights(tmp_path: Path) -> None:
    """Of GPT-2, whose weights are stored transposed; by the formula on full matrices, U and V of the update itself."""
    base = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    weights = {path: module.weight.detach().double().T for path, module in base.named_modules() if "c_attn" in path}
    attached = attach(base, LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.0))
    randomise(parameter for _, parameter in attached.adapter.named_parameters())
    attached.save(tmp_path / "a")
    report = reports.info(tmp_path / "a", model=str(tmp_path / "base"))
    for site in report["sites"]:
        delta = attached.adapter.factors[site["path"]].delta().double()
        U, S, Vt = torch.linalg.svd(delta)
        inside = U[:, :4].T @ weights[site["path"]] @ Vt[:4].T
        assert site["amplification"] == pytest.approx(float(S.norm() / inside.norm()), rel=1e-4)


def test_a_grouped_convolution_has_the_norm_of_its_update(tmp_path: Path) -> None:
    attached = attach(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), LoraConfig(r=4, target_modules=["0"]))
    randomise(parameter for _, parameter in attached.adapter.named_parameters())
    attached.save(tmp_path / "a")
    (site,) = reports.info(tmp_path / "a")["sites"]
    assert site["norm_update"] == pytest.approx(float(attached.adapter.factors["0"].delta().norm()), rel=1e-5)


def test_what_has_no_figures_is_said(tmp_path: Path) -> None:
    experts = {"target_parameters": ["experts.down_proj"], "modules_to_save": ["lm_head"]}
    attached = saved(tmp_path / "a", "mixtral", **experts)
    attached.adapter.factors["model.layers.0.self_attn.q_proj"].B.data.zero_()
    attached.save(tmp_path / "b")
    report = reports.info(tmp_path / "b")
    assert report["notes"] == [
        "1 sites change nothing: s B A is 0 there. First: model.layers.0.self_attn.q_proj.",
        "2 sites hold stacked experts and are listed without norms. First: model.layers.0.mlp.experts.",
        "4,096 parameters are trained outside factors. First: lm_head.weight.",
    ]
    (stacked,) = [group for group in report["groups"] if "experts" in group["name"]]
    assert stacked["norm_update"] == {"min": None, "median": None, "max": None, "by_layer": [None, None]}


def test_diff_is_what_the_full_matrices_say(tmp_path: Path) -> None:
    one = saved(tmp_path / "a", seed=1).adapter
    other = saved(tmp_path / "b", seed=2, r=6, lora_alpha=3, target_modules=["q_proj", "k_proj"]).adapter
    report = reports.diff(tmp_path / "a", tmp_path / "b")
    assert [row["setting"] for row in report["settings"]] == ["r", "lora_alpha", "target_modules"]
    assert (report["num_shared"], len(report["only_one"]), len(report["only_other"])) == (2, 2, 2)
    for site in report["sites"]:
        first, second = one.factors[site["path"]], other.factors[site["path"]]
        expected = (first.delta() - second.delta()).norm() / first.delta().norm()
        assert site["distance"] == pytest.approx(float(expected), rel=1e-5)
        for name, i, j in (("similarity_top", 1, 1), ("similarity_span", 4, 6)):
            assert site[name] == pytest.approx(analysis.subspace_similarity(first, second, i, j))
            assert site["similarity"][i - 1][j - 1] == pytest.approx(site[name], abs=1e-4)
        assert (site["chance_top"], site["chance_span"]) == (1 / 32, 6 / 32)


def test_an_adapter_is_at_no_distance_from_itself(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    report = reports.diff(tmp_path / "a", tmp_path / "a")
    assert report["settings"] == [] and report["only_one"] == []
    assert all(site["distance"] < 1e-12 for site in report["sites"])
    assert all(site["similarity_top"] == pytest.approx(1) for site in report["sites"])


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 4))
def test_chance_is_the_mean_over_random_spans(seed: int, rank: int, other_rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pairs = [[torch.randn(r, 12, generator=generator) for r in (rank, other_rank)] for _ in range(200)]
    factors = [[LowRank(A, torch.zeros(5, len(A)), 1.0) for A in pair] for pair in pairs]
    mean = sum(float(analysis.similarity_grid(*pair)[-1, -1]) for pair in factors) / len(factors)
    assert mean == pytest.approx(max(rank, other_rank) / 12, abs=0.08)


@pytest.mark.parametrize(("sizes", "expected"), [((0, 0), 0.0), ((0, 1), None), ((1, 0), 1.0), ((2, 1), 0.5)])
def test_distances_from_and_to_nothing(sizes: tuple[int, int], expected: float | None) -> None:
    A, B = torch.randn(2, 5), torch.randn(4, 2)
    one, other = (LowRank(A, B * size, 1.0) for size in sizes)
    found = reports.relative_distance(one, other)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-9))


def test_adapters_of_different_models_are_told(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    saved(tmp_path / "b", "gpt2", target_modules=["c_attn"])
    with pytest.raises(AdapterError, match=r"share no site; first sites: model.*q_proj and transformer.*c_attn"):
        reports.diff(tmp_path / "a", tmp_path / "b")
    adapter = peft_format.read(tmp_path / "a")
    wider = LowRank(torch.zeros(4, 9), torch.zeros(32, 4), 1.0)
    with pytest.raises(AdapterError, match=r"\(outputs, inputs\) is \(32, 32\) in one adapter, \(32, 9\) in the other"):
        reports._compared("x", adapter.factors["model.layers.0.self_attn.q_proj"], wider)


def test_groups_follow_the_roles_and_layers_count_naturally() -> None:
    paths = [
        *(f"model.layers.{n}.mlp.down_proj" for n in (0, 10, 2)),
        *(f"model.layers.{n}.self_attn.q_proj" for n in range(2)),
        *(f"{part}.block.0.layer.0.SelfAttention.q" for part in ("encoder", "decoder")),
        "lm_head",
    ]
    rows: list[dict[str, Any]] = [
        {**reports._placed(path), "r": 4, "size": 1.0} for path in sorted(paths, key=reports._natural)
    ]
    groups = reports.grouped(rows, ["size"])
    assert {(group["role"], group["name"], tuple(group["layers"])) for group in groups} == {
        ("down", "mlp.down_proj", ("0", "2", "10")),
        ("query", "self_attn.q_proj", ("0", "1")),
        ("query", "encoder.block.*.layer.*.SelfAttention.q", ("0.0",)),
        ("query", "decoder.block.*.layer.*.SelfAttention.q", ("0.0",)),
        ("lm_head", "lm_head", ("",)),
    }
    assert [group["role"] for group in groups] == ["query", "query", "query", "down", "lm_head"]


def test_the_spectrum_of_a_grouped_convolution_is_that_of_all_its_groups(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double()
    before = model[0].weight.detach().clone()
    attached = attach(model, LoraConfig(r=4, target_modules=["0"], lora_dropout=0.0), seed=0)
    randomise(p for p in model.parameters() if p.requires_grad)
    attached.save(tmp_path / "a")
    [site] = reports.info(tmp_path / "a")["sites"]
    change = (attached.merge()[0].weight - before).flatten(1)
    each_sees_its_own = torch.block_diag(*change.chunk(2))  # (outputs, inputs of both groups)
    expected = torch.linalg.svdvals(each_sees_its_own)[: len(site["singular_values"])]
    assert site["singular_values"] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
    assert reports.diff(tmp_path / "a", tmp_path / "a")["sites"][0]["distance"] < 1e-9
