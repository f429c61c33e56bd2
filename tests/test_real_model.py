"""Gemma 3 270M, a real multilingual model, on Ukrainian sentences: it learns, and is the same wherever it is run."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loratune import api
from loratune.adapter.attach import attach, load_adapter
from loratune.adapter.config import LoraConfig
from loratune.adapter.wrapper import Adapted
from loratune.api import RunResult
from loratune.data.dataset import Dataset, load_dataset
from loratune.data.encode import Encoder
from loratune.demo.corpus import restoration_rows
from loratune.model.causal import CausalModel
from loratune.model.load import load_model
from loratune.train import loop
from loratune.train.config import TrainConfig
from loratune.train.optim import Optimizer
from oracles import relative
from tiny_run import lines_of, write_rows

pytestmark = [pytest.mark.model, pytest.mark.slow]

NAME = "google/gemma-3-270m"
_ELSEWHERE = """
import sys
import torch
import loratune
model, _ = loratune.load_model(sys.argv[1])
ids = torch.load(sys.argv[3])
attached = loratune.load_adapter(model, sys.argv[2])
with torch.no_grad():
    ours = model(input_ids=ids).logits
attached.detach()
from peft import PeftModel
with torch.no_grad():
    theirs = PeftModel.from_pretrained(model, sys.argv[2]).eval()(input_ids=ids).logits
torch.save((ours, theirs), sys.argv[4])
"""


@dataclass
class Real:
    """The model without any adapter, and a run on it; its tests leave it as they found it."""

    model: Any
    tokenizer: Any
    train: Path
    validation: Path
    run: RunResult
    ids: Tensor
    tuned: Tensor  # logits of `ids` with the run's adapter attached, as training left it
    base: Tensor  # and without it

    @property
    def adapter(self) -> Path:
        return self.run.output / "adapter"

    def rows(self, path: Path) -> Dataset:
        return load_dataset(path, Encoder(self.tokenizer, None))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    """Six steps of four rows, the shorter ones of the demo's."""
    folder = tmp_path_factory.mktemp("real")
    rows = restoration_rows(96, 32, 0, seed=0)
    short = {split: sorted(each, key=lambda row: len(row["completion"])) for split, each in rows.items()}
    train = write_rows(folder / "train.jsonl", short["train"][:24])
    validation = write_rows(folder / "held.jsonl", short["validation"][:6])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        model, tokenizer = load_model(NAME)
    attached = attach(model, LoraConfig.preset("fast", task_type="CAUSAL_LM"), seed=0)
    settings = {"batch_size": 4, "learning_rate": 2e-3}
    run = api.train(model, tokenizer, data=train, validation=validation, output=folder / "run", **settings)
    ids = torch.tensor([Encoder(tokenizer, None).prompt(short["validation"][0]["prompt"])])
    with torch.no_grad():
        tuned = model(input_ids=ids).logits
        attached.detach()
        base = model(input_ids=ids).logits
    yield Real(model, tokenizer, train, validation, run, ids, tuned, base)


def test_six_steps_lower_the_held_out_loss(real: Real) -> None:
    assert real.run.status == "done" and real.run.steps == 6
    assert real.run.before is not None and real.run.after is not None
    assert real.run.after.loss < real.run.before.loss - 0.2
    losses = [line["loss"] for line in lines_of(real.run.output / "metrics.jsonl", "step")]
    assert losses[-1] < losses[0]
    assert relative(real.tuned, real.base) > 0.01


def test_the_model_is_the_plain_one_after_detaching(real: Real) -> None:
    assert not any(isinstance(module, Adapted) for module in real.model.modules())
    assert not any(parameter.requires_grad for parameter in real.model.parameters())


def test_the_adapter_gives_the_same_logits_in_a_new_process_and_in_peft(real: Real, tmp_path: Path) -> None:
    torch.save(real.ids, tmp_path / "ids.pt")
    arguments = [NAME, str(real.adapter), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", _ELSEWHERE, *arguments], check=True, timeout=300)
    ours, theirs = torch.load(tmp_path / "logits.pt")
    assert relative(ours, real.tuned) <= 1e-5
    assert relative(theirs, real.tuned) <= 1e-5


def test_the_merged_model_gives_the_same_logits(real: Real) -> None:
    merged: Any = load_adapter(copy.deepcopy(real.model), real.adapter).merge()
    with torch.no_grad():
        logits = merged(input_ids=real.ids).logits
    assert relative(logits, real.tuned) <= 1e-5
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight  # its head is still tied
    with torch.no_grad():
        assert torch.equal(real.model(input_ids=real.ids).logits, real.base)


def test_packed_documents_see_only_themselves(real: Real) -> None:
    documents = real.rows(real.validation).documents
    causal = CausalModel(real.model)
    try:
        assert causal.packs and causal.notes == []
        with torch.no_grad():
            batch = causal.batch(documents, range(len(documents)))
            packed = real.model.get_output_embeddings()(causal.hidden(batch))
    finally:
        causal.close()
    with torch.no_grad():
        rows = [torch.from_numpy(document.input_ids.astype(np.int64))[None] for document in documents]
        alone = [
            real.model(input_ids=ids).logits[0, :-1][torch.from_numpy(document.trained[1:])]
            for ids, document in zip(rows, documents, strict=True)
        ]
    assert relative(packed, torch.cat(alone)) <= 3e-6


def test_every_role_with_the_tied_head_trains_and_merges(real: Real, tmp_path: Path) -> None:
    model = copy.deepcopy(real.model)
    attached = attach(model, LoraConfig.preset("deep", task_type="CAUSAL_LM"), seed=0)
    assert len(attached.adapter.factors) == 18 * 7 + 1 and "lm_head" in attached.adapter.factors
    config, rows = TrainConfig(batch_size=2, max_steps=1), real.rows(real.train)
    run = loop.Run(
        output=tmp_path / "run", config=config, causal=CausalModel(model), attached=attached,
        optimizer=Optimizer(attached.adapter, config), train=rows, validation=rows, identity={},
        on_event=lambda event: None, num_parameters=0,
    )  # fmt: skip
    attached.train_mode(True)
    loop.train_step(run)
    attached.train_mode(False)
    run.causal.close()
    assert all(factor.B.abs().max() > 0 for factor in attached.adapter.factors.values())
    with torch.no_grad():
        tuned = model(input_ids=real.ids).logits
        merged: Any = attached.merge()
        assert relative(merged(input_ids=real.ids).logits, tuned) <= 1e-5
    assert relative(tuned, real.base) > 1e-3
    head, embedding = merged.get_output_embeddings().weight, merged.get_input_embeddings().weight
    assert not merged.config.tie_word_embeddings
    assert torch.equal(embedding, real.model.get_input_embeddings().weight) and not torch.equal(head, embedding)
