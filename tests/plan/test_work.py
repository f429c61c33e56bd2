"""The work a plan counts is the work a run does: the same packs, positions, labels and products of attention."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_run
from loratune.adapter.attach import attach
from loratune.adapter.config import LoraConfig
from loratune.data.encode import Document
from loratune.data.pack import step_rows
from loratune.model.causal import Batch, CausalModel
from loratune.plan import work
from loratune.train.config import TrainConfig


@pytest.fixture(scope="module")
def causal() -> CausalModel:
    return CausalModel(tiny_run.tiny_llama())


def document(length: int, seed: int, begin: int = 0) -> Document:
    ids = np.random.RandomState(seed).randint(3, 90, length).astype(np.int32)
    ids[:begin] = np.arange(begin)[:length] % 80 + 3
    return Document(ids, np.arange(length) >= max(1, min(begin, length - 1)))


def computed(batch: Batch) -> work.Pack:
    """What a batch says that the model will compute."""
    if not batch.packed:
        rows, width = batch.inputs["input_ids"].shape
        return work.Pack(rows * width, batch.num_labels, rows * width * width, width)
    [segments] = [value for name, value in batch.inputs.items() if name == "cu_seq_lens_q"]
    reach = [each.end - each.start + each.from_end - each.from_start for each in segments]
    squares = sum((each.end - each.start) * keys for each, keys in zip(segments, reach, strict=True))
    return work.Pack(batch.num_positions, batch.num_labels, squares, max(reach))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=10), limit=st.integers(8, 120), begin=st.integers(0, 24)
)
@pytest.mark.parametrize("way", ["shared", "packed", "padded"])
def test_packs_are_those_that_the_model_is_given(
    causal: CausalModel, way: str, lengths: list[int], limit: int, begin: int
) -> None:
    documents = [document(length, seed, begin) for seed, length in enumerate(lengths)]
    causal.packs, causal.shares = way != "padded", way == "shared"
    found = work.padded(documents, limit) if way == "padded" else work.packed(documents, limit, share=way == "shared")
    packs = causal.cut(documents, limit)
    assert found == [computed(causal.batch([documents[i] for i in pack], pack)) for pack in packs]


def test_dropout_keeps_rows_from_sharing_a_beginning_as_in_the_run(tmp_path: Path) -> None:
    from loratune.plan.costs import base_of
    from loratune.plan.estimate import cutter

    documents = [document(40, seed, begin=30) for seed in range(4)]
    for dropout, num_tokens in ((0.0, 29 + 4 * 10), (0.1, 4 * 39)):
        model = tiny_run.tiny_llama()
        base = base_of(model, next(model.parameters()).dtype, next(model.parameters()).device)
        attached = attach(model, LoraConfig.preset("fast", lora_dropout=dropout))
        attached.train_mode(True)
        causal = CausalModel(model)
        [pack] = cutter(base, attached.adapter)(documents, 1000)
        assert pack.tokens == num_tokens == causal.batch(documents, range(4)).num_positions
        causal.close()


CONFIGS: list[dict[str, Any]] = [
    {"batch_size": 4},
    {"batch_size": 3, "epochs": 2.5, "micro_batch_tokens": 40},
    {"batch_size": 5, "max_steps": 3},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_steps_are_those_of_the_run(tmp_path: Path, config: dict[str, Any]) -> None:
    run = tiny_run.make_run(tmp_path, rows=22, **config)
    found = work.of_training(run.train, run.config, lambda documents, limit: work.packed(documents, limit, share=False))
    assert found.num_steps == run.num_steps
    steps: list[list[int]] = []
    while run.step < run.num_steps:
        steps.append(run.rows_of_step())
        run.step += 1
    packs = [
        work.packed([run.train.documents[i] for i in rows], run.config.micro_batch_tokens, share=False)
        for rows in steps
    ]
    assert found.largest.tokens == max(pack.tokens for each in packs for pack in each)
    assert found.widest_rows in steps and found.usual_rows in steps
    assert found.typical.tokens == round(np.mean([sum(pack.tokens for pack in each) for each in packs]))
    assert found.usual.tokens == sum(pack.tokens for pack in packs[steps.index(found.usual_rows)])


def test_a_long_run_tries_its_longest_rows_together(tmp_path: Path) -> None:
    """As `train.rehearsal` does: it is what may not fit, however rare."""
    rows = tiny_run.dataset(tmp_path, 400)
    config = TrainConfig(batch_size=2, epochs=3)
    found = work.of_training(rows, config, lambda documents, limit: work.packed(documents, limit, share=False))
    longest = sorted(rows.lengths.tolist())[-2:]
    assert found.num_steps == 600
    assert found.widest_rows == work.longest_rows(rows, 2)
    assert found.largest.tokens == sum(longest) - 2
    assert found.widest_rows != step_rows(400, 2, 0, 0, 0)


@pytest.mark.parametrize(
    ("num_steps", "steps_per_epoch", "every", "expected"),
    [(10, 10, None, 2), (20, 10, None, 3), (25, 10, None, 4), (10, 10, 3, 5), (9, 10, 3, 4), (4, 10, 100, 2)],
)
def test_evaluations_are_counted_as_the_loop_does_them(
    num_steps: int, steps_per_epoch: int, every: int | None, expected: int
) -> None:
    """Before step 1, then after each step for which the loop's rule holds."""
    due = [
        step
        for step in range(1, num_steps + 1)
        if step >= num_steps or (step % every == 0 if every else step % steps_per_epoch == 0)
    ]
    assert work.num_evaluations(num_steps, steps_per_epoch, every) == 1 + len(due) == expected
