"""Attaching: whatever the order of events, the base is never written, and the model is what its active adapters say."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn
from torch.func import functional_call

from families import FAMILIES, inputs_for
from loratune.adapter.attach import Attached, attach, attached_to, load_adapter
from loratune.adapter.config import LoraConfig
from loratune.adapter.wrapper import Wrapper
from loratune.errors import AdapterError
from oracles import IDS, Toy, logits_of, objective, randomise, relative, same_state, state_of

_CONFIGS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "everything": {"target_modules": ["q_proj", "v_proj", "c_fc", "embed", "head"], "r": 3},
    "layer 0": {"target_modules": ["layers.0.c_fc", "layers.0.q_proj"], "use_rslora": True},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "own biases": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["head"]},
}
_PLAIN = ("attention", "everything", "layer 0")


def expected_logits(tied: bool, adapters: list[Attached]) -> Tensor:
    """W + sum of s B A, trained biases and trained modules put into an untouched model."""
    plain = Toy(tied=tied)
    weights: dict[str, Tensor] = {}
    for handle in adapters:
        for path, factor in handle.adapter.factors.items():
            delta = factor.scale * factor.B.detach() @ factor.A.detach()
            module = plain.get_submodule(path)
            before = weights.get(f"{path}.weight", module.weight.detach())
            weights[f"{path}.weight"] = before + (delta if isinstance(module, nn.Linear) else delta.T)
        weights.update({path: bias.detach() for path, bias in handle.adapter.biases.items()})
        for path, module in handle.adapter.saved.items():
            weights.update({f"{path}.{name}": value.detach() for name, value in module.named_parameters()})
    return functional_call(plain, weights, (IDS,), tie_weights=False)


class Attaching(RuleBasedStateMachine):
    """Adapters come, train, are switched, merged and go, in any order."""

    tied = False

    def __init__(self) -> None:
        super().__init__()
        self.model = Toy(tied=self.tied)
        for parameter in self.model.layers[0].parameters():
            parameter.requires_grad_(False)  # part of the base was frozen before
        self.before = state_of(self.model)
        self.flags = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        self.originals = dict(self.model.named_parameters())
        self.base = self.model(IDS).detach()
        self.handles: dict[str, Attached] = {}
        self.kinds: dict[str, str] = {}
        self.active: list[str] = []

    @rule(name=st.sampled_from("abcd"), kind=st.sampled_from(sorted(_CONFIGS)), seed=st.integers(0, 9))
    def attach(self, name: str, kind: str, seed: int) -> None:
        if name in self.handles:
            with pytest.raises(AdapterError, match="attached already"):
                attach(self.model, LoraConfig(**_CONFIGS[kind]), name)
            return
        self.handles[name] = attach(self.model, LoraConfig(**_CONFIGS[kind]), name, seed=seed)
        self.kinds[name], self.active = kind, [name]
        if kind != "everything":  # whose embedding begins at A = 0 too
            assert relative(self.model(IDS), self.base) < 1e-12
        randomise((p for _, p in self.handles[name].adapter.named_parameters()), seed, std=0.2)

    @precondition(lambda self: self.active)
    @rule()
    def train(self) -> None:
        objective(self.model(IDS)).backward()
        for name in self.active:
            for _, parameter in self.handles[name].adapter.named_parameters():
                if parameter.grad is not None:
                    with torch.no_grad():
                        parameter -= 0.01 * parameter.grad.clamp(-1, 1)
                    parameter.grad = None
        assert all(parameter.grad is None for parameter in self.originals.values())

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.handles)), min_size=1, max_size=3, unique=True))
        first, *others = (self.handles[name] for name in names)
        if sum(self.kinds[name] not in _PLAIN for name in names) > 1:
            with pytest.raises(AdapterError, match="only one active adapter can train biases"):
                first.activate(*others)
            return
        clash = any(self.kinds[name] == "saved head" for name in names) and "everything" in map(self.kinds.get, names)
        if clash:
            with pytest.raises(AdapterError, match="head is trained whole by one adapter and head adapted by"):
                first.activate(*others)
            return
        first.activate(*others)
        self.active = names

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.handles)))
        handle = self.handles.pop(name)
        handle.detach()
        self.active = [each for each in self.active if each != name]
        with pytest.raises(AdapterError, match="is not attached to this Toy any more"):
            handle.summary()

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def attach_again(self, data: st.DataObject) -> None:
        """The value that was taken off goes on again, here or on another model, with what it learned."""
        name = data.draw(st.sampled_from(sorted(self.handles)))
        adapter = self.handles[name].adapter
        self.handles[name].detach()
        self.handles[name] = attach(self.model, adapter, name)
        self.active = [name]

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def rows(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from([None, *sorted(self.handles)]), min_size=3, max_size=3))
        handle = next(iter(self.handles.values()))
        before = list(self.active)
        if any(name is not None and self.kinds[name] not in _PLAIN for name in names):
            with pytest.raises(AdapterError, match="trains biases or whole modules"), handle.rows(names):
                pass
            return
        if any(self.kinds[name] not in _PLAIN for name in before):
            return
        with handle.rows(names):
            found = self.model(IDS)
        for row, name in enumerate(names):
            alone = expected_logits(self.tied, [] if name is None else [self.handles[name]])
            assert relative(found[row], alone[row]) < 1e-10

    @precondition(lambda self: len(self.handles) == 1)
    @rule()
    def merge(self) -> None:
        """Ends this model; goes on with a fresh one."""
        _, handle = self.handles.popitem()
        expected = expected_logits(self.tied, [handle])
        merged = handle.merge()
        assert relative(merged(IDS), expected) < 1e-12
        assert [type(module) for module in merged.modules()] == [type(module) for module in Toy().modules()]
        assert all(torch.equal(self.originals[each], self.before[each]) for each in self.originals)
        self.__init__()  # type: ignore[misc]

    @precondition(lambda self: len(self.handles) > 1)
    @rule()
    def merge_one_of_several(self) -> None:
        name = next(iter(self.handles))
        with pytest.raises(AdapterError, match=f"merging '{name}' would drop the other attached adapters"):
            self.handles[name].merge()

    @invariant()
    def the_base_is_never_written(self) -> None:
        assert all(torch.equal(self.originals[each], self.before[each]) for each in self.originals)

    @invariant()
    def the_model_is_what_its_active_adapters_say(self) -> None:
        expected = expected_logits(self.tied, [self.handles[name] for name in self.active])
        assert relative(self.model(IDS), expected) < 1e-10
        for handle in list(self.handles.values())[:1]:
            with handle.disabled():
                assert torch.equal(self.model(IDS), self.base)
            assert relative(self.model(IDS), expected) < 1e-10

    @invariant()
    def without_adapters_it_is_the_plain_model(self) -> None:
        if self.handles:
            assert not any(parameter.requires_grad for parameter in self.originals.values())
            return
        assert same_state(self.model, self.before) and torch.equal(self.model(IDS), self.base)
        assert dict(self.model.named_parameters()) == self.originals
        assert {name: p.requires_grad for name, p in self.model.named_parameters()} == self.flags
        assert [type(module) for module in self.model.modules()] == [type(module) for module in Toy().modules()]


class AttachingToTied(Attaching):
    tied = True


# No shrinking: a failing history is short already, and shrinking one takes minutes.
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
TestAttaching = Attaching.TestCase
TestAttaching.settings = settings(max_examples=12, stateful_step_count=20, deadline=None, phases=_PHASES)
TestAttachingToTied = AttachingToTied.TestCase
TestAttachingToTied.settings = settings(max_examples=8, stateful_step_count=20, deadline=None, phases=_PHASES)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bert", "t5", "segformer"])
def test_step_zero_is_the_base_model_bit_for_bit(family: str) -> None:
    model, inputs = FAMILIES[family](), inputs_for(family)
    with torch.no_grad():
        expected = logits_of(model, inputs)
        attach(model, LoraConfig.preset("deep"))
        assert torch.equal(logits_of(model, inputs), expected)


def test_a_tied_head_and_its_embedding_are_two_uses() -> None:
    model, inputs = FAMILIES["gemma3_text"](), inputs_for("gemma3_text")
    ids = inputs["input_ids"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        embedded, hidden = model.model.embed_tokens(ids), model.model(**inputs).last_hidden_state
        attached = attach(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False), seed=1)
        assert torch.equal(model.model.embed_tokens(ids), embedded)
        factor = attached.adapter.factors["lm_head"]
        expected = hidden @ (model.model.embed_tokens.weight + factor.delta()).T
        assert relative(logits_of(model, inputs), expected) < 1e-5
    assert "note: lm_head shares its weight with model.embed_tokens; the adapter changes lm_head alone" in (
        attached.summary()
    )
    attached.detach()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_scaled_embedding_scales_its_update_too() -> None:
    """Gemma multiplies what it looks up by sqrt(hidden); the update is of the weight, so it is multiplied as well."""
    model, inputs = FAMILIES["gemma3_text"](), inputs_for("gemma3_text")
    ids, config = inputs["input_ids"], LoraConfig(target_modules=["embed_tokens"])
    attached = attach(model, config, seed=1)
    path, factor = next(iter(attached.adapter.factors.items()))
    randomise([factor.A])
    with torch.no_grad():
        expected = (model.get_submodule(path).weight + factor.delta().T)[ids] * 32**0.5
        assert relative(model.model.embed_tokens(ids), expected) < 1e-5


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("lora_only", {f"layers.{i}.q_proj.bias" for i in (0, 1)}),
        ("all", {f"layers.{i}.{name}.bias" for i in (0, 1) for name in ("q_proj", "c_fc")}),
    ],
)
def test_which_biases_train(bias: str, expected: set[str]) -> None:
    model = Toy()
    attached = attach(model, LoraConfig(target_modules=["q_proj", "v_proj"], bias=bias))
    assert set(attached.adapter.biases) == expected
    objective(model(IDS)).backward()
    assert all(parameter.grad is not None for parameter in attached.adapter.biases.values())


def test_a_saved_module_trains_in_full_and_the_base_keeps_its_own() -> None:
    model = Toy()
    attached = attach(model, LoraConfig(target_modules=["q_proj", "head"], modules_to_save=["head"]))
    assert list(attached.adapter.saved) == ["head"] and "head" not in attached.adapter.factors
    assert "trained whole: head" in attached.summary()
    randomise(attached.adapter.saved["head"].parameters())
    assert relative(model(IDS), Toy()(IDS)) > 1e-2
    with attached.disabled():
        assert torch.equal(model(IDS), Toy()(IDS))


def test_a_saved_module_is_a_copy_without_the_wrappers_of_other_adapters() -> None:
    model = FAMILIES["bert"]()
    first = attach(model, LoraConfig(target_modules=["query"]), "first")
    second = attach(
        model, LoraConfig(target_modules=["intermediate.dense"], modules_to_save=["attention.self"]), "second"
    )
    assert second.adapter.saved
    assert not any(isinstance(each, Wrapper) for saved in second.adapter.saved.values() for each in saved.modules())
    first.detach(), second.detach()


def test_the_seed_alone_fixes_how_an_adapter_begins() -> None:
    begun: list[dict[str, Tensor]] = []
    for number in range(2):
        model = FAMILIES["llama"]()
        torch.manual_seed(number)
        attached = attach(model, LoraConfig(target_modules=["q_proj", "embed_tokens"]), seed=3)
        begun.append({name: each.detach().clone() for name, each in attached.adapter.named_parameters()})
    assert all(torch.equal(value, begun[1][name]) for name, value in begun[0].items())


def test_only_the_adapter_enters_training_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).eval()
    attached = attach(model, LoraConfig(target_modules=["0"], lora_dropout=0.9))
    attached.train_mode()
    assert model[0].training and not model[1].training and not model[2].training and not model.training
    attached.train_mode(False)
    assert not any(module.training for module in model)


def test_rows_wants_one_known_name_per_row() -> None:
    model = Toy()
    attached = attach(model, LoraConfig(target_modules=["q_proj"]), "one")
    with pytest.raises(AdapterError, match=r"no adapter 'two' is attached; attached are one"), attached.rows(["two"]):
        pass
    with attached.rows(["one", None]), pytest.raises(AdapterError, match=r"2 names were given, but a Linear got.*3, 4"):
        model(IDS)
    assert model(IDS).shape == (3, 4, 11)


def test_rows_train_their_own_adapters() -> None:
    model = Toy()
    handles = [attach(model, LoraConfig(target_modules="all-linear"), name, seed=i) for i, name in enumerate("ab")]
    for handle in handles:
        randomise(p for _, p in handle.adapter.named_parameters())
    with handles[0].rows(["b", None, "b"]):
        model(IDS).square().sum().backward()
    assert all(parameter.grad is None for _, parameter in handles[0].adapter.named_parameters())
    rows = {name: p.grad.clone() for name, p in handles[1].adapter.named_parameters() if p.grad is not None}
    for _, parameter in handles[1].adapter.named_parameters():
        parameter.grad = None
    handles[1].activate()
    model(IDS[[0, 2]]).square().sum().backward()
    for name, parameter in handles[1].adapter.named_parameters():
        assert parameter.grad is not None and relative(rows[name], parameter.grad) < 1e-12


def test_no_adapter_or_two_is_an_error_where_one_is_needed() -> None:
    model = Toy()
    with pytest.raises(AdapterError, match=r"Toy has no active adapters; expected one\. Attach one first"):
        attached_to(model)
    one = attach(model, LoraConfig(target_modules=["q_proj"]), "one")
    assert attached_to(model).name == "one"
    attach(model, LoraConfig(target_modules=["q_proj"]), "two").activate(one)
    with pytest.raises(AdapterError, match="2 active adapters"):
        attached_to(model)


def test_an_error_inside_a_block_leaves_the_state_before_it() -> None:
    model = Toy()
    attached = attach(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False), seed=1)
    expected = model(IDS)
    for block in (attached.disabled(), attached.rows([None, None, None])):
        with pytest.raises(KeyError), block:
            raise KeyError
        assert torch.equal(model(IDS), expected)


def test_a_layer_whose_base_also_trains_takes_the_plain_path() -> None:
    """Somebody unfroze a base weight by hand: it must get its gradient, which the fused path leaves out."""
    model = Toy()
    attached = attach(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False), seed=1)
    base = model.layers[0].q_proj.base
    base.weight.requires_grad_(True)
    objective(model(IDS)).backward()
    assert base.weight.grad is not None and attached.adapter.factors["layers.0.q_proj"].A.grad is not None


def test_a_copy_of_an_adapted_model_is_apart_from_it() -> None:
    model = Toy()
    attached = attach(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False), seed=1)
    copied, expected = copy.deepcopy(model), model(IDS)
    randomise(p for _, p in attached.adapter.named_parameters())
    assert torch.equal(copied(IDS), expected) and relative(model(IDS), expected) > 1e-3


def test_factors_are_float32_beside_a_half_precision_base(tmp_path: Any) -> None:
    model, inputs = FAMILIES["llama"]().bfloat16(), inputs_for("llama")
    attached = attach(model, LoraConfig.preset("deep", init_lora_weights=False), seed=1)
    assert {p.dtype for _, p in attached.adapter.named_parameters()} == {torch.float32}
    logits = logits_of(model, inputs)
    objective(logits).backward()
    assert logits.dtype == torch.bfloat16
    assert {p.grad.dtype for _, p in attached.adapter.named_parameters() if p.grad is not None} == {torch.float32}
    attached.save(tmp_path / "saved")
    again = load_adapter(FAMILIES["llama"]().bfloat16(), tmp_path / "saved")
    assert torch.equal(logits_of(again.model, inputs), logits)
