"""Documents through a causal model: packed, padded and alone give the same logits, losses and gradients."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import CAUSAL, FAMILIES, VOCAB
from loratune.adapter.attach import Attached, attach
from loratune.adapter.config import LoraConfig
from loratune.data.encode import Document
from loratune.model import attention
from loratune.model.causal import CausalModel
from loratune.model.prefixes import Segment
from oracles import double, gradients, logits_of, relative, worst

# Their attention is their own code, or (StableLM) drops the keywords on the way down: one document a row.
_PADDED = {"gptj", "falcon", "falcon_alibi", "bloom", "mpt", "stablelm"}
_FLOAT32_INSIDE = {"gptj", "bloom", "mpt"}  # the softmax of transformers' code for these is float32 in any model


def document(seed: int, length: int, prompt: int = 1) -> Document:
    ids = np.random.RandomState(seed).randint(3, VOCAB, length).astype(np.int32)
    return Document(ids, np.arange(length) >= prompt)


def alone(model: nn.Module, documents: Sequence[Document]) -> Tensor:
    """The logits of every predicting position, from the untouched model, one document at a time."""
    rows = [torch.tensor(each.input_ids[None].astype(np.int64)) for each in documents]
    return torch.cat([logits_of(model, {"input_ids": row})[0, :-1] for row in rows])


@pytest.mark.parametrize("family", CAUSAL)
def test_packed_or_padded_logits_and_losses_equal_those_of_each_document_alone(family: str) -> None:
    documents = [document(seed, length) for seed, length in enumerate((5, 21, 2, 14))]  # the sliding window is 8
    model = FAMILIES[family]()
    with torch.no_grad():
        expected = alone(model, documents)
        causal = CausalModel(model)
        batch = causal.batch(documents, range(4))
        assert causal.packs == batch.packed == (family not in _PADDED)
        assert bool(causal.notes) == (family in _PADDED), causal.notes
        with attention.packed_row() if batch.packed else nullcontext():
            logits = model(**batch.inputs, use_cache=False).logits.reshape(-1, VOCAB)[batch.predicting]
        assert relative(logits, expected) < 3e-6  # blocks as one function round in another order
        total, each = causal.losses(batch)
    losses = F.cross_entropy(expected.double(), batch.labels, reduction="none")
    assert relative(each.double(), losses) < 1e-6
    assert float(total) == pytest.approx(float(losses.sum()), rel=1e-6)
    assert batch.num_labels == 38 and batch.num_positions == (38 if batch.packed else 4 * 20)


_DOCUMENTS = [document(seed, 3 + 7 * seed % 19, prompt=1 + seed % 3) for seed in range(24)]
_KEYS = [1000 + seed for seed in range(24)]


def trained(family: str) -> tuple[CausalModel, Attached]:
    model = double(family)
    config = LoraConfig.preset("deep", r=4, lora_dropout=0.2, init_lora_weights=False)
    attached = attach(model, config, seed=5)
    causal = CausalModel(model)
    attached.train_mode()
    return causal, attached


def step_gradients(causal: CausalModel, attached: Attached, cuts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The gradients of one optimizer step, its 24 documents cut into these micro-batches."""
    assert sorted(position for cut in cuts for position in cut) == list(range(24))
    num_labels = sum(each.num_labels for each in _DOCUMENTS)
    for parameter in (p for _, p in attached.adapter.named_parameters()):
        parameter.grad = None
    for cut in cuts:
        batch = causal.batch([_DOCUMENTS[i] for i in cut], keys=[_KEYS[i] for i in cut])
        attached.shared.noise = batch.noise(seed=7, step=3)
        total, _ = causal.losses(batch)
        (total / num_labels).backward()
    attached.shared.noise = None
    return gradients(attached.adapter)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_gradient_is_the_same_for_every_micro_batch_size(family: str) -> None:
    causal, attached = trained(family)
    expected = step_gradients(causal, attached, [[i] for i in range(24)])
    for max_tokens in (24, 60, 10_000):
        found = step_gradients(causal, attached, causal.cut(_DOCUMENTS, max_tokens))
        assert worst(found, expected) < (1e-6 if family in _FLOAT32_INSIDE else 1e-12), max_tokens


_HELD: dict[str, tuple[CausalModel, Attached, dict[str, Tensor]]] = {}


@given(st.permutations(range(24)), st.sets(st.integers(1, 23)))
@settings(max_examples=15, deadline=None)
def test_the_gradient_is_the_same_for_every_way_of_cutting(order: list[int], edges: set[int]) -> None:
    """Any order, any number of micro-batches of any size; a tied head with an adapter, sliding windows, dropout."""
    if not _HELD:
        causal, attached = trained("gemma3_text")
        _HELD["gemma3_text"] = causal, attached, step_gradients(causal, attached, [range(24)])
    causal, attached, expected = _HELD["gemma3_text"]
    borders = [0, *sorted(edges), 24]
    cuts = [order[start:end] for start, end in pairwise(borders)]
    assert worst(step_gradients(causal, attached, cuts), expected) < 1e-12


def test_dropout_does_something_and_depends_on_the_step() -> None:
    causal, attached = trained("llama")
    with_dropout = step_gradients(causal, attached, [range(24)])
    attached.train_mode(False)
    assert worst(step_gradients(causal, attached, [range(24)]), with_dropout) > 1e-2


def test_gradients_of_a_batch_equal_plain_cross_entropy() -> None:
    """The whole path (packing, label rows only, the head's adapter) against transformers' logits and torch's loss."""
    causal, attached = trained("gemma2")  # soft caps in attention and head
    attached.train_mode(False)
    found = step_gradients(causal, attached, [range(24)])
    causal.close()
    causal.model.set_attn_implementation("eager")
    for parameter in (p for _, p in attached.adapter.named_parameters()):
        parameter.grad = None
    num_labels = sum(each.num_labels for each in _DOCUMENTS)
    for each in _DOCUMENTS:
        labels = torch.tensor(each.input_ids[1:].astype(np.int64))
        losses = F.cross_entropy(alone(causal.model, [each]), labels, reduction="none")
        (losses[torch.from_numpy(each.trained[1:])].sum() / num_labels).backward()
    assert worst(found, gradients(attached.adapter)) < 1e-6  # transformers' soft-capped softmax is float32


def test_tokens_after_the_last_label_are_left_out() -> None:
    causal = CausalModel(FAMILIES["llama"]())
    ids = np.arange(3, 13, dtype=np.int32)
    trained_at = np.zeros(10, bool)
    trained_at[[4, 6]] = True
    batch = causal.batch([Document(ids, trained_at), document(1, 4)], [0, 1])
    assert batch.inputs["input_ids"].tolist() == [[3, 4, 5, 6, 7, 8, *document(1, 4).input_ids[:3]]]
    assert batch.inputs[attention.SEGMENTS] == (Segment(0, 6), Segment(6, 9))
    assert batch.predicting.tolist() == [3, 5, 6, 7, 8] and batch.labels.tolist()[:2] == [7, 9]
    assert batch.owners.tolist() == [0, 0, 1, 1, 1]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2]]


def test_closing_gives_the_attention_back() -> None:
    model = FAMILIES["llama"]()
    before = model.config._attn_implementation
    causal = CausalModel(model)
    assert model.config._attn_implementation == attention.NAME
    causal.close()
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}, {"second": True}], ids=str
)
def test_whatever_is_adapted_on_the_head_is_in_the_loss(settings: dict[str, Any]) -> None:
    """Against the model's own logits, losses and gradients; with a second adapter too."""
    model = double("llama")
    config = {"r": 3, "target_modules": ["lm_head", "q_proj"], "init_lora_weights": False} | settings
    second = config.pop("second", False)
    attached = attach(model, LoraConfig(**config), "one", seed=1)
    if second:
        other = attach(model, LoraConfig(**config), "two", seed=2)
        other.activate(attached)
    with torch.no_grad():
        for _, parameter in attached.adapter.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    causal, rows = CausalModel(model), [document(0, 5), document(1, 9)]
    batch = causal.batch(rows, [0, 1])
    total, each = causal.losses(batch)

    def gradients_of(loss: Tensor) -> dict[str, Tensor]:
        for _, parameter in attached.adapter.named_parameters():
            parameter.grad = None
        loss.backward(retain_graph=True)
        return gradients(attached.adapter)

    expected = F.cross_entropy(alone(model, rows), batch.labels, reduction="none")
    assert relative(each, expected) < 1e-6 and worst(gradients_of(total), gradients_of(expected.sum())) < 1e-6
    # The same as log-probabilities, and a loss that sets one document against the other, as a preference does.
    log_probs, first = causal.log_probs(batch), batch.owners == 0
    assert relative(log_probs, -expected) < 1e-6
    ours, plain = (F.softplus(by[first].sum() - by[~first].sum()) for by in (log_probs, -expected))
    assert worst(gradients_of(ours), gradients_of(plain)) < 1e-6


def _no_keywords(model: PreTrainedModel) -> None:
    """A trunk that takes no boundaries, as a family of its own might be written."""
    forward = model.model.forward

    def narrow(*args: object, **kwargs: object) -> object:
        if attention.SEGMENTS in kwargs:
            raise TypeError(f"unexpected keyword argument {attention.SEGMENTS}")
        return forward(*args, **kwargs)

    model.model.forward = narrow


def _leaks(model: PreTrainedModel) -> None:
    """A trunk whose documents see each other: the boundaries are lost on the way."""
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(
        *args, **{name: value for name, value in kwargs.items() if name != attention.SEGMENTS}
    )


@pytest.mark.parametrize(
    ("damage", "reason"), [(_no_keywords, "refuses a packed row: TypeError"), (_leaks, "packed and apart differ")]
)
def test_a_model_that_would_mix_documents_is_run_one_document_a_row(
    damage: Callable[[PreTrainedModel], None], reason: str
) -> None:
    model, documents = FAMILIES["llama"](), [document(seed, length) for seed, length in enumerate((5, 11))]
    expected = alone(model, documents)
    damage(model)
    causal = CausalModel(model)
    assert not causal.packs and reason in causal.notes[0]
    batch = causal.batch(documents, [0, 1])
    each = causal.losses(batch)[1]
    assert relative(each, F.cross_entropy(expected, batch.labels, reduction="none")) < 1e-6


class _OwnLogits(nn.Module):
    """Logits that are more than a matrix, a scale and a cap."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.head(x).sin()


def test_a_head_that_is_more_than_a_matrix_gets_its_loss_from_full_logits() -> None:
    model, documents = FAMILIES["llama"](), [document(seed, length) for seed, length in enumerate((5, 11))]
    model.lm_head = _OwnLogits(model.lm_head)
    expected = alone(model, documents)
    causal = CausalModel(model)
    assert causal.packs and "no linear head" in causal.notes[0]
    batch = causal.batch(documents, [0, 1])
    assert relative(causal.losses(batch)[1], F.cross_entropy(expected, batch.labels, reduction="none")) < 1e-6
