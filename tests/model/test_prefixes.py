"""Documents that begin alike, computed once: the same losses and gradients as each alone, for fewer tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from families import CAUSAL, FAMILIES, VOCAB
from loratune.adapter.attach import Attached, attach
from loratune.adapter.config import LoraConfig
from loratune.data.encode import Document
from loratune.evaluate.loss import evaluate
from loratune.model import attention, prefixes
from loratune.model.causal import CausalModel
from oracles import double, exact, gradients, relative, worst

_PACKED = [family for family in CAUSAL if family not in {"gptj", "falcon", "falcon_alibi", "bloom", "mpt", "stablelm"}]


def begin(seed: int, length: int) -> list[int]:
    return np.random.RandomState(seed).randint(3, VOCAB, length).tolist()


def document(before: list[int], own: int, seed: int, prompt: int = 1) -> Document:
    """`before`, then `own` tokens of its own, of which all but the first `prompt` are trained."""
    ids = np.array(before + begin(100 + seed, own), np.int32)
    return Document(ids, np.arange(len(ids)) >= len(before) + prompt)


# Two beginnings, one document that shares the first but is shorter, and two of their own.
_BEGINS = begin(1, 20), begin(2, 30)
_DOCUMENTS = [
    *(document(_BEGINS[0], own, own) for own in (5, 2, 9)),
    document(begin(3, 8), 6, 50),
    *(document(_BEGINS[1], own, own) for own in (4, 11)),
    document(_BEGINS[0][:17], 7, 60),
    document([], 12, 70),
]


def tokens_of(causal: CausalModel, documents: list[Document]) -> int:
    return causal.batch(documents, range(len(documents))).num_positions


def step(causal: CausalModel, attached: Attached, cuts: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    for _, parameter in attached.adapter.named_parameters():
        parameter.grad = None
    each = torch.zeros(len(_DOCUMENTS), dtype=torch.float64)
    for cut in cuts:
        batch = causal.batch([_DOCUMENTS[i] for i in cut], cut)
        attached.shared.noise = batch.noise(1, 2)
        total, losses = causal.losses(batch)
        total.backward()
        each.index_add_(0, torch.tensor(cut)[batch.owners], losses.double())
    return each, gradients(attached.adapter)


@pytest.mark.parametrize("family", _PACKED)
def test_losses_and_gradients_are_those_of_each_document_alone(family: str) -> None:
    model = double(family)
    attached = attach(model, LoraConfig(r=3, target_modules="deep", init_lora_weights=False, lora_dropout=0.0), seed=5)
    causal = CausalModel(model)
    assert causal.shares
    expected_losses, expected = step(causal, attached, [[i] for i in range(len(_DOCUMENTS))])
    for max_tokens in (40, 60, 10_000):
        losses, grads = step(causal, attached, causal.cut(_DOCUMENTS, max_tokens))
        assert (
            relative(losses, expected_losses) < 1e-12 and worst(grads, expected) < 1e-6
        )  # their norms go through float32
    distinct = 17 + 3 + 3 + 5 + 2 + 9 + 7 + 14 + 30 + 4 + 11 + 12  # the first beginning is shared to its 17th token
    assert tokens_of(causal, _DOCUMENTS) <= distinct < sum(each.num_tokens for each in _DOCUMENTS) - 60


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_block_as_one_function_and_long_documents_share_too(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for short in (256, 8):
        monkeypatch.setattr(attention, "SHORT_TOKENS", short)
        model = exact(family)
        attached = attach(model, LoraConfig(r=3, target_modules="deep", init_lora_weights=False, lora_dropout=0.0))
        causal = CausalModel(model)
        assert causal.blocks is not None
        used = causal.blocks.num_used
        expected_losses, expected = step(causal, attached, [[i] for i in range(len(_DOCUMENTS))])
        losses, grads = step(causal, attached, [list(range(len(_DOCUMENTS)))])
        assert causal.blocks.num_used > used
        assert relative(losses, expected_losses) < 1e-12 and worst(grads, expected) < 1e-10


def test_dropout_gives_each_document_its_own_beginning() -> None:
    """Its masks belong to the document; evaluation has none and shares."""
    model = FAMILIES["llama"]()
    attached = attach(model, LoraConfig(r=3, target_modules="deep", lora_dropout=0.1))
    causal = CausalModel(model)
    shared = tokens_of(causal, _DOCUMENTS)
    attached.train_mode()
    assert tokens_of(causal, _DOCUMENTS) == sum(each.num_tokens - 1 for each in _DOCUMENTS) > shared
    attached.train_mode(False)
    assert tokens_of(causal, _DOCUMENTS) == shared


def test_evaluation_shares_and_gives_each_document_its_loss() -> None:
    model = double("gemma3_text")
    causal = CausalModel(model)
    together = evaluate(causal, _DOCUMENTS, 10_000)
    causal.shares = False
    apart = evaluate(causal, _DOCUMENTS, 1)
    assert np.allclose(together.document_losses, apart.document_losses, rtol=1e-12)


def test_no_label_stands_in_what_is_shared() -> None:
    """Rows of text, trained from their first token on, share nothing however alike they begin."""
    rows = [document([], 40, 5, prompt=1) for _ in range(3)]
    assert prefixes.groups(rows) == [prefixes.Group(0, [0]), prefixes.Group(0, [1]), prefixes.Group(0, [2])]


@given(
    lengths=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(2, 20)), min_size=1, max_size=12),
    max_tokens=st.integers(1, 200),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_every_document_is_in_one_micro_batch_and_reads_its_own_tokens(
    lengths: list[tuple[int, int, int]], max_tokens: int
) -> None:
    """(which beginning, how much of it, own tokens): a document's segments spell it out, positions and all."""
    begins = [begin(seed, 40) for seed in (1, 2, 3)]
    rows = [document(begins[which][:take], own, seed) for seed, (which, take, own) in enumerate(lengths)]
    packs = prefixes.cut(rows, max_tokens)
    assert sorted(position for pack in packs for position in pack) == list(range(len(rows)))
    for pack in packs:
        documents = [rows[position] for position in pack]
        row = prefixes.lay_out(documents, [each.num_tokens for each in documents], share=True)
        assert len(row.ids) <= max_tokens or len({tuple(each.input_ids[:16]) for each in documents}) == 1
        ends = {segment.end: segment for segment in row.segments}
        for each, offset in zip(documents, row.offsets, strict=True):
            segment = ends[offset + each.num_tokens]
            where = [*range(segment.from_start, segment.from_end), *range(segment.start, segment.end)]
            assert row.ids[where].tolist() == each.input_ids.tolist()
            assert row.positions[where].tolist() == list(range(each.num_tokens))
            predicting = offset + np.flatnonzero(each.trained) - 1
            assert set(predicting.tolist()) <= set(range(segment.start, segment.end))
