"""PEFT's files both ways, every form of them; damaged, foreign and wrong files are refused with nothing changed."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from families import FAMILIES, inputs_for
from loratune.adapter import peft_format
from loratune.adapter.attach import Attachments, attach, load_adapter
from loratune.adapter.config import LoraConfig
from loratune.errors import AdapterError, ConfigError
from oracles import logits_of, randomise, relative, same_state, state_of

_Q = "base_model.model.model.layers.0.self_attn.q_proj"
# name -> (family, configuration): every form of PEFT's files that stands for something we do
_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": ["q_proj", "up_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"]}),
    "conv1d and linear": ("gpt2", {"target_modules": ["c_attn", "lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding by its path": ("gpt2", {"target_modules": ["transformer.wte", "c_attn"]}),
    "tied and scaled embedding": ("gemma3_text", {"target_modules": ["embed_tokens", "v_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head"]}),
    "head with a bias": ("phi", {"target_modules": ["lm_head"]}),
    "tied head": ("gemma3_text", {"target_modules": ["lm_head", "q_proj"]}),
    "own biases": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "all biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "all biases of conv1d": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "classifier": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "head saved whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a decoder with a batch norm": ("segformer", {"target_modules": ["q_proj"], "modules_to_save": ["decode_head"]}),
    "biases and a classifier": (
        "bert",
        {"target_modules": ["query", "key"], "bias": "lora_only", "modules_to_save": ["classifier", "pooler"]},
    ),
    "sequence classification": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
    "ranks and alphas": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 7},
        },
    ),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "exclusions": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "a regex": ("llama", {"target_modules": r".*layers\.1\..*(q|up)_proj"}),
    "all-linear": ("bert", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet_peft() -> None:
    warnings.filterwarnings("ignore", module="peft")


@pytest.mark.parametrize("form", _FORMS)
def test_every_form_of_pefts_files_loads_here(form: str, tmp_path: Path) -> None:
    family, values = _FORMS[form]
    inputs = inputs_for(family)
    oracle = peft.get_peft_model(FAMILIES[family](), peft.LoraConfig(r=4, lora_alpha=6, **values)).eval()
    randomise((p for p in oracle.parameters() if p.requires_grad), std=0.1)
    oracle.save_pretrained(str(tmp_path))
    model = FAMILIES[family]()
    attached = load_adapter(model, tmp_path)
    with torch.no_grad():
        expected = logits_of(oracle, inputs)
        assert relative(logits_of(model, inputs), expected) < 1e-5
        with attached.disabled():
            assert torch.equal(logits_of(model, inputs), logits_of(FAMILIES[family](), inputs))
    assert sum(p.numel() for p in oracle.parameters() if p.requires_grad) == attached.adapter.num_parameters()


@pytest.mark.parametrize("form", _FORMS)
def test_every_form_saved_here_loads_in_peft_and_here(form: str, tmp_path: Path) -> None:
    family, values = _FORMS[form]
    model, inputs = FAMILIES[family](), inputs_for(family)
    attached = attach(model, LoraConfig(r=4, lora_alpha=6, **values), seed=1)
    randomise((p for _, p in attached.adapter.named_parameters()), std=0.1)
    attached.save(tmp_path / "saved")
    with torch.no_grad():
        expected = logits_of(model, inputs)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing.*")  # PEFT only warns of keys it does not find
            oracle = peft.PeftModel.from_pretrained(FAMILIES[family](), str(tmp_path / "saved")).eval()
        assert relative(logits_of(oracle, inputs), expected) < 1e-5
        again = FAMILIES[family]()
        loaded = load_adapter(again, tmp_path / "saved")
        assert relative(logits_of(again, inputs), expected) < 1e-6  # a layer whose bias trains is not fused
    before = dict(attached.adapter.named_parameters())
    after = dict(loaded.adapter.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_read_into_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda tensors: {name: value.to(dtype) for name, value in tensors.items()})
    adapter = peft_format.read(tmp_path / "saved")
    assert {p.dtype for _, p in adapter.named_parameters()} == {torch.float32}
    load_adapter(FAMILIES["llama"](), tmp_path / "saved")


def test_keys_without_pefts_prefix_are_read(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda tensors: {name.removeprefix("base_model.model."): v for name, v in tensors.items()})
    assert len(load_adapter(FAMILIES["llama"](), tmp_path / "saved").adapter.factors) == 4


def test_two_saves_are_the_same_and_an_existing_directory_is_kept(tmp_path: Path) -> None:
    attached = attach(FAMILIES["llama"](), LoraConfig(init_lora_weights=False), seed=1)
    attached.save(tmp_path / "one")
    attached.save(tmp_path / "two")
    config, weights = peft_format.CONFIG, peft_format.WEIGHTS
    assert (tmp_path / "one" / config).read_bytes() == (tmp_path / "two" / config).read_bytes()
    one, two = (load_file(str(tmp_path / name / weights)) for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ConfigError, match="one exists already"):
        attached.save(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


# ---- files that must not be read -------------------------------------------------------------------------------------


def saved(folder: Path, **values: Any) -> None:
    config = LoraConfig(r=4, init_lora_weights=False, **values)
    attach(FAMILIES["llama"](), config, seed=1).save(folder / "saved")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "saved" / peft_format.WEIGHTS
    with safe_open(str(path), "pt") as opened:
        metadata = opened.metadata()
    save_file(change(load_file(str(path))), str(path), metadata)


def reconfigure(folder: Path, **values: Any) -> None:
    path = folder / "saved" / peft_format.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: {key: v for key, v in tensors.items() if key not in names})


def with_tensor(name: str, value: Tensor) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: {**tensors, name: value})


def with_factor(path: str) -> Callable[[Path], None]:
    both = {f"{path}.lora_A.weight": torch.ones(4, 32), f"{path}.lora_B.weight": torch.ones(32, 4)}
    return lambda folder: rewrite(folder, lambda tensors: tensors | both)


def with_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: reconfigure(folder, **values)


def only_pickle(folder: Path) -> None:
    path = folder / "saved" / peft_format.WEIGHTS
    torch.save(load_file(str(path)), folder / "saved" / "adapter_model.bin")
    path.unlink()


def truncated(folder: Path) -> None:
    path = folder / "saved" / peft_format.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def huge_header(folder: Path) -> None:
    path = folder / "saved" / peft_format.WEIGHTS
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "saved" / name).write_text(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "saved" / name).unlink()


def bad_fingerprint(folder: Path) -> None:
    path = folder / "saved" / peft_format.WEIGHTS
    save_file(load_file(str(path)), str(path), {"format": "pt", "loratune": '{"base": 3}'})


_NAN = torch.tensor([[float("nan")] * 32] * 4)
_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pickle only": (only_pickle, r"adapter_model\.bin is a pickle, which can run code and is not read"),
    "no weights": (remove(peft_format.WEIGHTS), r"adapter_model\.safetensors is missing"),
    "no configuration": (remove(peft_format.CONFIG), r"is not an adapter: adapter_config\.json is missing"),
    "truncated": (truncated, r"adapter_model\.safetensors is damaged or not a safetensors file"),
    "a header of 2^60 bytes": (huge_header, r"is damaged or not a safetensors file"),
    "not safetensors": (write(peft_format.WEIGHTS, "hello"), r"is damaged or not a safetensors file"),
    "not JSON": (write(peft_format.CONFIG, "{r: 8}"), r"adapter_config\.json is not JSON"),
    "not UTF-8": (
        lambda folder: (folder / "saved" / peft_format.CONFIG).write_bytes(b"\xff\xfe{}") and None,
        r"adapter_config\.json is not JSON",
    ),
    "a list": (write(peft_format.CONFIG, "[]"), r"expected an object, found list"),
    "an oversized configuration": (
        write(peft_format.CONFIG, '{"r": 4' + " " * (5 << 20) + "}"),
        r"has 5,242,888 bytes; an adapter's configuration is far smaller",
    ),
    "a NaN": (with_tensor(_Q + ".lora_A.weight", _NAN), r"q_proj\.lora_A\.weight holds values that are not finite"),
    "an infinity": (
        with_tensor(_Q + ".lora_A.weight", torch.full((4, 32), float("inf"))),
        r"holds values that are not finite",
    ),
    "whole numbers": (
        with_tensor(_Q + ".lora_A.weight", torch.ones(4, 32, dtype=torch.int64)),
        r"has type torch\.int64; expected floating point",
    ),
    "no B": (without(_Q + ".lora_B.weight"), r"model\.layers\.0\.self_attn\.q_proj has lora_A but not its other half"),
    "no factor at one site": (
        without(_Q + ".lora_A.weight", _Q + ".lora_B.weight"),
        r"1 of 4 sites of LlamaForCausalLM have no factor in the adapter; first: model\.layers\.0\.self_attn\.q_proj",
    ),
    "a factor too many": (
        with_factor(_Q.replace("q_proj", "q_prj")),
        r"1 of 5 factors have no site in LlamaForCausalLM; first: .*\.q_prj\. Nearest: .*q_proj",
    ),
    "a tensor too many": (
        with_tensor("base_model.model.model.layers.0.extra", torch.ones(2)),
        r"1 tensors of the adapter have no place in LlamaForCausalLM; first: model\.layers\.0\.extra",
    ),
    "another embedding": (
        with_tensor("base_model.model.lm_head.weight", torch.ones(128, 32)),
        r"the adapter brings its own lm_head\.weight \(128, 32\), which is not the base's",
    ),
    "a resized embedding": (
        with_tensor("base_model.model.lm_head.weight", torch.ones(130, 32)),
        r"own lm_head\.weight \(130, 32\).*the vocabulary was resized",
    ),
    "a wrong rank": (with_config(r=8), r"has A \(4, 32\) and B \(\d+, 4\), but adapter_config\.json gives rank 8"),
    "a wrong shape": (
        with_tensor(_Q + ".lora_A.weight", torch.ones(4, 31)),
        r"q_proj in LlamaForCausalLM: found A \(4, 31\) and B \(32, 4\), expected A \(4, 32\) and B \(32, 4\)",
    ),
    "another target": (with_config(target_modules=["k_proj"]), r"have no site in LlamaForCausalLM"),
    "an unknown target": (with_config(target_modules=["x_proj"]), r"the adapter does not fit.*named 'x_proj'"),
    "a method not done here": (with_config(use_qalora=True), r"use_qalora = True is not supported"),
    "an unknown field": (with_config(lora_magic=1), r"unknown field 'lora_magic' \(value 1\)"),
    "another kind of adapter": (with_config(peft_type="IA3"), r"peft_type is 'IA3'"),
    "a bad value": (with_config(r=0), r"adapter_config\.json: r is 0"),
    "a missing bias": (
        with_config(bias="all"),
        r"does not fit LlamaForCausalLM: bias='all'.*no such bias",
    ),
    "a missing module": (with_config(modules_to_save=["lm_head"]), r"lacks the trained tensor lm_head\.weight"),
    "a damaged fingerprint": (bad_fingerprint, r"the base's fingerprint in its metadata cannot be read"),
}


def assert_untouched(model: PreTrainedModel, before: dict[str, Tensor], modules: list[type]) -> None:
    assert same_state(model, before) and [type(module) for module in model.modules()] == modules
    assert Attachments.of(model) is None and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_damaged_or_foreign_file_is_refused_and_nothing_changed(fault: str, tmp_path: Path) -> None:
    damage, message = _FAULTS[fault]
    saved(tmp_path)
    damage(tmp_path)
    model = FAMILIES["llama"]()
    before, modules = state_of(model), [type(module) for module in model.modules()]
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, tmp_path / "saved")
    assert re.search(message, str(caught.value)), str(caught.value)
    assert_untouched(model, before, modules)


def test_another_base_of_the_same_shape_is_refused_unless_allowed(tmp_path: Path) -> None:
    saved(tmp_path)
    other = FAMILIES["llama"]()
    randomise(other.parameters(), std=0.05)
    before, modules = state_of(other), [type(module) for module in other.modules()]
    with pytest.raises(
        AdapterError, match=r"trained on another base model than this LlamaForCausalLM.*allow_base=True"
    ):
        load_adapter(other, tmp_path / "saved")
    assert_untouched(other, before, modules)
    load_adapter(other, tmp_path / "saved", allow_base=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_precision_is_accepted(dtype: torch.dtype, tmp_path: Path) -> None:
    saved(tmp_path)
    load_adapter(FAMILIES["llama"]().to(dtype), tmp_path / "saved")


def test_another_family_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(AdapterError, match="the adapter does not fit GPT2LMHeadModel"):
        load_adapter(FAMILIES["gpt2"](), tmp_path / "saved")


def test_an_adapter_that_was_refused_fits_its_own_model_afterwards(tmp_path: Path) -> None:
    """Nothing is taken from the value by a failed attempt."""
    attached = attach(FAMILIES["qwen2"](), LoraConfig(target_modules=["q_proj"], bias="all"), seed=1)
    attached.save(tmp_path / "saved")
    adapter = peft_format.read(tmp_path / "saved")
    loose = set(adapter.loose)
    with pytest.raises(AdapterError):
        attach(FAMILIES["llama"](), adapter)
    assert set(adapter.loose) == loose and not adapter.biases
    attach(FAMILIES["qwen2"](), adapter)


@given(st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_or_missing_byte_is_an_error_or_a_finite_adapter(tmp_path: Path, position: int, mask: int) -> None:
    """The bytes of numbers carry no check in this format; everything else does."""
    if not (tmp_path / "saved").exists():
        saved(tmp_path)
    path = tmp_path / "saved" / peft_format.WEIGHTS
    content = bytearray(path.read_bytes())
    for damaged in (content[: position % len(content)], content):
        content[position % len(content)] ^= mask
        path.write_bytes(damaged)
        try:
            adapter = peft_format.read(tmp_path / "saved")
        except AdapterError:
            continue
        finally:
            content[position % len(content)] ^= mask
            path.write_bytes(content)
        assert all(bool(tensor.isfinite().all()) for tensor in adapter.flat().values())


def test_the_order_in_which_safetensors_wrote_a_header_does_not_show(tmp_path: Path) -> None:
    save_file({"b": torch.ones(2), "a": torch.zeros(3)}, tmp_path / "f", metadata={"z": "1", "y": "2"})
    data = (tmp_path / "f").read_bytes()
    length = int.from_bytes(data[:8], "little")
    turned = json.dumps(dict(reversed(json.loads(data[8 : 8 + length]).items()))).encode()
    other = len(turned).to_bytes(8, "little") + turned + data[8 + length :]
    assert peft_format._sorted_header(data) == peft_format._sorted_header(other)


def test_the_configuration_says_what_peft_does_by_itself(tmp_path: Path) -> None:
    attach(FAMILIES["llama"](), LoraConfig(r=2, target_modules=["q_proj"])).save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["inference_mode"] is True
    for off in (None, False):
        assert LoraConfig.from_peft({**config, "use_bdlora": off}, "a").r == 2
