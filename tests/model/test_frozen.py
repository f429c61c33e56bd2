"""What frozen layers make of a row, kept: the same bits whether it was kept or not, and what the whole model gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny_run
from families import FAMILIES, VOCAB
from loratune import api
from loratune.adapter.attach import Attached, attach
from loratune.adapter.config import LoraConfig
from loratune.data.encode import Document
from loratune.evaluate.loss import evaluate
from loratune.model.causal import CausalModel
from loratune.train.config import load_run_config
from oracles import exact, gradients, relative

_PLENTY = 10**9


def documents(*lengths: int, shared: int = 0) -> list[Document]:
    begin = np.random.RandomState(99).randint(3, VOCAB, shared)
    rows = [np.concatenate([begin, np.random.RandomState(seed).randint(3, VOCAB, n)]) for seed, n in enumerate(lengths)]
    return [Document(row.astype(np.int32), np.arange(len(row)) > shared + 1) for row in rows]


def adapted(family: str, layers: list[int], model: Any = None, **settings: Any) -> Attached:
    given = {"r": 3, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "layers_to_transform": layers}
    return attach(model or FAMILIES[family](), LoraConfig(**{**given, **settings}), seed=5)


def step(causal: CausalModel, attached: Attached, rows: list[Document]) -> tuple[Tensor, dict[str, Tensor]]:
    for _, parameter in attached.adapter.named_parameters():
        parameter.grad = None
    total, each = causal.losses(causal.batch(rows, range(len(rows))))
    total.backward()
    return each, {name: grad.clone() for name, grad in gradients(attached.adapter).items()}


def same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> bool:
    return torch.equal(one[0], other[0]) and all(torch.equal(grad, other[1][name]) for name, grad in one[1].items())


@pytest.mark.parametrize("shared", [0, 20])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_losses_and_gradients_equal_those_of_the_whole_model_in_float64(family: str, shared: int) -> None:
    attached = adapted(family, [1], exact(family))
    rows = documents(9, 14, 5, shared=shared)
    causal = CausalModel(attached.model)
    plain = step(causal, attached, rows)
    causal.close()
    causal = CausalModel(attached.model, keep_frozen=_PLENTY)
    assert causal.frozen is not None and causal.frozen.depth == 1 and causal.shares and not causal.notes
    for _ in range(2):
        kept = step(causal, attached, rows)
        assert relative(kept[0], plain[0]) < 1e-12
        assert all(relative(grad, plain[1][name]) < 1e-10 for name, grad in kept[1].items())


def test_bits_do_not_depend_on_what_is_kept_or_stands_beside() -> None:
    rows = documents(9, 14, 5, 7)
    results = []
    for keep_frozen, before in ((_PLENTY, ()), (_PLENTY, ((0, 2), (1, 3))), (1, ((3, 1),)), (2000, ((1, 0),))):
        attached = adapted("llama", [1])
        causal = CausalModel(attached.model, keep_frozen=keep_frozen)
        assert causal.frozen is not None
        for pack in before:  # other rows of an earlier epoch
            step(causal, attached, [rows[i] for i in pack])
        results.append(step(causal, attached, rows))
        assert causal.frozen.num_bytes <= keep_frozen
    assert all(same(results[0], each) for each in results[1:])


def test_a_row_passes_the_layers_below_once() -> None:
    attached = adapted("gemma3_text", [2])
    causal = CausalModel(attached.model, keep_frozen=_PLENTY)
    assert causal.frozen is not None and causal.blocks is not None and causal.frozen.depth == 2
    rows = documents(9, 14, 5)
    before = causal.blocks.num_used
    step(causal, attached, rows)
    assert causal.blocks.num_used - before == 2 * 3 + 1
    before = causal.blocks.num_used
    step(causal, attached, rows[::-1])
    step(causal, attached, rows[1:])
    evaluate(causal, rows, 1000)
    assert causal.blocks.num_used - before == 3
    assert causal.frozen.num_bytes == sum(int(row.num_tokens) - 1 for row in rows) * 32 * 4


def test_another_adapter_below_empties_what_was_kept() -> None:
    attached = adapted("gemma3_text", [2])
    causal = CausalModel(attached.model, keep_frozen=_PLENTY)
    assert causal.frozen is not None
    rows = documents(9, 14)
    step(causal, attached, rows)
    attached.detach()
    second = adapted("gemma3_text", [1], attached.model)
    found = step(causal, second, rows)
    assert causal.frozen.depth == 1
    causal.close()
    plain = step(CausalModel(attached.model), second, rows)
    assert relative(found[0], plain[0]) < 1e-5 and found[1].keys() == plain[1].keys()


@pytest.mark.parametrize(
    "settings",
    [{"layers_to_transform": [0, 1]}, {"trainable_token_indices": [3]}, {"modules_to_save": ["embed_tokens"]}],
)
def test_where_nothing_is_frozen_below_it_is_said(settings: dict[str, Any]) -> None:
    attached = adapted("llama", [1], **settings)
    causal = CausalModel(attached.model, keep_frozen=_PLENTY)
    assert "keep_frozen_mb changes nothing, no layer stands below the first adapted one" in causal.notes[-1]
    rows = documents(9, 14)
    found = step(causal, attached, rows)
    causal.close()
    assert same(found, step(CausalModel(attached.model), attached, rows))


def test_layers_of_no_known_structure_are_said() -> None:
    attached = adapted("gpt2", [1], target_modules=["c_attn"])
    assert "its layers have no known structure" in CausalModel(attached.model, keep_frozen=_PLENTY).notes[-1]


@pytest.mark.parametrize("family", ["llama", "olmo2"])  # as one function, and by the family's own forward
def test_no_graph_is_built_below_the_first_adapted_layer(family: str) -> None:
    attached = adapted(family, [1])
    causal = CausalModel(attached.model)
    states: list[Tensor] = []
    for layer in attached.model.model.layers:
        layer.register_forward_hook(lambda *given: states.append(given[-1]))
    causal.losses(causal.batch(documents(9, 5), range(2)))
    assert [each.requires_grad for each in states] == [False, True]


class _Stopped(Exception):
    pass


def test_a_run_and_its_resumption_learn_the_same_bits(tmp_path: Path) -> None:
    tiny_run.save_model(tmp_path / "model")
    tiny_run.write_rows(tmp_path / "rows.jsonl", tiny_run.copy_rows(40))
    given = {
        "model": str(tmp_path / "model"), "data.train": str(tmp_path / "rows.jsonl"), "train.keep_frozen_mb": 100,
        "adapter.target_modules": ["q_proj", "v_proj"], "adapter.layers_to_transform": [1], "adapter.lora_dropout": 0.1,
        "train.epochs": 3.0, "train.save_every": 3,
    }  # fmt: skip

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 8:
            raise _Stopped

    api.run(load_run_config(None, {**given, "output": str(tmp_path / "whole")}))
    with pytest.raises(_Stopped):
        api.run(load_run_config(None, {**given, "output": str(tmp_path / "parts")}), stop)
    api.resume(tmp_path / "parts")
    one, other = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()
