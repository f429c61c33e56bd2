"""What each consumer is said to refuse, setting by setting; and that the advice given helps."""

from pathlib import Path
from typing import Any

import pytest

from loratune.adapter import peft_format
from loratune.errors import ConfigError
from loratune.export.consumers import CONSUMERS, check
from loratune.export.convert import convert
from stored_adapters import saved

_EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
# (family, settings) -> consumer -> (severity, words of what is said); consumers left out find nothing
_CASES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[str, str]]]] = {
    "plain": ("llama", {}, {}),
    "rank 16": ("llama", {"r": 16}, {}),
    "rank 17": ("llama", {"r": 17}, {"vllm": ("note", "rank 17 is above vLLM's default limit of 16")}),
    "rank 513": ("llama", {"r": 513}, {"vllm": ("refuse", "above the largest --max-lora-rank, 512")}),
    "dora": ("llama", {"use_dora": True}, dict.fromkeys(("vllm", "llama.cpp"), ("refuse", "DoRA's magnitudes"))),
    "saved": (
        "llama",
        {"modules_to_save": ["lm_head"]},
        dict.fromkeys(("vllm", "llama.cpp"), ("refuse", "modules saved in full (lm_head)")),
    ),
    "biases": ("qwen2", {"bias": "lora_only"}, dict.fromkeys(("vllm", "llama.cpp"), ("refuse", "bias='lora_only'"))),
    "bias of B": ("llama", {"lora_bias": True}, dict.fromkeys(("vllm", "llama.cpp"), ("refuse", "lora_bias"))),
    "token rows": (
        "llama",
        {"trainable_token_indices": [3]},
        dict.fromkeys(("vllm", "llama.cpp"), ("refuse", "trainable_token_indices")),
    ),
    "rslora": ("llama", {"use_rslora": True}, {"llama.cpp": ("refuse", "4 of 4 sites would be scaled wrongly")}),
    "alphas": (
        "llama",
        {"alpha_pattern": {"v_proj": 3}},
        dict.fromkeys(("vllm", "llama.cpp"), ("refuse", "2 of 4 sites would be scaled wrongly")),
    ),
    "ranks": ("llama", {"rank_pattern": {"v_proj": 2}}, {"vllm": ("refuse", "v_proj by 2 instead of 4")}),
    "ranks with alphas": (  # scale 2 everywhere, as the global r and alpha say
        "llama",
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 4}},
        {"llama.cpp": ("refuse", "v_proj by 4 instead of 2")},
    ),
    "experts": (
        "mixtral",
        _EXPERTS,
        {"peft": ("note", "layout"), "vllm": ("refuse", "stacked"), "llama.cpp": ("refuse", "stacked")},
    ),
    "head": (
        "llama",
        {"target_modules": ["lm_head"]},
        {"vllm": ("note", "lm_head is adapted"), "llama.cpp": ("note", "refused if the base ties it")},
    ),
    "tied head": (
        "gemma3_text",
        {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
        {"vllm": ("note", "is adapted"), "llama.cpp": ("refuse", "lm_head shares its weight with the embedding")},
    ),
    "convolution": (
        "segformer",
        {"target_modules": ["sequence_reduction.sequence_reduction"]},
        {"llama.cpp": ("refuse", "is a convolution")},
    ),
}


@pytest.mark.parametrize("case", _CASES)
def test_findings(tmp_path: Path, case: str) -> None:
    family, settings, expected = _CASES[case]
    saved(tmp_path / "a", family, **settings)
    found = check(peft_format.read(tmp_path / "a"))
    assert found.keys() == CONSUMERS.keys()
    assert {name for name, findings in found.items() if findings} == expected.keys(), found
    for name, (severity, words) in expected.items():
        (finding,) = found[name]
        assert finding.severity == severity and words in finding.what and finding.advice.endswith("."), finding


@pytest.mark.parametrize(("rank", "flag"), [(17, 32), (32, 32), (65, 128), (257, 320), (512, 512)])
def test_vllm_s_flag_is_the_next_allowed_rank(tmp_path: Path, rank: int, flag: int) -> None:
    saved(tmp_path / "a", r=8, rank_pattern={"layers.0.self_attn.v_proj": rank}, alpha_pattern={"v_proj": 2 * rank})
    found = [each.advice for each in check(peft_format.read(tmp_path / "a"), ["vllm"])["vllm"]]
    assert f"Serve with --enable-lora --max-lora-rank {flag}." in found


@pytest.mark.parametrize("case", ["rslora", "alphas", "ranks", "ranks with alphas"])
def test_the_advice_for_wrong_scales_helps(tmp_path: Path, case: str) -> None:
    family, settings, _ = _CASES[case]
    saved(tmp_path / "a", family, **settings)
    convert(tmp_path / "a", tmp_path / "b", "peft", rank=4)
    assert check(peft_format.read(tmp_path / "b")) == {name: [] for name in CONSUMERS}


def test_unknown_consumers_are_named_with_the_nearest(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"unknown consumer 'vlm'; .* Did you mean 'vllm'\?"):
        check(peft_format.read(tmp_path / "a"), ["peft", "vlm"])
