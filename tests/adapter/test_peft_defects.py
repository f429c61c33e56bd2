"""Each defect of PEFT 0.21.2 that was reproduced, and what happens here instead."""

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import loratune
from families import FAMILIES, inputs_for
from loratune import LoraConfig
from loratune.adapter.config import LoraConfig as Config
from loratune.adapter.merge import merged_weight
from loratune.errors import AdapterError, ConfigError

QV = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "r": 4}


def model():
    return FAMILIES["llama"]()


def logits(of):
    with torch.no_grad():
        return of(**inputs_for("llama"))[0]


def attached(name="default", seed=0, on=None, **settings):
    settings = {**QV, "init_lora_weights": False, **settings}
    return loratune.attach(on if on is not None else model(), LoraConfig(**settings), name, seed=seed)


def close(a, b, tolerance=1e-5):
    return float((a - b).abs().max() / b.abs().max()) <= tolerance


@pytest.mark.parametrize("how", ["linear", "svd", "cat"])
def test_a_weighted_sum_under_rslora_has_the_scale_of_its_parts(how):
    handle = attached(use_rslora=True)
    expected = logits(handle.model)
    combined = loratune.combine([handle.adapter], [1.0], how, **({"rank": 4} if how == "svd" else {}))
    again = model()
    loratune.attach(again, combined)
    assert close(logits(again), expected)


def test_a_weighted_sum_of_pissa_adapters_leaves_the_base_alone():
    base = model()
    before = copy.deepcopy(base.state_dict())
    handle = attached(on=base, init_lora_weights="pissa")
    loratune.combine([handle.adapter, handle.adapter], [0.5, 0.5], "cat")
    handle.detach()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_an_adapter_whose_name_is_part_of_others_freezes_nothing():
    base = model()
    first, second = attached("adapter", on=base), attached("a", on=base)
    assert all(p.requires_grad for each in (first, second) for _, p in each.adapter.named_parameters())


def test_an_adapter_called_0_takes_no_layer_from_another_when_saved(tmp_path):
    base = model()
    default, zero = attached("default", on=base), attached("0", seed=1, on=base)
    default.save(tmp_path / "default")
    zero.save(tmp_path / "zero")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("default", "zero"))
    assert first.keys() == second.keys() and len(first) == 2 * len(default.adapter.factors)


def test_tying_survives_half_precision():
    base = FAMILIES["gemma3_text"]().bfloat16()
    config = LoraConfig(r=2, target_modules=["embed_tokens"], lora_dropout=0.0, ensure_weight_tying=True)
    handle = loratune.attach(base, config, seed=0)
    optimizer = torch.optim.AdamW([p for _, p in handle.adapter.named_parameters()], lr=0.1)
    for _ in range(3):
        base(**inputs_for("gemma3_text"))[0].float().square().mean().backward()
        optimizer.step()
    factors = handle.adapter.factors
    assert torch.equal(factors["lm_head"].delta(), factors["model.embed_tokens"].delta().T)
    assert factors["model.embed_tokens"].A.dtype == torch.float32


def test_merging_rounds_once():
    """PEFT's safe merge rounds B A to bfloat16 before it adds: with a large update only 71% are rounded correctly."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    factor = loratune.attach(
        layer, LoraConfig(r=8, target_modules=["0"], init_lora_weights=False), seed=0
    ).adapter.factors["0"]
    host = layer[0].host
    weight = layer[0].base.weight
    exact = (weight.double() + factor.delta().double()).to(torch.bfloat16)
    merged, _ = merged_weight(weight, factor, host)
    assert (merged == exact).float().mean() > 0.999  # float32's own rounding may tip a tie


def test_switching_off_and_on_changes_no_weight():
    base = model().bfloat16()
    before = copy.deepcopy(base.state_dict())
    handle = attached(on=base)
    for _ in range(3):
        with handle.disabled():
            pass
    handle.detach()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lora_dropout": -0.1}, "lora_dropout"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"r": 0}, "r is 0"),
        ({"target_modules": ["q_proj", "v_porj"]}, "v_porj"),
        ({"modules_to_save": ["nrom"]}, "nrom"),
        ({"layers_to_transform": [7]}, "index 7"),
        ({"rank_pattern": {"_proj": 2}}, "_proj"),
    ],
)
def test_what_peft_accepts_in_silence_is_an_error(settings, match):
    with pytest.raises(ConfigError, match=match):
        attached(**settings)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_qalora", True),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("corda_config", {"corda_method": "ipm"}),
        ("layer_replication", [[0, 2]]),
        ("made_up", 1),
    ],
)
def test_a_method_that_is_not_implemented_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=field):
        Config.from_peft({"peft_type": "LORA", "target_modules": ["q_proj"], field: value}, "file")


def test_a_saved_module_is_found_by_its_name_not_by_its_ending():
    """PEFT's ["norm"] also takes every ...layernorm."""
    handle = attached(modules_to_save=["norm"])
    assert list(handle.adapter.saved) == ["model.norm"]


def test_the_order_of_targets_in_a_file_is_the_same_in_every_process(tmp_path):
    handle = attached(target_modules=["v_proj", "q_proj", "o_proj"])
    handle.save(tmp_path / "a")
    written = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert written["target_modules"] == ["o_proj", "q_proj", "v_proj"]


def test_the_last_adapter_leaves_a_model_that_works():
    handle = attached()
    handle.detach()
    assert torch.equal(logits(handle.model), logits(model()))


def test_resized_embeddings_are_not_dropped_in_silence(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grown = model()
        grown.resize_token_embeddings(grown.config.vocab_size + 3)
        theirs = peft.get_peft_model(grown, peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
        theirs.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(AdapterError, match="embed_tokens"):
        loratune.load_adapter(model(), tmp_path / "a")


def test_renaming_and_swapping():
    base = model()
    first, second = attached("one", on=base), attached("two", seed=1, on=base)
    second.activate()
    expected = logits(base)
    first.activate()
    tensors = [id(p) for _, p in first.adapter.named_parameters()]
    first.swap(second.adapter)
    assert torch.equal(logits(base), expected)
    assert tensors == [id(p) for _, p in first.adapter.named_parameters()]
    first.rename("three")
    assert torch.equal(logits(base), expected)
    with first.rows(["three", "two"]):
        assert close(logits(base), expected)
        with first.disabled():
            assert torch.equal(logits(base), logits(model()))
    with pytest.raises(AdapterError, match="attached already"):
        first.rename("two")
    with pytest.raises(AdapterError, match="found A"):
        first.swap(attached(r=2).adapter)


def test_a_swap_compiles_nothing_again():
    counter = CompileCounter()
    layer = nn.Sequential(nn.Linear(8, 8))
    config = LoraConfig(r=2, target_modules=["0"], lora_dropout=0.0, init_lora_weights=False)
    handle = loratune.attach(layer, config, seed=0)
    other = copy.deepcopy(handle.adapter)
    for _, parameter in other.named_parameters():
        parameter.data.mul_(2)
    torch._dynamo.reset()
    compiled, x = torch.compile(layer, backend=counter), torch.randn(3, 8)
    with torch.no_grad():
        before = compiled(x)
        frames = counter.frame_count
        handle.swap(other)
        after = compiled(x)
        assert not torch.allclose(before, after) and torch.allclose(after, layer(x))
    assert counter.frame_count == frames


# ---- twenty mutants of a good adapter -------------------------------------------------------------------------------


def _tensors(change):
    def mutate(folder):
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return mutate


def _config(**changes):
    def mutate(folder):
        file = folder / "adapter_config.json"
        values = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))

    return mutate


def _bytes(change):
    def mutate(folder):
        file = folder / "adapter_model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return mutate


def _first(tensors, end):
    return next(name for name in tensors if name.endswith(end))


def _rename(tensors, old, new):
    for name in list(tensors):
        if old in name:
            tensors[name.replace(old, new)] = tensors.pop(name)


MUTANTS = {
    "empty": _tensors(lambda t: t.clear()),
    "half missing": _tensors(lambda t: t.pop(_first(t, "lora_B.weight"))),
    "site missing": _tensors(lambda t: [t.pop(n) for n in list(t) if "layers.0.self_attn.q_proj" in n]),
    "all sites of a role missing": _tensors(lambda t: [t.pop(n) for n in list(t) if "v_proj" in n]),
    "extra layer": _tensors(
        lambda t: t.update({n.replace("layers.0", "layers.9"): v.clone() for n, v in list(t.items())})
    ),
    "stray tensor": _tensors(lambda t: t.update(stray=torch.ones(2))),
    "wrong prefix": _tensors(lambda t: _rename(t, "base_model.model.model", "base_model.model.transformer")),
    "renamed layer": _tensors(lambda t: _rename(t, "self_attn", "attention")),
    "not a number": _tensors(lambda t: t[_first(t, "lora_A.weight")].view(-1)[:1].fill_(float("nan"))),
    "infinite": _tensors(lambda t: t[_first(t, "lora_B.weight")].view(-1)[:1].fill_(float("inf"))),
    "transposed": _tensors(lambda t: t.update({_first(t, "A.weight"): t[_first(t, "A.weight")].T.contiguous()})),
    "narrow": _tensors(lambda t: t.update({_first(t, "A.weight"): t[_first(t, "A.weight")][:, :5].contiguous()})),
    "whole numbers": _tensors(lambda t: t.update({n: v.int() for n, v in t.items()})),
    "another rank": _config(r=3),
    "rank zero": _config(r=0),
    "alpha zero": _config(lora_alpha=0),
    "another method": _config(peft_type="IA3"),
    "no targets": _config(target_modules=...),
    "other targets": _config(target_modules=["k_proj"]),
    "cut": _bytes(lambda b: b[:-7]),
    "absurd header": _bytes(lambda b: (1 << 60).to_bytes(8, "little") + b[8:]),
    "pickle": lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
}


@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_a_mutant_is_refused_and_the_model_is_as_before(mutant, tmp_path):
    attached().save(tmp_path / "a")
    MUTANTS[mutant](tmp_path / "a")
    base = model()
    names, before = [name for name, _ in base.named_modules()], copy.deepcopy(base.state_dict())
    with pytest.raises(AdapterError):
        loratune.load_adapter(base, tmp_path / "a")
    assert [name for name, _ in base.named_modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert "_loratune" not in base.__dict__
