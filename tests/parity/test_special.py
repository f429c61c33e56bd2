"""Layers that keep their weights to themselves, tied weights, and beginnings other than B = 0; against PEFT where it is
right, against brute force where it is not."""

import warnings

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call

import loratune
from families import FAMILIES, inputs_for
from loratune import LoraConfig
from loratune.errors import AdapterError, ConfigError


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def shaken(model: nn.Module, size: float = 0.1) -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)


def close(ours, theirs, tolerance=1e-5):
    return float((ours - theirs).abs().max() / theirs.abs().max()) <= tolerance


def logits(model, name):
    with torch.no_grad():
        return model(**inputs_for(name))[0]


EXPERTS = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": ["q_proj"]}
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("parameters", [STACKS, STACKS[:1], STACKS[1:]])
def test_stacked_experts_read_and_written_as_peft_does(name, parameters, tmp_path):
    theirs = peft.get_peft_model(FAMILIES[name](), peft.LoraConfig(target_parameters=parameters, **EXPERTS))
    shaken(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    expected = logits(theirs.eval(), name)
    model = FAMILIES[name]()
    attached = loratune.load_adapter(model, tmp_path / "theirs")
    assert close(logits(model, name), expected)
    attached.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(FAMILIES[name](), str(tmp_path / "ours"))
    assert close(logits(again.eval(), name), expected)
    assert close(logits(attached.merge(), name), expected)


def test_experts_get_gradients_and_start_at_the_base():
    model = FAMILIES["mixtral"]()
    before = logits(model, "mixtral")
    attached = loratune.attach(model, LoraConfig(target_parameters=STACKS, **EXPERTS), seed=0)
    assert close(logits(model, "mixtral"), before, 1e-6)
    model(**inputs_for("mixtral"))[0].square().sum().backward()
    assert all(f.B.grad.abs().sum() > 0 for path, f in attached.adapter.factors.items() if "experts" in path)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lin = nn.Linear(8, 3)

    def forward(self, x):
        return self.lin(self.attn(x, x, x, need_weights=False)[0])


def test_multihead_attention_equals_brute_force_where_peft_adds_out_proj_twice(tmp_path):
    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    attached = loratune.attach(model, LoraConfig(r=2, target_modules=["attn"], lora_dropout=0.0), seed=0)
    shaken(model)
    factors = attached.adapter.factors
    assert sorted(factors) == ["attn.in_proj_weight", "attn.out_proj.weight"]
    torch.manual_seed(0)
    plain = Attention().double()
    weights = {name: plain.get_parameter(name) + factor.delta() for name, factor in factors.items()}
    expected = functional_call(plain, weights, (x,))
    assert close(model(x), expected, 1e-12)
    model(x).sum().backward()
    assert all(p.grad is not None for p in attached.adapter.factors["attn.in_proj_weight"].parameters())
    attached.save(tmp_path / "a")
    torch.manual_seed(0)
    again = Attention().double()
    loratune.load_adapter(again, tmp_path / "a")
    assert close(again(x), expected, 1e-6)
    assert close(attached.merge()(x), expected, 1e-12)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_the_biases_trained_with_multihead_attention_are_peft_s(bias, tmp_path):
    """The parameters called `bias`: out_proj's, not in_proj_bias."""
    config = {"r": 2, "target_modules": ["attn"], "bias": bias, "lora_dropout": 0.0}
    theirs = peft.get_peft_model(Attention(), peft.LoraConfig(**config))
    shaken(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = Attention()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    attached = loratune.load_adapter(model, tmp_path / "theirs")
    assert set(attached.adapter.biases) == {"attn.out_proj.bias"} | ({"lin.bias"} if bias == "all" else set())
    attached.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Attention(), str(tmp_path / "ours"))
    keys = [key for key, _ in theirs.named_parameters() if "lora_" in key or key.endswith(".bias")]
    assert all(torch.equal(again.get_parameter(key), theirs.get_parameter(key)) for key in keys if "lin" not in key)
    trained = attached.adapter.biases["attn.out_proj.bias"]
    assert torch.equal(trained, theirs.base_model.model.attn.out_proj.bias) and trained.abs().sum() > 0
    attached.detach()
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


CONVOLUTIONS = {
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "reflect-strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "1d-grouped-dilated": lambda: nn.Conv1d(4, 6, 3, groups=2, dilation=2),
    "3d": lambda: nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)),
}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_a_convolution_merges_to_what_it_was_attached(name, use_dora, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(CONVOLUTIONS[name]()).double()
    plain = nn.Sequential(CONVOLUTIONS[name]()).double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 4, *{1: (9,), 2: (9, 9), 3: (3, 9, 9)}[model[0].weight.ndim - 2], dtype=torch.float64)
    config = LoraConfig(r=4, target_modules=["0"], lora_dropout=0.0, use_dora=use_dora)
    attached = loratune.attach(model, config, seed=0)
    assert close(model(x), plain(x), 1e-12)
    shaken(model)
    expected = model(x)
    attached.save(tmp_path / "a")
    loratune.load_adapter(plain, tmp_path / "a")
    assert close(plain(x), expected, 1e-6)
    assert close(attached.merge()(x), expected, 1e-12)


def test_a_grouped_convolution_is_written_so_that_peft_computes_the_same(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    x, state = torch.randn(2, 4, 9, 9), {k: v.clone() for k, v in model.state_dict().items()}
    attached = loratune.attach(model, LoraConfig(r=4, target_modules=["0"], lora_dropout=0.0), seed=0)
    shaken(model)
    attached.save(tmp_path / "a")
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    plain.load_state_dict(state)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "a"))
    assert close(model(x), theirs(x))


def test_a_peft_factor_that_mixes_groups_is_refused_because_it_cannot_be_merged(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    theirs.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(AdapterError, match="mixes the inputs of 2 groups"):
        loratune.load_adapter(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), tmp_path / "a")


@pytest.mark.parametrize("indices", [[3, 7], {"embed_tokens": [1, 5, 9]}])
def test_trained_token_rows_reach_the_tied_head_too(indices, tmp_path):
    settings = {"r": 2, "lora_dropout": 0.0, "target_modules": ["q_proj"], "trainable_token_indices": indices}
    theirs = peft.get_peft_model(FAMILIES["gemma3_text"](), peft.LoraConfig(lora_alpha=4, **settings))
    shaken(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    expected = logits(theirs.eval(), "gemma3_text")
    model = FAMILIES["gemma3_text"]()
    base = logits(model, "gemma3_text")
    attached = loratune.load_adapter(model, tmp_path / "theirs")
    assert close(logits(model, "gemma3_text"), expected)
    attached.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(FAMILIES["gemma3_text"](), str(tmp_path / "ours"))
    assert close(logits(again.eval(), "gemma3_text"), expected)
    attached.detach()
    assert torch.equal(logits(model, "gemma3_text"), base)


def test_ensured_tying_gives_head_and_embedding_one_factor():
    model = FAMILIES["gemma3_text"]()
    config = LoraConfig(r=2, target_modules=["embed_tokens"], lora_dropout=0.0, ensure_weight_tying=True)
    attached = loratune.attach(model, config, seed=0)
    shaken(model)
    expected = logits(model, "gemma3_text")
    update = attached.adapter.factors["model.embed_tokens"].delta().T.clone()
    plain = FAMILIES["gemma3_text"]()
    with torch.no_grad():
        plain.model.embed_tokens.weight.add_(update)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert close(logits(plain, "gemma3_text"), expected)
    assert close(logits(attached.merge(), "gemma3_text"), expected)


BEGINNINGS = ["pissa", "pissa_niter_4", "olora", "orthogonal"]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_beginning_other_than_zero_leaves_the_base_and_is_saved_as_plain_lora(name, use_rslora, tmp_path):
    model = FAMILIES["llama"]()
    before = logits(model, "llama")
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=name, use_rslora=use_rslora,
        rank_pattern={"v_proj": 2},
    )  # fmt: skip
    attached = loratune.attach(model, config, seed=0)
    assert close(logits(model, "llama"), before)
    assert all(factor.A.abs().sum() > 0 and factor.B.abs().sum() > 0 for factor in attached.adapter.factors.values())
    shaken(model)
    expected = logits(model, "llama")
    assert not close(expected, before)
    attached.save(tmp_path / "a")
    for again in (
        peft.PeftModel.from_pretrained(FAMILIES["llama"](), str(tmp_path / "a")),
        loratune.load_adapter(FAMILIES["llama"](), tmp_path / "a").model,
    ):
        assert close(logits(again.eval(), "llama"), expected)
    assert close(logits(attached.merge(), "llama"), expected)


def test_pissa_begins_with_the_leading_singular_directions_as_peft_does():
    theirs = peft.get_peft_model(
        FAMILIES["llama"](), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    model = FAMILIES["llama"]()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa", lora_dropout=0.0)
    attached = loratune.attach(model, config, seed=0)
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    factor = attached.adapter.factors["model.layers.0.self_attn.q_proj"]
    assert close(factor.B @ factor.A, expected)


def test_beginnings_say_what_they_need():
    with pytest.raises(ConfigError, match="even rank"):
        loratune.attach(FAMILIES["llama"](), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="orthogonal"))
    with pytest.raises(ConfigError, match="smaller side"):
        loratune.attach(FAMILIES["llama"](), LoraConfig(r=999, target_modules=["q_proj"], init_lora_weights="pissa"))
