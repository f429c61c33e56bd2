"""One pass over documents of several adapters against a pass of each alone: losses and gradients, in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families import FAMILIES, VOCAB
from loratune.adapter.attach import Attached, Attachments, attach
from loratune.adapter.config import LoraConfig
from loratune.data.encode import Document
from loratune.errors import AdapterError
from loratune.ladder.joint import JointModel, Server
from loratune.model.causal import CausalModel
from oracles import exact, gradients, worst

_LLAMA_LIKE = (
    ["q_proj", "v_proj"],
    ["o_proj", "gate_proj", "up_proj", "down_proj", "k_proj", "lm_head"],
    ["down_proj"],
)
_TARGETS: dict[str, tuple[list[str], ...]] = {
    "llama": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,  # tied, scaled embedding; a cap and norms of its own
    "gpt2": (["c_attn"], ["c_proj", "c_fc", "lm_head"], ["wte"]),  # Conv1D; an adapted embedding; no known blocks
}
_SEED, _STEP, _MAX_TOKENS = 3, 5, 40


def documents(*lengths: int) -> list[Document]:
    rows = [np.random.RandomState(seed).randint(3, VOCAB, n).astype(np.int32) for seed, n in enumerate(lengths)]
    return [Document(row, np.arange(len(row)) >= 1 + len(row) // 3) for row in rows]


ROWS = documents(5, 21, 2, 14, 9)


def place(model: PreTrainedModel, number: int, targets: list[str], **settings: Any) -> Attached:
    """Attaches the adapter of a number, neither of whose sides is zero."""
    fixed: dict[str, Any] = {
        "target_modules": targets,
        "r": 2 + 3 * number,
        "lora_alpha": 5,
        "init_lora_weights": False,
        "lora_dropout": 0.0,
    }
    config = LoraConfig(task_type="CAUSAL_LM", **fixed | settings)
    return attach(model, config, f"n{number}", seed=number)


def alone(family: str, number: int, packs: bool, **settings: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss of the rows and its gradients where one adapter is attached and trained."""
    model = exact(family)
    attached = place(model, number, _TARGETS[family][number], **settings)
    causal = CausalModel(model)
    if not packs:
        causal.close()
        causal.packs = False
    attached.train_mode(True)
    loss = 0.0
    num_labels = sum(row.num_labels for row in ROWS)
    for pack in causal.cut(ROWS, _MAX_TOKENS):
        batch = causal.batch([ROWS[i] for i in pack], [70 + i for i in pack])
        attached.shared.noise = batch.noise(_SEED, _STEP)
        total, _ = causal.losses(batch)
        (total / num_labels).backward()
        loss += float(total.detach()) / num_labels
    return loss, gradients(attached.adapter)


def joint(model: PreTrainedModel, handles: list[Attached], packs: bool = True) -> tuple[JointModel, list[float]]:
    causal = JointModel(model)
    if not packs:
        causal.close()
        causal.packs = False
    everything = Attachments.of(model)
    assert everything is not None
    everything.activate(model, ())
    for handle in handles:
        handle.train_mode(True)
    servers = [Server(handle) for handle in handles]
    keys = [70 + i for i in range(len(ROWS))]
    return causal, causal.add_gradients(servers, ROWS, keys, _MAX_TOKENS, _SEED, _STEP)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", _TARGETS)
def test_each_adapter_has_the_loss_and_the_gradient_that_it_has_alone(family: str, dropout: float, packs: bool) -> None:
    model = exact(family)
    handles = [place(model, i, targets, lora_dropout=dropout) for i, targets in enumerate(_TARGETS[family])]
    causal, losses = joint(model, handles, packs)
    assert not packs or family == "gpt2" or (causal.blocks is not None and causal.blocks.num_used)
    for number, handle in enumerate(handles):
        loss, expected = alone(family, number, packs, lora_dropout=dropout)
        assert losses[number] == pytest.approx(loss, abs=1e-12)
        assert worst(gradients(handle.adapter), expected) < 1e-10


def test_what_is_not_plain_goes_its_own_way() -> None:
    """DoRA beside plain LoRA on the same layers, and on the head."""
    targets = ["q_proj", "down_proj", "lm_head"]
    model = exact("llama")
    handles = [place(model, 0, targets), place(model, 1, targets, use_dora=True, lora_dropout=0.2)]
    _, losses = joint(model, handles)
    for number, settings in enumerate(({}, {"use_dora": True, "lora_dropout": 0.2})):
        own = exact("llama")
        attached = place(own, number, targets, **settings)
        _, (expected,) = joint(own, [attached])
        assert losses[number] == pytest.approx(expected, abs=1e-12)
        assert worst(gradients(handles[number].adapter), gradients(attached.adapter)) < 1e-10


def test_an_adapter_that_has_gone_wrong_spoils_no_other() -> None:
    model, clean = exact("llama"), exact("llama")
    handles = [place(model, i, targets) for i, targets in enumerate(_LLAMA_LIKE)]
    with torch.no_grad():
        next(iter(handles[1].adapter.factors.values())).B.fill_(torch.nan)
    _, losses = joint(model, handles)
    others = [place(clean, i, _LLAMA_LIKE[i]) for i in (0, 2)]
    _, expected = joint(clean, others)
    assert np.isnan(losses[1]) and [losses[0], losses[2]] == pytest.approx(expected, abs=1e-12)
    for mine, theirs in zip((handles[0], handles[2]), others, strict=True):
        assert worst(gradients(mine.adapter), gradients(theirs.adapter)) < 1e-10


def test_beginnings_are_not_shared_between_adapters() -> None:
    """Rows that begin alike are computed apart, for each adapter sees another beginning; evaluation shares again."""
    begin = np.random.RandomState(9).randint(3, VOCAB, 20).astype(np.int32)
    rows = [Document(np.concatenate([begin, [5 + i, 9]]).astype(np.int32), np.arange(22) > 20) for i in range(3)]
    model = exact("llama")
    handles = [place(model, i, ["q_proj", "v_proj"]) for i in range(2)]
    causal, _ = joint(model, handles)
    losses = causal.add_gradients([Server(each) for each in handles], rows, range(3), 400, 0, 0)
    assert causal.shares
    for loss, handle in zip(losses, handles, strict=True):
        handle.activate()
        total, _ = causal.losses(causal.batch(rows, range(3)))
        assert float(total.detach()) / 3 == pytest.approx(loss, abs=1e-12)


def test_a_layer_that_regroups_its_tokens_is_refused() -> None:
    model = exact("llama")
    handles = [place(model, i, ["down_proj"]) for i in range(2)]
    layer = model.get_submodule("model.layers.0.mlp")
    plain = layer.forward
    layer.forward = lambda x: torch.cat([plain(x[:, :3]), plain(x[:, 3:])], 1)  # type: ignore[method-assign]
    with pytest.raises(AdapterError, match=r"a Linear got 3 of \d+ tokens, regrouped"):
        joint(model, handles)


def test_stacked_experts_are_refused() -> None:
    model = FAMILIES["mixtral"]()
    config = LoraConfig(r=2, target_parameters=("experts.down_proj",), target_modules=("q_proj",), lora_dropout=0.0)
    handles = [attach(model, config, f"n{i}") for i in range(2)]
    with pytest.raises(AdapterError, match="computes all rows with one weight"):
        joint(model, handles)
