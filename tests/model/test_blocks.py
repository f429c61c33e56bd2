"""A block as one function against the family's own forward: values, gradients, and when it must stand aside."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import FAMILIES, VOCAB
from loratune.adapter.attach import Attached, attach
from loratune.adapter.config import LoraConfig
from loratune.data.encode import Document
from loratune.model import attention, layers
from loratune.model.causal import CausalModel
from oracles import ExactNorm, exact, gradients, relative, worst

_KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3")
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model: PreTrainedModel, targets: list[str] | None = None, **settings: Any) -> Attached:
    config = LoraConfig(r=3, target_modules=targets or _ALL, init_lora_weights=False, **settings)
    return attach(model, config, seed=5)


def documents(*lengths: int) -> list[Document]:
    rows = [np.random.RandomState(seed).randint(3, VOCAB, n).astype(np.int32) for seed, n in enumerate(lengths)]
    return [Document(row, np.arange(len(row)) >= 1 + len(row) // 3) for row in rows]


def step(causal: CausalModel, attached: Attached, rows: list[Document]) -> tuple[Tensor, dict[str, Tensor]]:
    """The label losses of a batch and the gradients of their sum."""
    for _, parameter in attached.adapter.named_parameters():
        parameter.grad = None
    batch = causal.batch(rows, range(len(rows)))
    attached.shared.noise = batch.noise(1, 2)
    total, each = causal.losses(batch)
    total.backward()
    return each, {name: grad.clone() for name, grad in gradients(attached.adapter).items()}


@contextmanager
def plain(causal: CausalModel) -> Iterator[None]:
    """The layers' own forwards within the block."""
    used = causal.blocks
    assert used is not None
    before = {block.layer: block.layer.__dict__.pop("forward") for block in used.found}
    yield
    for layer, forward in before.items():
        layer.forward = forward


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", _KNOWN)
def test_losses_and_gradients_equal_the_plain_forward_in_float64(family: str, dropout: float, recompute: bool) -> None:
    model = exact(family)
    attached = adapted(model, lora_dropout=dropout)
    causal = CausalModel(model)
    assert causal.blocks is not None and len(causal.blocks.found) == model.config.num_hidden_layers
    causal.blocks.recompute = recompute
    attached.train_mode()
    rows, used = documents(5, 21, 2, 14), causal.blocks.num_used
    losses, grads = step(causal, attached, rows)
    assert causal.blocks.num_used == used + model.config.num_hidden_layers
    with plain(causal):
        expected_losses, expected = step(causal, attached, rows)
    assert causal.blocks.num_used == used + model.config.num_hidden_layers
    assert relative(losses, expected_losses) < 1e-12 and worst(grads, expected) < 1e-10


@given(
    targets=st.lists(st.sampled_from(_ALL), min_size=1, unique=True), layers=st.sampled_from([None, [0], [1]]),
    family=st.sampled_from(["llama", "qwen3", "gemma3_text"]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_any_set_of_sites_gets_the_same_gradients(targets: list[str], layers: list[int] | None, family: str) -> None:
    """Where nothing below a site is adapted the backward pass ends there; what it leaves out must not be missed."""
    model = exact(family)
    attached = adapted(model, targets, layers_to_transform=layers)
    causal = CausalModel(model)
    _, grads = step(causal, attached, documents(6, 3))
    with plain(causal):
        _, expected = step(causal, attached, documents(6, 3))
    assert worst(grads, expected) < 1e-10


@pytest.mark.parametrize("family", _KNOWN)
def test_the_families_own_float32_models_use_their_blocks(family: str) -> None:
    model = FAMILIES[family]()
    attached = adapted(model)
    causal = CausalModel(model)
    assert causal.blocks is not None and len(causal.blocks.found) == model.config.num_hidden_layers
    _, grads = step(causal, attached, documents(9, 30))
    with plain(causal):
        _, expected = step(causal, attached, documents(9, 30))
    assert worst(grads, expected) < 2e-5  # both round, in another order


def test_long_documents_go_through_scaled_dot_product_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SHORT_TOKENS", 8)
    model = exact("gemma3_text")
    attached = adapted(model)
    causal = CausalModel(model)
    losses, grads = step(causal, attached, documents(5, 30, 12))
    with plain(causal):
        expected_losses, expected = step(causal, attached, documents(5, 30, 12))
    assert relative(losses, expected_losses) < 1e-12 and worst(grads, expected) < 1e-10


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_gradients_equal_finite_differences(family: str) -> None:
    """Of one block's input and of all its factors."""
    model = exact(family)
    attached = adapted(model)
    causal = CausalModel(model)
    layer: Any = model.base_model.layers[1]
    batch = causal.batch(documents(4, 3), range(2))
    seen: dict[str, Any] = {}
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs, x=args[0]), with_kwargs=True)
    with torch.no_grad():
        causal.hidden(batch)
    handle.remove()
    x = seen.pop("x").requires_grad_()
    factors = [p for path, f in attached.adapter.factors.items() if ".1." in path for p in f.parameters()]
    assert causal.blocks is not None
    used = causal.blocks.num_used
    assert torch.autograd.gradcheck(lambda *_: layer(x, **seen), (x, *factors), fast_mode=True)
    assert causal.blocks.num_used > used


def test_rows_that_predict_nothing_end_at_the_last_attention() -> None:
    model = FAMILIES["llama"]()
    adapted(model)
    causal = CausalModel(model)
    batch, seen = causal.batch(documents(9, 12), range(2)), []
    handle = model.base_model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    causal.hidden(batch)
    assert seen.pop() == batch.num_labels < batch.num_positions
    attention_only = model.base_model.layers[-1].register_forward_hook(
        lambda *_: None
    )  # somebody wants to see it whole
    causal.hidden(batch)
    assert seen.pop() == batch.num_positions
    attention_only.remove(), handle.remove()


def test_less_is_kept_for_the_backward_pass() -> None:
    """Counted: the bytes of the distinct tensors that autograd holds, per block."""
    model = FAMILIES["gemma3_text"]()
    attached = adapted(model)
    causal = CausalModel(model)
    assert causal.blocks is not None

    def kept_bytes() -> int:
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = causal.hidden(causal.batch(documents(40, 50), range(2)))
        assert hidden.requires_grad
        return sum(storages.values())

    ours = kept_bytes()
    causal.blocks.recompute = True
    least = kept_bytes()
    with plain(causal):
        theirs = kept_bytes()
    assert least < ours < 0.75 * theirs  # of tiny layers; the benchmark has the real ones
    attached.detach()


def _of(model: Any, name: str) -> Any:
    return model.base_model.layers[0].get_submodule(name)


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"init_lora_weights": "pissa"},
     {"modules_to_save": ["input_layernorm"]}],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_what_a_block_does_not_compute_runs_on_the_plain_path(settings: dict[str, Any]) -> None:
    model = FAMILIES["qwen2"]()
    attached = attach(
        model, LoraConfig(**({"r": 3, "target_modules": _ALL, "init_lora_weights": False} | settings)), seed=5
    )
    causal = CausalModel(model)
    used = causal.blocks.num_used if causal.blocks is not None else 0
    _, grads = step(causal, attached, documents(9, 30))
    assert causal.blocks is None or causal.blocks.num_used == used
    assert all(bool(grad.count_nonzero()) for grad in grads.values())


def test_a_hook_is_called_and_training_mode_is_left_to_the_family() -> None:
    model = FAMILIES["llama"]()
    adapted(model)
    causal = CausalModel(model)
    assert causal.blocks is not None
    batch, calls = causal.batch(documents(9), [0]), []
    handle = _of(model, "mlp.up_proj").register_forward_hook(lambda *_: calls.append(1))
    used = causal.blocks.num_used
    causal.hidden(batch)
    assert calls == [1] and causal.blocks.num_used == used + 1  # the other layer's block
    handle.remove()
    base = _of(model, "self_attn.k_proj").base
    base.forward = lambda x: nn.Linear.forward(base, x) * 0  # as libraries do that move weights about
    changed = causal.hidden(batch)
    assert causal.blocks.num_used == used + 2
    del base.forward
    assert relative(causal.hidden(batch), changed) > 1e-3 and causal.blocks.num_used == used + 4
    model.train()
    causal.hidden(batch)
    assert causal.blocks.num_used == used + 4


def test_each_row_its_own_adapter_is_left_to_the_family() -> None:
    model = FAMILIES["llama"]()
    attached = adapted(model)
    causal = CausalModel(model)
    assert causal.blocks is not None
    batch = causal.batch(documents(9), [0])
    base, used = causal.hidden(batch).detach(), causal.blocks.num_used
    with attached.rows(["default"]):
        rows = causal.hidden(batch)
    assert causal.blocks.num_used == used and relative(rows, base) < 1e-5


@pytest.mark.parametrize(
    ("family", "change"), [("granite", {"residual_multiplier": 0.5}), ("smollm3", {"no_rope_layers": [1, 0]})]
)
def test_a_family_that_only_looks_like_a_known_structure_is_found_out(family: str, change: dict[str, Any]) -> None:
    model = FAMILIES[family]()
    config = type(model.config)(**(model.config.to_dict() | change))
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    adapted(other)
    causal = CausalModel(other)
    assert causal.packs and causal.blocks is None
    assert not any("forward" in module.__dict__ for module in other.modules())


def test_closing_gives_the_layers_their_own_forward_back() -> None:
    model = FAMILIES["llama"]()
    attached = adapted(model)
    with torch.no_grad():
        ids = torch.arange(3, 12)[None]
        before = model(ids).logits
        causal = CausalModel(model)
        assert "forward" in model.base_model.layers[0].__dict__
        assert torch.equal(model(ids).logits, before)  # an ordinary call is not the block's
        causal.close()
    assert not any("forward" in module.__dict__ for module in model.modules())
    attached.detach()


def test_a_forward_that_somebody_else_put_there_stays() -> None:
    model = FAMILIES["llama"]()
    attached = adapted(model)
    layers = model.base_model.layers
    own = layers[0].forward
    layers[0].forward = lambda *args, **kwargs: own(*args, **kwargs)  # as accelerate does
    theirs = layers[0].forward
    causal = CausalModel(model)
    assert causal.blocks is not None and [block.layer for block in causal.blocks.found] == list(layers[1:])
    causal.close()
    assert layers[0].forward is theirs and "forward" not in layers[1].__dict__
    attached.detach()


def test_a_norm_is_known_by_what_it_computes() -> None:
    class Scaled(ExactNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.001

    norm = ExactNorm(nn.RMSNorm(6, eps=1e-5), 1.0)
    found = layers._norm_of(norm)
    assert found is not None and found.offset == 1.0
    assert layers._norm_of(Scaled(nn.RMSNorm(6, eps=1e-5), 1.0)) is None and layers._norm_of(nn.LayerNorm(6)) is None
