"""Encoders without padding: the same losses, gradients and masks as padded rows; other families stay as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratune.model import attention
from loratune.model.prefixes import Segment
from loratune.tasks.model import TaskModel
from loratune.tasks.packing import sorted_packs
from tasks.task_models import KINDS, prepared, rows_of, set_random
from tasks.toy_tasks import alike, people, questions, save_model, sentiment

MAKE = {"SEQ_CLS": sentiment, "TOKEN_CLS": people, "QUESTION_ANS": questions, "FEATURE_EXTRACTION": alike}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family in ("bert", "roberta", "distilbert", "llama"):
        save_model(folder / family, family)
    return folder


def made(base: Path, task_type: str, dropout: float) -> tuple[Any, Any, TaskModel]:
    rows = rows_of(KINDS[task_type], MAKE[task_type](9))
    attached, examples, runner = prepared(task_type, base, rows, targets="deep", dropout=dropout)
    set_random(attached)
    return attached, examples, runner


def step(attached: Any, examples: Any, runner: TaskModel, max_tokens: int) -> dict[str, torch.Tensor]:
    attached.train_mode(True)
    for pack in runner.cut(examples, max_tokens):
        batch = runner.batch([examples[i] for i in pack], [100 + i for i in pack])
        attached.shared.noise = batch.noise(7, 3)
        runner.losses(batch)[0].backward()
    attached.shared.noise = None
    found = {name: parameter.grad.clone() for name, parameter in attached.adapter.named_parameters()}
    for _, parameter in attached.adapter.named_parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    ("family", "task_type"),
    [("bert", each) for each in MAKE] + [("roberta", "SEQ_CLS"), ("distilbert", "SEQ_CLS")],
)
def test_packed_gradients_are_those_of_padded_rows(family: str, task_type: str, dropout: float, bases: Path) -> None:
    attached, examples, runner = made(bases / family, task_type, dropout)
    assert runner.packing is not None and not runner.notes
    packed, cut = step(attached, examples, runner, 1000), step(attached, examples, runner, 40)
    runner.close()
    assert runner.packing is None and attached.model.config._attn_implementation == "sdpa"
    padded = step(attached, examples, runner, 40)
    for name, gradient in padded.items():
        torch.testing.assert_close(packed[name], gradient, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(cut[name], gradient, atol=2e-5, rtol=1e-3)


def test_decoders_are_padded(bases: Path) -> None:
    _, examples, runner = made(bases / "llama", "SEQ_CLS", 0.0)
    assert runner.packing is None
    assert runner.batch(examples, range(len(examples))).num_positions == 9 * max(each.num_tokens for each in examples)


def test_an_encoder_that_mixes_rows_is_padded_and_says_so(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.packed
    monkeypatch.setattr(attention, "packed", lambda q, k, v, _, asked: right(q, k, v, (Segment(0, q.shape[2]),), asked))
    _, _, runner = made(bases / "bert", "SEQ_CLS", 0.0)
    assert runner.packing is None and "cannot be packed" in runner.notes[0]
    assert runner.model.config._attn_implementation == "sdpa"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 60))
def test_packs_hold_every_row_once_and_no_more_than_fits(lengths: list[int], max_tokens: int) -> None:
    packs = sorted_packs(lengths, max_tokens)
    assert sorted(position for pack in packs for position in pack) == list(range(len(lengths)))
    assert all(len(pack) == 1 or sum(lengths[i] for i in pack) <= max_tokens for pack in packs)
