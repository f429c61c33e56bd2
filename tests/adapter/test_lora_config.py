"""LoraConfig: every bad wish is one clear error, and PEFT's file is read and written field by field."""

import copy
import json
import math
import pickle
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.adapter.config import LoraConfig
from loratune.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, r"r is 0; expected a whole number above 0"),
        ({"r": -3}, r"r is -3"),
        ({"r": 2.5}, r"r is 2\.5"),
        ({"r": True}, r"r is True"),
        ({"r": "8"}, r"r is '8'"),
        ({"lora_alpha": 0}, r"lora_alpha is 0; expected a number above 0\. At 0 the adapter would do nothing"),
        ({"lora_alpha": -1}, r"lora_alpha is -1"),
        ({"lora_alpha": math.nan}, r"lora_alpha is nan"),
        ({"lora_dropout": -0.1}, r"lora_dropout is -0\.1; expected a number from 0 up to, not including, 1"),
        ({"lora_dropout": 1}, r"lora_dropout is 1;"),
        ({"lora_dropout": 1.5}, r"lora_dropout is 1\.5"),
        ({"bias": "some"}, r'bias is \'some\'; expected one of "none", "all", "lora_only"'),
        ({"bias": None}, r"bias is None"),
        ({"task_type": "CAUSAL"}, r"task_type is 'CAUSAL'; expected one of CAUSAL_LM"),
        ({"init_lora_weights": "gausian"}, r"init_lora_weights is 'gausian'"),
        ({"target_modules": []}, r"target_modules is \(\); expected at least one name"),
        ({"target_modules": 5}, r"target_modules is 5 \(int\); expected a string or a list of strings"),
        ({"target_modules": ["q", 5]}, r"target_modules is \['q', 5\] \(list\)"),
        ({"target_modules": ["q"], "layers_to_transform": "0"}, r"layers_to_transform is '0' \(str\)"),
        ({"rank_pattern": None}, r"rank_pattern is None; expected a mapping"),
        ({"use_rslora": "yes"}, r"use_rslora is 'yes'; expected True or False"),
        ({"layers_to_transform": [0]}, r"layers_to_transform and layers_pattern need target_modules as a list"),
        ({"target_modules": ["q"], "layers_pattern": "layers"}, r"layers_pattern is set but layers_to_tr"),
        ({"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "("}, r"pattern '\(' is not a regular"),
        ({"trainable_token_indices": ["a"]}, r"trainable_token_indices is \['a'\]; expected a list of token ids"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] is 0; expected a whole number above 0"),
        ({"alpha_pattern": {"q": 0}}, r"alpha_pattern\['q'\] is 0; expected a number above 0"),
        ({"rank_pattern": {"(": 4}}, r"pattern '\(' is not a regular expression"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_what_was_expected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**values)


def test_defaults_are_the_basic_settings() -> None:
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (8, 16, 0.05, "none")
    assert config.scale("any.path") == 2.0
    assert LoraConfig(r=4).lora_alpha == 8 and LoraConfig(r=4, lora_alpha=4).scale("") == 1.0


def test_a_preset_sets_everything_and_overrides_win() -> None:
    assert LoraConfig.preset("fast") == LoraConfig()
    quality = LoraConfig.preset("quality", lora_dropout=0.0)
    assert (quality.r, quality.lora_alpha, quality.lora_dropout, quality.target_modules) == (16, 32, 0.0, "quality")
    assert LoraConfig.preset("deep", r=4).lora_alpha == 8
    with pytest.raises(ConfigError, match="unknown preset 'fats'"):
        LoraConfig.preset("fats")


def test_a_config_can_be_copied_and_pickled() -> None:
    config = LoraConfig(target_modules=["b", "a"], rank_pattern={"a": 2}, task_type="CAUSAL_LM")
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_rslora_and_patterns_give_rank_and_scale_per_layer() -> None:
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, rank_pattern={"0.q": 16, "q": 2}, alpha_pattern={"v": 3})
    assert [config.rank(path) for path in ("layers.0.q", "layers.1.q", "layers.10.q", "xq")] == [16, 2, 2, 4]
    assert config.scale("layers.0.q") == 8 / 4 and config.scale("a.v") == 3 / 2


def test_a_config_is_a_value() -> None:
    config = LoraConfig(target_modules=["b", "a"], rank_pattern={"a": 2})
    assert config.target_modules == ("b", "a") and config.with_(r=4).r == 4 and config.r == 8
    with pytest.raises(AttributeError):
        config.r = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.rank_pattern["a"] = 3  # type: ignore[index]
    with pytest.raises(ConfigError):
        config.with_(r=0)


@pytest.mark.parametrize(
    "values",
    [
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
        {"target_modules": r".*\.q_proj", "use_rslora": True, "bias": "lora_only"},
        {"target_modules": ["q"], "rank_pattern": {"q": 2}, "alpha_pattern": {"q": 3}, "modules_to_save": ["head"]},
        {"target_modules": ["q"], "layers_to_transform": [0, 2], "layers_pattern": "layers", "lora_dropout": 0.1},
        {"target_modules": ["q"], "exclude_modules": ["x.q"], "init_lora_weights": "gaussian"},
    ],
)
def test_what_peft_writes_means_the_same_here(values: dict[str, Any]) -> None:
    theirs = peft.LoraConfig(**values)
    written = json.loads(json.dumps(theirs.to_dict(), default=list))
    ours = LoraConfig.from_peft(written, "adapter_config.json")
    for name, value in values.items():
        found = getattr(ours, name)
        expected = [value] if name == "layers_pattern" else value
        assert (sorted(found) if isinstance(found, tuple) else found) == expected, name
    assert ours.lora_alpha == theirs.lora_alpha and ours.lora_dropout == theirs.lora_dropout


def test_what_is_written_here_is_read_by_peft_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    ours = LoraConfig(
        r=4, target_modules="fast", modules_to_save=["head"], rank_pattern={"q": 2}, task_type="CAUSAL_LM"
    )
    written = json.loads(json.dumps(ours.to_peft(["v", "q"], False)))
    theirs = peft.LoraConfig.from_peft_type(**written)
    assert (theirs.r, theirs.lora_alpha, theirs.lora_dropout) == (4, 8, 0.05)
    assert theirs.target_modules == {"q", "v"} and theirs.modules_to_save == ["head"]
    assert written["target_modules"] == ["q", "v"] and not recwarn.list
    again = LoraConfig.from_peft(written, "here")
    assert again == ours.with_(target_modules=["q", "v"], init_lora_weights=True)


def test_fields_that_a_file_lacks_have_pefts_defaults() -> None:
    config = LoraConfig.from_peft({"peft_type": "LORA", "target_modules": ["q"], "r": 4}, "here")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_qalora": True}, r"here: use_qalora = True is not supported; the adapter was not read"),
        ({"alora_invocation_tokens": [1]}, r"here: alora_invocation_tokens = \[1\] is not supported"),
        ({"lora_magic": 1}, r"here: unknown field 'lora_magic' \(value 1\)"),
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; only LORA"),
        ({"target_modules": None}, r"here: target_modules is missing"),
        ({"r": 0}, r"r is 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig.from_peft({"peft_type": "LORA", "target_modules": ["q"]} | values, "here")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
_FIELDS = sorted(LoraConfig(target_modules=["q"]).to_peft(["q"], False))


@given(st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_json_at_all_is_a_config_or_a_clear_error(values: dict[str, Any]) -> None:
    try:
        config = LoraConfig.from_peft({"target_modules": ["q"]} | values, "here")
    except ConfigError as error:
        assert str(error)
        return
    assert config.rank("a.q") > 0 and config.scale("a.q") > 0
