"""`ensure_weight_tying`: modules that share a weight get one factor, or are trained as one tensor; against PEFT, both
ways, where PEFT can run it, and against the base with the update written into its one weight."""

import json
import warnings

import peft
import pytest
import torch
from torch import nn

import loratune
from families import FAMILIES, inputs_for
from loratune import LoraConfig
from loratune.errors import AdapterError, ConfigError

EMBEDDINGS = {"gemma3_text": "model.embed_tokens", "gpt2": "transformer.wte", "t5": "shared", "bart": "model.shared"}
SETTINGS = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.0, "ensure_weight_tying": True}
NAMES = [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def shaken(model: nn.Module) -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def close(ours, theirs, tolerance=1e-5):
    return float((ours - theirs).abs().max() / theirs.abs().max()) <= tolerance


def logits(model, name):
    with torch.no_grad():
        return model(**inputs_for(name))[0]


def with_weight(name, weight):
    """The plain model with another tensor in its one tied weight."""
    plain = FAMILIES[name]()
    with torch.no_grad():
        plain.get_parameter(f"{EMBEDDINGS[name]}.weight").copy_(weight)
    return plain


def bits(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


TARGETS = [
    ("gemma3_text", ["lm_head"]), ("gemma3_text", ["embed_tokens"]), ("gemma3_text", ["lm_head", "embed_tokens"]),
    ("gemma3_text", r".*lm_head$"), ("gpt2", ["wte"]), ("gpt2", ["lm_head"]), ("t5", ["lm_head"]), ("t5", ["shared"]),
    ("bart", ["embed_tokens"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "targets"), TARGETS)
def test_one_factor_serves_all_that_share_the_weight(name, targets, tmp_path):
    model = FAMILIES[name]()
    base = bits(model)
    attached = loratune.attach(model, LoraConfig(target_modules=targets, **SETTINGS), seed=0)
    trained = dict(attached.adapter.named_parameters())
    assert list(trained) == [f"{EMBEDDINGS[name]}.A", f"{EMBEDDINGS[name]}.B"]
    shaken(model)
    found = logits(model, name)
    factor = attached.adapter.factors[EMBEDDINGS[name]]
    plain = with_weight(name, base[f"{EMBEDDINGS[name]}.weight"] + factor.delta().T)
    assert close(found, logits(plain, name))

    # The gradient is that of one weight used in several places.
    model(**inputs_for(name))[0].square().sum().backward()
    weight = plain.get_parameter(f"{EMBEDDINGS[name]}.weight")
    plain(**inputs_for(name))[0].square().sum().backward()
    assert close(factor.B.grad, weight.grad.T @ factor.A.T * factor.scale)

    # Files: what we write PEFT computes, and the other way round.
    attached.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(FAMILIES[name](), str(tmp_path / "ours"))
    assert close(logits(theirs.eval(), name), found)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = FAMILIES[name]()
    loratune.load_adapter(again, tmp_path / "theirs")
    assert close(logits(again, name), found)

    attached.detach()
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_merging_leaves_one_weight(name, tmp_path):
    model = FAMILIES[name]()
    attached = loratune.attach(model, LoraConfig(target_modules=["lm_head"], **SETTINGS), seed=0)
    shaken(model)
    expected = logits(model, name)
    merged = attached.merge()
    assert close(logits(merged, name), expected)
    assert merged.lm_head.weight is merged.get_parameter(f"{EMBEDDINGS[name]}.weight")
    assert merged.config.tie_word_embeddings is True
    merged.save_pretrained(tmp_path)
    assert close(logits(type(merged).from_pretrained(tmp_path).eval(), name), expected)


@pytest.mark.parametrize("names", NAMES)
def test_modules_trained_whole_are_one_tensor(names, tmp_path):
    name, embedding = "gemma3_text", "model.embed_tokens"
    model = FAMILIES[name]()
    base = bits(model)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=names, **SETTINGS)
    attached = loratune.attach(model, config, seed=0)
    saved = attached.adapter.saved
    assert set(saved) == {embedding, "lm_head"} and saved["lm_head"].weight is saved[embedding].weight
    whole = [key for key, _ in attached.adapter.named_parameters() if not key.endswith((".A", ".B"))]
    assert whole == [f"{embedding}.weight"]
    assert f"tied: lm_head and {embedding} are one trained tensor" in attached.summary()
    shaken(model)
    found = logits(model, name)

    attached.save(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert set(written["modules_to_save"]) == {embedding, "lm_head"}
    theirs = peft.PeftModel.from_pretrained(FAMILIES[name](), str(tmp_path / "ours"), is_trainable=True)
    assert close(logits(theirs.eval(), name), found)
    theirs(**inputs_for(name))[0].square().sum().backward()
    model(**inputs_for(name))[0].square().sum().backward()
    copy = theirs.get_base_model().model.embed_tokens.modules_to_save["default"]
    assert close(saved[embedding].weight.grad, copy.weight.grad)

    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = FAMILIES[name]()
    second = loratune.load_adapter(again, tmp_path / "theirs")
    assert close(logits(again, name), found)
    assert second.adapter.saved["lm_head"].weight is second.adapter.saved[embedding].weight
    other = loratune.attach(again, config, "other", seed=1)
    other.swap(second.adapter)
    assert close(logits(again, name), found)
    attached.detach()
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())
    merged = second.merge() if other.detach() is None else None
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and close(logits(merged, name), found)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_and_decoder_embeddings_trained_whole_are_one_tensor_where_peft_puts_a_linear_layer(name, tmp_path):
    targets = ["q_proj" if name == "bart" else "q"]
    config = LoraConfig(target_modules=targets, modules_to_save=["lm_head"], **SETTINGS)
    model = FAMILIES[name]()
    attached = loratune.attach(model, config, seed=0)
    saved = attached.adapter.saved
    assert len(saved) == 4 and len({module.weight for module in saved.values()}) == 1
    shaken(model)
    plain = FAMILIES[name]()
    with torch.no_grad():
        plain.get_parameter(f"{EMBEDDINGS[name]}.weight").copy_(saved["lm_head"].weight)
        for path, factor in attached.adapter.factors.items():
            plain.get_parameter(f"{path}.weight").add_(factor.delta())
    found = logits(model, name)
    assert close(found, logits(plain, name))
    attached.save(tmp_path / "a")
    again = FAMILIES[name]()
    loratune.load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again, name), found)
    theirs = peft.get_peft_model(
        FAMILIES[name](), peft.LoraConfig(target_modules=targets, modules_to_save=["lm_head"], ensure_weight_tying=True)
    )
    with pytest.raises(RuntimeError):  # PEFT 0.21.2 cannot run its own
        logits(theirs, name)


def test_a_module_that_holds_a_tied_one_is_tied_through(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["model.decoder"], **SETTINGS)
    attached = loratune.attach(FAMILIES["bart"](), config, seed=0)
    saved = attached.adapter.saved
    assert set(saved) == {"model.shared", "model.encoder.embed_tokens", "model.decoder", "lm_head"}
    assert saved["model.decoder"].embed_tokens.weight is saved["lm_head"].weight
    attached.save(tmp_path / "a")
    again = loratune.load_adapter(FAMILIES["bart"](), tmp_path / "a").adapter.saved
    assert again["model.decoder"].embed_tokens.weight is again["lm_head"].weight


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_trained_token_rows_reach_every_embedding_of_an_encoder_and_decoder(name, tmp_path):
    settings = {"r": 2, "lora_dropout": 0.0, "trainable_token_indices": [3, 7, 11]}
    targets = ["q_proj" if name == "bart" else "q"]
    theirs = peft.get_peft_model(FAMILIES[name](), peft.LoraConfig(lora_alpha=4, target_modules=targets, **settings))
    shaken(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = FAMILIES[name]()
    attached = loratune.load_adapter(model, tmp_path / "theirs")
    assert close(logits(model, name), logits(theirs.eval(), name))
    attached.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(FAMILIES[name](), str(tmp_path / "ours"))
    assert close(logits(again.eval(), name), logits(model, name))


def test_a_rank_of_its_own_is_the_leaders_in_peft_too(tmp_path):
    config = LoraConfig(
        target_modules=["embed_tokens"], rank_pattern={"embed_tokens": 4}, alpha_pattern={"embed_tokens": 3}, **SETTINGS
    )
    model = FAMILIES["gemma3_text"]()
    attached = loratune.attach(model, config, seed=0)
    shaken(model)
    attached.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(FAMILIES["gemma3_text"](), str(tmp_path / "a"))
    assert close(logits(theirs.eval(), "gemma3_text"), logits(model, "gemma3_text"))
    again = FAMILIES["gemma3_text"]()
    loratune.load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again, "gemma3_text"), logits(model, "gemma3_text"))


REFUSED = {
    "one number for each output": {"target_modules": ["lm_head"], "use_dora": True},
    "to which it is tied, has 2": {"target_modules": ["lm_head"], "rank_pattern": {"lm_head": 4}},
    "to which it is tied, has 2 and 3": {"target_modules": ["lm_head"], "alpha_pattern": {"lm_head": 4}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_tied_is_refused_with_the_model_untouched(message):
    model = FAMILIES["gemma3_text"]()
    with pytest.raises(ConfigError, match=message):
        loratune.attach(model, LoraConfig(**SETTINGS, **REFUSED[message]))
    assert "_loratune" not in model.__dict__


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_a_file_whose_tied_modules_differ_is_refused(settings, tmp_path):
    """PEFT unties them silently where the base is stored in bfloat16 and each is trained apart."""
    from safetensors.torch import load_file, save_file

    attached = loratune.attach(
        FAMILIES["gemma3_text"](), LoraConfig(**{"target_modules": ["q_proj"], **SETTINGS, **settings})
    )
    shaken(attached.model)
    attached.save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lm_head" in key)
    tensors[key] = tensors[key] + 0.01
    save_file(tensors, file)
    model = FAMILIES["gemma3_text"]()
    with pytest.raises(AdapterError, match="ensure_weight_tying"):
        loratune.load_adapter(model, tmp_path / "a")
    assert "_loratune" not in model.__dict__


def test_nothing_to_tie_is_said_and_the_models_own_word_counts():
    attached = loratune.attach(FAMILIES["gemma3_text"](), LoraConfig(target_modules=["q_proj"], **SETTINGS))
    assert "ensure_weight_tying has nothing to tie" in attached.summary()
    model = FAMILIES["gemma3_text"]()
    model.config.tie_word_embeddings = False  # a head that happens to share the tensor, and is not meant to
    assert list(loratune.attach(model, LoraConfig(target_modules=["lm_head"], **SETTINGS)).adapter.factors) == [
        "lm_head"
    ]
